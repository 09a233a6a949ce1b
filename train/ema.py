"""An exponential average of each expert's adapter over its steps, which is calmer than the last."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

WARM_UP = 10  # steps: until the average is longer than this, it forgets its start faster


@dataclass
class Average:
    """The average of an adapter."""

    parameters: list[nn.Parameter]  # that it follows
    values: dict[str, Tensor]  # by names of the adapter's state, in the same order
    decay: float
    shown: bool = False  # the parameters are the average just now


def decay_at(step: int, decay: float) -> float:
    """The decay of the update after `step` (from 0): an average of the steps so far, at first.

    A decay of 0.999 alone would keep a third of the untrained adapter for a thousand steps.
    """
    return min(decay, (step + 1) / (step + WARM_UP))


def start_average(parameters: Mapping[str, nn.Parameter], decay: float) -> Average:
    """An average of one value each: what the parameters are now."""
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Average(list(parameters.values()), values, decay)


def follow_adapter(average: Average, step: int) -> None:
    """Move the average towards the adapter, after the optimizer's step."""
    follow = get_ema_multi_avg_fn(decay_at(step, average.decay))
    follow(list(average.values.values()), [p.detach() for p in average.parameters], 0)


@contextmanager
@torch.no_grad()
def averaged(average: Average | None) -> Iterator[None]:
    """Within the block the adapter is its average, if it has one; afterwards what it was.

    It is that to the bit. Nothing changes in a block within such a block.
    """
    if average is None or average.shown:
        yield
        return
    trained = [parameter.detach().clone() for parameter in average.parameters]
    average.shown = True
    try:
        for parameter, value in zip(average.parameters, average.values.values(), strict=True):
            parameter.copy_(value)
        yield
    finally:
        for parameter, own in zip(average.parameters, trained, strict=True):
            parameter.data.copy_(own)
        average.shown = False
