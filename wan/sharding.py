"""A frozen base of which each process holds a share: FSDP2, block by block.

The weights of a block are gathered from all processes while it computes, those of the next one
beside it, forward and backward; after it each process keeps its share alone. What is trained is
whole on each process, as with data parallelism, and so are its gradients and its files.

This is PyTorch's `fully_shard` itself and not accelerate's plugin: that one wraps a model together
with its optimizer, and would shard the adapters too and write them in a layout of its own.
Accelerate still launches the processes.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from wan.frozen_linear import FrozenLinear

# It warns of what in-place operations on a block's output would do: there are none.
VIEWS = "FSDP2-wrapped module .* returned a view tensor"


def shard_blocks(blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard the frozen parameters of blocks, adapters attached, over the processes of a mesh.

    Blocks take (hidden, ...) and return hidden, one after the other in this order; their weights
    come by `nn.Module.__call__`, from all processes together: all must run as many passes, in the
    same order, on whatever they like. Each block moves to the mesh's device as it is sharded, so
    that a model in host memory is never whole on the device. `ValueError` for packed weights.
    """
    blocks = list(blocks)
    _refuse_packed(blocks)
    warnings.filterwarnings("ignore", VIEWS, UserWarning)
    sharded: list[FSDPModule] = []
    for block in blocks:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        sharded.append(
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        )
    # Each block is a root of its own to FSDP2, as nobody calls the transformer's forward: so it
    # cannot know which one is next.
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_before, sharded[index + 1 : index + 2]))
        block.register_forward_hook(partial(_after, sharded[max(index - 1, 0) : index]))


def _before(following: Sequence[FSDPModule], _: nn.Module, __: tuple[object, ...]) -> None:
    _start_to_gather(following)


def _after(
    previous: Sequence[FSDPModule], _: nn.Module, __: tuple[object, ...], output: Tensor
) -> None:
    if output.requires_grad:
        output.register_hook(lambda _: _start_to_gather(previous))


def _start_to_gather(blocks: Sequence[FSDPModule]) -> None:
    """The host goes on; FSDP2's own hook before a block's pass waits for what is gathered."""
    for block in blocks:
        block.unshard(async_op=True)


def _refuse_packed(blocks: Sequence[nn.Module]) -> None:
    """Packed weights are buffers, which FSDP2 leaves whole."""
    if any(isinstance(module, FrozenLinear) for block in blocks for module in block.modules()):
        raise ValueError("a base in fewer bits cannot be sharded: leave it in bf16")
