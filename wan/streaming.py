"""Frozen weights that live in host memory and are on the device only while their block computes.

While a block computes, the weights of the next one are copied by another stream: forward the block
after it, in the backward pass the one before it. Trained tensors and small ones stay on the device.
The hooks are on a block's call and on the gradient of its output, so that its forward may be
compiled, and may recompute what it likes.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wan.pinned import SMALLEST_LOCKED, SideStream, lock_in_memory


class BlockStream:
    """The weights of blocks that run one after the other; see `stream_blocks`."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, ahead: int) -> None:
        self._device = torch.empty(0, device=device).device  # cuda:0, not cuda
        self._ahead = ahead
        self._side = SideStream(self._device)
        self._blocks = list(blocks)
        self._streamed: list[dict[Tensor, _Places]] = [{} for _ in blocks]
        self._arrivals: dict[int, torch.cuda.Event | None] = {}  # block on the device -> copied
        for index, block in enumerate(blocks):
            self._sort_out(index)
            block.register_forward_pre_hook(partial(self._before, index))
            block.register_forward_hook(partial(self._after, index))

    @property
    def present(self) -> list[int]:
        """The blocks whose weights are on the device, or on the way to it."""
        return sorted(self._arrivals)

    def send_home(self) -> None:
        """Free the device of all that streams: nothing is copied, it has not changed.

        Happens by itself after a backward pass, and after a forward pass that none can follow.
        """
        for index in self.present:
            self._release(index)

    def settle(self) -> None:
        """Bring to the device what has joined the blocks and is trained: adapters."""
        for index in range(len(self._blocks)):
            if index not in self._arrivals:
                self._sort_out(index)

    def _before(self, index: int, _: nn.Module, __: tuple[object, ...]) -> None:
        self._show(index, range(index + 1, index + 1 + self._ahead))

    def _after(self, index: int, _: nn.Module, __: tuple[object, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._before_backward, index))
        elif index == len(self._blocks) - 1:
            self.send_home()

    def _before_backward(self, index: int, _: Tensor) -> None:
        """By now the backward pass of the block after this one is done."""
        self._show(index, range(index - 1, index - 1 - self._ahead, -1))
        # Again for each block: which is the last one to come depends on what is trained.
        torch.autograd.Variable._execution_engine.queue_callback(self.send_home)  # pyright: ignore[reportAttributeAccessIssue]

    def _show(self, index: int, next_ones: Iterable[int]) -> None:
        """A block is on the device, the next ones are on the way to it, and no other is there."""
        wanted = [index, *(other for other in next_ones if 0 <= other < len(self._blocks))]
        for other in self.present:
            if other not in wanted:
                self._release(other)
        for other in wanted:
            if other not in self._arrivals:
                self._bring(other)
        self._side.wait(self._arrivals[index])

    def _bring(self, index: int) -> None:
        self._sort_out(index)
        streamed = self._streamed[index]
        try:
            for places in streamed.values():
                # Not a new tensor: what autograd keeps of a forward pass are views of this one.
                places.abroad.untyped_storage().resize_(places.size)
            self._arrivals[index] = self._side.copy((p.abroad, p.home) for p in streamed.values())
            for tensor, places in streamed.items():
                tensor.data = places.abroad
        except BaseException:  # the device is full: a block that is half there is not present
            self._arrivals[index] = self._side.copy(())  # when all copies asked for so far are done
            self._release(index)
            raise

    def _release(self, index: int) -> None:
        # A block that was never used may still be on its way into the memory that is freed here.
        self._side.wait(self._arrivals.pop(index))
        for tensor, places in self._streamed[index].items():
            tensor.data = places.home
            places.abroad.untyped_storage().resize_(0)

    def _sort_out(self, index: int) -> None:
        """What streams has a home, all else is on the device; adapters may have come or gone."""
        before, streamed = self._streamed[index], {}
        for tensor in (*self._blocks[index].parameters(), *self._blocks[index].buffers()):
            if not tensor.requires_grad and tensor.nbytes >= SMALLEST_LOCKED:
                streamed[tensor] = before.get(tensor) or _settle(tensor, self._device)
            elif tensor.device != self._device:
                tensor.data = tensor.data.to(self._device)
        self._streamed[index] = streamed


class _Places(NamedTuple):
    home: Tensor  # in host memory: the values
    abroad: Tensor  # on the device: memory only while its block is present
    size: int  # of that memory, in bytes


def stream_blocks(blocks: Sequence[nn.Module], device: torch.device, ahead: int = 1) -> BlockStream:
    """Keep the frozen weights and buffers of blocks in host memory, but for `ahead` + 1 blocks.

    Blocks take (hidden, ...) and return hidden, one after the other in this order; their weights
    are brought by `nn.Module.__call__`. Between passes a frozen tensor may be read, and written to,
    where it is: in host memory, locked there. To be called once, with the weights anywhere.
    """
    assert ahead >= 0
    return BlockStream(blocks, device, ahead)


def _settle(tensor: Tensor, device: torch.device) -> _Places:
    """A home for a tensor, which moves in, and a place on the device without memory."""
    home = tensor.data.cpu()
    lock_in_memory(home, device)
    tensor.data = home
    abroad = torch.empty_strided(home.shape, home.stride(), dtype=home.dtype, device=device)
    places = _Places(home, abroad, abroad.untyped_storage().nbytes())
    abroad.untyped_storage().resize_(0)
    return places
