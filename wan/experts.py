"""The experts of a Wan 2.2 model: all are loaded, the one at work is on the device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Literal

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from wan.checkpoints import Model, load_transformer
from wan.pinned import SideStream, lock_in_memory
from wan.sharding import gather_ahead, shard_block
from wan.speed import blocks_of
from wan.speed_choices import FrozenFormat
from wan.streaming import BlockStream, stream_blocks
from wan.strengths import without_adapter
from wan.transformer import device_of
from wan.variants import Expert

Placement = Literal["resident", "swap", "stream", "shard"]
ROOM = 2 * 2**30  # bytes to leave free when an expert is copied in beside the other


class Experts(Mapping[Expert, WanTransformer3DModel]):
    """The transformers of a model, by expert; the one asked for is ready to work on the device.

    "resident": all are on the device. "swap": asking for one of two swaps it with the other; frozen
    weights keep their place in host memory while they are on the device, so that a swap copies one
    expert in and none out. "stream": the blocks of all stay in host memory, and each is on the
    device while it is at work. "shard": the blocks of all are on the device, of each the share of
    this process. What is trained stays on the device. All are always loaded, as a preview needs the
    other expert even when only one is trained.
    """

    def __init__(
        self,
        transformers: dict[Expert, WanTransformer3DModel],
        device: torch.device,
        placement: Placement = "swap",
    ) -> None:
        self._transformers = transformers
        self._placement = placement
        self._swaps = placement == "swap" and len(transformers) > 1
        self._device = torch.empty(0, device=device).device  # cuda:0, not cuda
        self._at_home: dict[Tensor, Tensor] = {}  # a frozen weight -> its values in host memory
        self._side = SideStream(self._device)
        self._coming: dict[Tensor, Tensor] = {}  # a frozen weight -> its copy on the device
        self._arrival: torch.cuda.Event | None = None
        self._streams: dict[Expert, BlockStream] = {}

    def __getitem__(self, expert: Expert) -> WanTransformer3DModel:
        wanted = self._transformers[expert]
        if self._placement == "stream":
            self._stream(expert, wanted)
        elif device_of(wanted) != self._device:
            for other in self._transformers.values():
                if other is not wanted and self._swaps:
                    self._send_home(other)
            self._bring(wanted)
        return wanted

    def expect(self, expert: Expert) -> None:
        """This one is asked for next: copy it in beside the other's work, if there is room."""
        wanted = self._transformers[expert]
        if not self._swaps or self._device.type != "cuda" or device_of(wanted) == self._device:
            return
        homes = {t: self._home(t) for t in _tensors(wanted) if not t.requires_grad}
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._coming or sum(home.nbytes for home in homes.values()) + ROOM > free:
            return
        self._coming = {t: torch.empty_like(h, device=self._device) for t, h in homes.items()}
        self._arrival = self._side.copy((self._coming[t], home) for t, home in homes.items())

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._transformers)

    def __len__(self) -> int:
        return len(self._transformers)

    def _bring(self, transformer: WanTransformer3DModel) -> None:
        """Copy to the device what is neither there nor on its way."""
        self._side.wait(self._arrival)
        coming, self._coming, self._arrival = self._coming, {}, None
        for tensor in _tensors(transformer):
            if tensor.device == self._device:
                continue
            here = coming.get(tensor)
            if here is None:
                stays = self._swaps and not tensor.requires_grad
                home = self._home(tensor) if stays else tensor.data
                here = home.to(self._device, non_blocking=True)
            tensor.data = here

    def _home(self, tensor: Tensor) -> Tensor:
        """The values of a frozen weight in host memory, which they never leave."""
        if tensor not in self._at_home:
            self._at_home[tensor] = tensor.data
            lock_in_memory(self._at_home[tensor], self._device)
        return self._at_home[tensor]

    def _stream(self, expert: Expert, transformer: WanTransformer3DModel) -> None:
        """Blocks stream from now on; what is outside of them, and adapters, is on the device."""
        if expert in self._streams:
            self._streams[expert].settle()
        else:
            blocks = blocks_of(transformer)
            self._streams[expert] = stream_blocks(blocks, self._device)
        for name, tensor in chain(transformer.named_parameters(), transformer.named_buffers()):
            if not name.startswith("blocks.") and tensor.device != self._device:
                tensor.data = tensor.data.to(self._device)

    def _send_home(self, transformer: WanTransformer3DModel) -> None:
        """Free the device of frozen weights: nothing is copied, they have not changed."""
        for tensor in _tensors(transformer):
            if tensor in self._at_home:
                tensor.data = self._at_home[tensor]


def _tensors(transformer: WanTransformer3DModel) -> Iterator[Tensor]:
    yield from transformer.parameters()
    yield from transformer.buffers()


def load_experts(
    model: Model,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement = "swap",
    frozen: FrozenFormat | None = None,
    mesh: DeviceMesh | None = None,
) -> Experts:
    """All experts of the model, frozen: on the device if resident, else in host memory.

    The linears of their blocks are packed as `frozen` says; None = as loaded. To "shard", each
    process of the `mesh` reads everything, and of each block keeps its share alone, as soon as that
    block is read: of what it does not keep it never holds more than a few blocks.
    """
    assert (placement == "shard") == (mesh is not None), "a mesh is what a base is sharded over"
    home = device if placement == "resident" else "cpu"
    on_block = partial(shard_block, mesh=mesh) if mesh else None
    loaded: dict[Expert, WanTransformer3DModel] = {}
    for expert in model.variant.experts:
        transformer = load_transformer(model, expert, dtype, home, frozen, device, on_block)
        if mesh:
            gather_ahead(blocks_of(transformer))
        loaded[expert] = transformer
    return Experts(loaded, device, placement)


@contextmanager
def base_only(experts: Experts, adapted: Sequence[Expert]) -> Iterator[None]:
    """Within the block the experts compute what the base model does, adapters set aside."""
    with ExitStack() as stack:
        for expert in adapted:
            stack.enter_context(without_adapter(experts[expert]))
        yield
