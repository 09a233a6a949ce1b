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
from itertools import pairwise
from typing import cast

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from wan.context import Context, context_of
from wan.frozen_linear import FrozenLinear
from wan.speed import blocks_of

# It warns of what in-place operations on a block's output would do: there are none.
VIEWS = "FSDP2-wrapped module .* returned a view tensor"


def shard_blocks(blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard the frozen parameters of blocks, adapters attached or not, over a mesh's processes.

    Blocks take (hidden, ...) and return hidden, one after the other in this order; their weights
    come by `nn.Module.__call__`, from all processes together: all must run as many passes, in the
    same order, on whatever they like. Each block moves to the mesh's device as it is sharded, so
    that a model in host memory is never whole on the device. `ValueError` for packed weights.
    """
    blocks = list(blocks)
    for block in blocks:
        shard_block(block, mesh)
    gather_ahead(blocks)


def shard_block(block: nn.Module, mesh: DeviceMesh) -> None:
    """The same for one block, such as one that has just been read: it works alone so far."""
    if any(isinstance(module, FrozenLinear) for module in block.modules()):  # buffers stay whole
        raise ValueError("a base in fewer bits cannot be sharded: leave it in bf16")
    warnings.filterwarnings("ignore", VIEWS, UserWarning)
    trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
    fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def gather_ahead(blocks: Sequence[nn.Module]) -> None:
    """Let the weights of the next of these sharded blocks come while one computes.

    Each is a root of its own to FSDP2, as nobody calls the transformer's forward: so it cannot know
    which one is next.
    """
    for block, following in pairwise(blocks):
        block.register_forward_pre_hook(partial(_before, cast("FSDPModule", following)))
        following.register_forward_hook(partial(_after, cast("FSDPModule", block)))


def passes_with(transformer: WanTransformer3DModel) -> Context | None:
    """The processes that must run each of its passes together; None if it needs nobody."""
    if isinstance(blocks_of(transformer)[0], FSDPModule):
        world = cast("distributed.ProcessGroup", distributed.group.WORLD)
        return Context(world, distributed.get_rank(), distributed.get_world_size())
    return context_of(transformer)


def _before(following: FSDPModule, _: nn.Module, __: tuple[object, ...]) -> None:
    _start_to_gather(following)


def _after(previous: FSDPModule, _: nn.Module, __: tuple[object, ...], output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda _: _start_to_gather(previous))


def _start_to_gather(block: FSDPModule) -> None:
    """The host goes on; FSDP2's own hook before a block's pass waits for what is gathered."""
    block.unshard(async_op=True)
