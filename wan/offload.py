"""The inputs of blocks in host memory, where they wait for the backward pass.

The input of a block is copied out while the block computes, and back while the block after it runs
its backward pass. The host memory is locked once and used again in each step, whatever the shapes.
"""

import weakref
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from wan.pinned import SideStream, lock_in_memory

BlockForward = Callable[..., Tensor]  # (block, hidden, ...) -> hidden


def checkpoint_in_host(forward: BlockForward, device: torch.device) -> BlockForward:
    """`forward(block, hidden, ...)` that keeps nothing on the device for the backward pass.

    `hidden` waits in host memory, other tensors are kept as they are, and all else is computed
    again, bit for bit, dropout included: once, so that no graph can be kept for a second backward
    pass. Without gradients it is `forward`. To be shared by all blocks, whose inputs come back in
    reverse order.
    """
    shelf = _shelf_of(device)

    def run(block: nn.Module, hidden: Tensor, *rest: object) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(block, hidden, *rest)
        first, parked = [hidden], shelf.park(hidden)

        def compute(*rest: object) -> Tensor:
            return forward(block, first.pop() if first else shelf.fetch(parked), *rest)

        return checkpoint(compute, *rest, use_reentrant=False)

    return run


def inputs_in_host(forward: BlockForward, device: torch.device) -> BlockForward:
    """`forward(block, hidden, ...)` that keeps its `hidden` in host memory for the backward pass.

    What else it keeps stays on the device. As with `checkpoint_in_host`, blocks run in turn, and
    there is no second backward pass.
    """
    shelf = _shelf_of(device)

    def run(block: nn.Module, hidden: Tensor, *rest: object) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(block, hidden, *rest)
        identity = _identity(hidden)  # not itself: hooks live as long as what is kept

        def pack(kept: Tensor) -> Tensor | _Parked:
            return shelf.park(kept) if _identity(kept) == identity else kept

        def unpack(kept: Tensor | _Parked) -> Tensor:
            return shelf.fetch(kept).detach() if isinstance(kept, _Parked) else kept

        with saved_tensors_hooks(pack, unpack):
            return forward(block, hidden, *rest)

    return run


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """The same for two tensors that are views of the same numbers in the same order."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Parked:
    """An input in host memory; `give_back` lends its memory to others, now or when it is gone."""

    def __init__(self, hidden: Tensor, buffer: Tensor, free: list[Tensor]) -> None:
        self.host = buffer[: hidden.nbytes].view(hidden.dtype).view(hidden.shape)
        self.on_device: Tensor | None = None
        self.requires_grad = hidden.requires_grad
        self.give_back = weakref.finalize(self, free.append, buffer)
        self.give_back.atexit = False


class _Shelf:
    """Host memory for the inputs of blocks, and the one copy that is under way beside a block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = SideStream(device)
        self._free: list[Tensor] = []  # bytes
        self._order: list[weakref.ref[_Parked]] = []
        self._moving: tuple[Tensor, torch.cuda.Event | None] | None = None

    def park(self, hidden: Tensor) -> _Parked:
        """Start to copy `hidden` out; the next `park` or `fetch` sees to the end of it."""
        self._finish_copy()
        parked = _Parked(hidden, self._take(hidden.nbytes), self._free)
        self._order.append(weakref.ref(parked))
        self._moving = (hidden, self._side.copy([(parked.host, hidden.detach())]))
        return parked

    def fetch(self, parked: _Parked) -> Tensor:
        """The input on the device, and the one before it on its way there."""
        assert parked.give_back.alive, "a second backward pass through a checkpoint in host memory"
        self._bring(parked)
        self._finish_copy()
        hidden, parked.on_device = parked.on_device, None
        parked.give_back()
        assert hidden is not None
        if previous := self._previous():
            self._bring(previous)
        return hidden.requires_grad_(parked.requires_grad)

    def _previous(self) -> _Parked | None:
        """The last one parked that still waits."""
        while self._order:
            parked = self._order[-1]()
            if parked is not None and parked.give_back.alive:
                return parked
            self._order.pop()
        return None

    def _bring(self, parked: _Parked) -> None:
        """Start to copy an input to the device, unless that is done or under way."""
        if parked.on_device is None:
            self._finish_copy()
            parked.on_device = torch.empty_like(parked.host, device=self._device)
            copied = self._side.copy([(parked.on_device, parked.host)])
            self._moving = (parked.on_device, copied)

    def _finish_copy(self) -> None:
        """Let go of what was copied last: only now may its memory on the device be used anew."""
        if self._moving is not None:
            self._side.wait(self._moving[1])
            self._moving = None

    def _take(self, nbytes: int) -> Tensor:
        """At least so many bytes: the least of the free that suffice, or new ones."""
        sizes = [buffer.nbytes for buffer in self._free]
        if fitting := [size for size in sizes if size >= nbytes]:
            return self._free.pop(sizes.index(min(fitting)))
        if sizes:  # too small: kept, each shape would have host memory of its own
            self._free.pop()
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        lock_in_memory(buffer, self._device)
        return buffer


@cache
def _shelf_of(device: torch.device) -> _Shelf:
    """One for all transformers on a device, which are not at work at once: its memory is locked."""
    return _Shelf(device)
