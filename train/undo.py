"""An update that is broken off by full memory is as if it had not begun.

Which of its tensors an optimizer has changed by then is known to itself alone, so they are copied
first: into the room that the activations of the step have left, which is more. PyTorch's fused
optimizers take no memory once theirs is made, so that a copy would be a waste.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def takes_no_memory(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step writes into what is there already and makes nothing new."""
    return bool(optimizer.state) and bool(optimizer.defaults.get("fused"))


@contextmanager
def undone_if_memory_is_full(
    optimizer: torch.optim.Optimizer, others: Sequence[Tensor]
) -> Iterator[None]:
    """After a `torch.OutOfMemoryError` within the block all is to the bit what it was before.

    That is the optimizer, its parameters, and the `others` that are changed in place. Nothing is
    undone of an optimizer that takes no memory.
    """
    if takes_no_memory(optimizer):
        yield
        return
    groups = [dict(group) for group in optimizer.param_groups]
    state = {parameter: dict(of_one) for parameter, of_one in optimizer.state.items()}
    tensors = [parameter.detach() for group in groups for parameter in group["params"]]
    kept = [value for named in [*groups, *state.values()] for value in named.values()]
    tensors += [value for value in kept if isinstance(value, Tensor)]
    tensors += others
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    except torch.OutOfMemoryError:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        raise
