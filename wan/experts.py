"""The experts of a Wan 2.2 model: all are loaded, one is on the device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan.checkpoints import Model, load_transformer
from wan.lora import without_adapter
from wan.variants import Expert

SMALLEST_LOCKED = 2**20  # bytes; of smaller tensors there are many, and little to gain


class Experts(Mapping[Expert, WanTransformer3DModel]):
    """The transformers of a model, by expert; the one asked for is on the device.

    Asking for one of two swaps it with the other, unless both are `resident` on the device. Frozen
    weights keep their place in host memory while they are on the device, so that a swap copies one
    expert in and none out; what is trained stays on the device. Both are always loaded, as a
    preview needs the other expert even when only one is trained.
    """

    def __init__(
        self,
        transformers: dict[Expert, WanTransformer3DModel],
        device: torch.device,
        resident: bool = False,
    ) -> None:
        self._transformers = transformers
        self._swaps = len(transformers) > 1 and not resident
        self._device = torch.empty(0, device=device).device  # cuda:0, not cuda
        self._at_home: dict[Tensor, Tensor] = {}  # a frozen weight -> its values in host memory

    def __getitem__(self, expert: Expert) -> WanTransformer3DModel:
        wanted = self._transformers[expert]
        if wanted.device != self._device:
            for other in self._transformers.values():
                if other is not wanted and self._swaps:
                    self._send_home(other)
            self._bring(wanted)
        return wanted

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._transformers)

    def __len__(self) -> int:
        return len(self._transformers)

    def _bring(self, transformer: WanTransformer3DModel) -> None:
        """Copy to the device what is not there."""
        for tensor in _tensors(transformer):
            if tensor.device == self._device:
                continue
            if self._swaps and not tensor.requires_grad and tensor not in self._at_home:
                self._at_home[tensor] = tensor.data
                _lock_in_memory(tensor.data, self._device)
            tensor.data = tensor.data.to(self._device, non_blocking=True)

    def _send_home(self, transformer: WanTransformer3DModel) -> None:
        """Free the device of frozen weights: nothing is copied, they have not changed."""
        for tensor in _tensors(transformer):
            if tensor in self._at_home:
                tensor.data = self._at_home[tensor]


def _tensors(transformer: WanTransformer3DModel) -> Iterator[Tensor]:
    yield from transformer.parameters()
    yield from transformer.buffers()


def _lock_in_memory(tensor: Tensor, device: torch.device) -> None:
    """Let the device read host memory by itself: copies are several times as fast.

    Where the system does not allow it, they are only slower. Done in place: PyTorch's own pinned
    memory is a copy, rounded up to a power of two.
    """
    if device.type == "cuda" and tensor.nbytes >= SMALLEST_LOCKED:
        runtime = torch.cuda.cudart()
        assert runtime is not None, "there is a CUDA device"
        runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)


def load_experts(
    model: Model, dtype: torch.dtype, device: torch.device, resident: bool = False
) -> Experts:
    """All experts of the model, frozen: on the device if `resident`, else in host memory."""
    loaded: dict[Expert, WanTransformer3DModel] = {
        expert: load_transformer(model, expert, dtype, device if resident else "cpu")
        for expert in model.variant.experts
    }
    return Experts(loaded, device, resident)


@contextmanager
def base_only(experts: Experts, adapted: Sequence[Expert]) -> Iterator[None]:
    """Within the block the experts compute what the base model does, adapters set aside."""
    with ExitStack() as stack:
        for expert in adapted:
            stack.enter_context(without_adapter(experts[expert]))
        yield
