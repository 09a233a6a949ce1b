"""A step's kernels recorded once for each shape as a CUDA graph, and then launched all at once.

A transformer's step is some seven thousand kernels. For a picture they take less time than a host
needs to launch them one by one, or little more (`docs/performance.md`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

MOST_PLACES = 2**16  # of latents, 16,384 tokens: beyond, a card has enough to do
MOST_GRAPHS = 16  # shapes; a graph takes memory of its own

Inputs = tuple[Tensor | None, ...]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recorded:
    """A step that reads its inputs where these are, and adds to the gradients where those are."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    errors: Tensor


class StepGraphs:
    """Forward and backward passes of one model after the other, recorded where that pays.

    The first pass of a shape runs as it is written, since it compiles, and so does the first one
    after another model's. Recordings are of the model that worked last, and only as long as its
    weights do not move; their memory is one pool, as large as the largest of them needs.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._model: nn.Module | None = None
        self._seen: set[object] = set()
        self._gradients: list[Tensor] = []
        self._places: list[tuple[Tensor, int]] = []  # the model's tensors, and where they were
        self._recorded: dict[object, _Recorded] = {}

    def add_gradients(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        errors_of: Callable[..., Tensor],
        inputs: Inputs,
        share: Tensor,
    ) -> Tensor:
        """The errors (B,) of `inputs`; the gradient of their sum, each times its share, is added.

        `errors_of` takes the inputs one by one and is a function of them alone, with nothing that
        waits for the host. The first is latents (B, C, F, h, w); `share` (B,) is on their device.
        """
        shapes = (id(model), *(None if tensor is None else tensor.shape for tensor in inputs))
        worked_last, self._model = self._model is model, model
        if not worked_last or self._moved():
            self.clear()
        new, self._seen = shapes not in self._seen, self._seen | {shapes}
        if not (self._enabled and _pays(inputs)) or new or not worked_last:
            if new:  # its memory would be beside that of the recorded
                self.clear()
            return _as_written(errors_of, inputs, share)
        if shapes not in self._recorded and len(self._recorded) == MOST_GRAPHS:
            return _as_written(errors_of, inputs, share)
        if shapes not in self._recorded:
            try:
                self._record(shapes, model, parameters, errors_of, (*inputs, share))
            except RuntimeError as error:  # also where memory is short
                self._give_up(error)
                return _as_written(errors_of, inputs, share)
        recorded = self._recorded[shapes]
        for place, tensor in zip(recorded.inputs, (*inputs, share), strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor, non_blocking=True)
        self._receive(parameters)
        recorded.graph.replay()
        return recorded.errors.clone()

    def clear(self) -> None:
        """Forget what is recorded, and give its memory back."""
        if self._recorded or self._gradients:
            self._recorded, self._gradients, self._places = {}, [], []
            torch.cuda.empty_cache()

    def _moved(self) -> bool:
        return any(tensor.data_ptr() != place for tensor, place in self._places)

    def _record(
        self,
        shapes: object,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        errors_of: Callable[..., Tensor],
        inputs: Inputs,
    ) -> None:
        if not self._gradients:
            tensors = chain(model.parameters(), model.buffers())
            self._places = [(tensor, tensor.data_ptr()) for tensor in tensors]
            self._gradients = [torch.zeros_like(parameter) for parameter in parameters]
        own = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        share = own[-1]
        assert share is not None
        graph = torch.cuda.CUDAGraph()
        pool = next((recorded.graph.pool() for recorded in self._recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            errors = errors_of(*own[:-1])
            found = torch.autograd.grad((errors * share).sum(), parameters)
            torch._foreach_add_(self._gradients, found)  # pyright: ignore[reportPrivateImportUsage] (has no other name)
            errors = errors.detach()
        self._recorded[shapes] = _Recorded(graph, own, errors)

    def _receive(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let gradients so far be where the recorded step adds its own."""
        empty = []
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            if parameter.grad is None:
                empty.append(gradient)
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if empty:
            torch._foreach_zero_(empty)  # pyright: ignore[reportPrivateImportUsage] (as above)

    def _give_up(self, error: RuntimeError) -> None:
        self._enabled = False
        self.clear()
        for generator in torch.cuda.default_generators:  # they still believe to be recorded
            generator.graphsafe_set_state(generator.clone_state())
        reason = str(error).splitlines()[0]
        log.warning(
            "graphs     steps cannot be recorded here (%s): they run kernel by kernel, slower for "
            "small pictures. Set speed.graphs=false to be spared this line",
            reason,
        )


def _pays(inputs: Inputs) -> bool:
    x = inputs[0]
    assert x is not None
    return x.is_cuda and x[:, 0].numel() <= MOST_PLACES


def _as_written(errors_of: Callable[..., Tensor], inputs: Inputs, share: Tensor) -> Tensor:
    errors = errors_of(*inputs)
    (errors * share).sum().backward()
    return errors.detach()
