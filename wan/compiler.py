"""PyTorch's compiler: whether there is one for a device, and how our functions are given to it."""

import logging
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

GRAPHS = 64  # of one function: a kind of block, shape, rank or set of adapters makes another

log = logging.getLogger(__name__)


def compiled(run: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled when it is first called with such arguments."""
    # Beyond PyTorch's own limit, 8, it would silently run as it is written.
    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(run, dynamic=False)


@cache
def can_compile(device: torch.device) -> bool:
    """Whether there is a compiler for this device; if not, one warning says what is missing."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 (a missing compiler shows in a dozen ways)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(
            "compile    no compiler works here (%s): blocks run uncompiled, about a third slower. "
            "Install gcc and Triton, or set speed.compile=false to be spared this line",
            reason,
        )
        return False
    return True


def graphs_compiled() -> int:
    """How many graphs the compiler has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
