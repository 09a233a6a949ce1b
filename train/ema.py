"""An exponential average of each expert's adapter over its steps, which is calmer than the last."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from train.learner import Learner

WARM_UP = 10  # steps: until the average is longer than this, it forgets its start faster


def decay_at(step: int, decay: float) -> float:
    """The decay of the update after `step` (from 0): an average of the steps so far, at first.

    A decay of 0.999 alone would keep a third of the untrained adapter for a thousand steps.
    """
    return min(decay, (step + 1) / (step + WARM_UP))


def update(learner: "Learner", step: int) -> None:
    """Let the average follow the adapter, after the optimizer's step; nothing without one."""
    if learner.ema is not None:
        follow = get_ema_multi_avg_fn(decay_at(step, learner.ema_decay))
        follow(list(learner.ema.values()), [p.detach() for p in learner.parameters], 0)


@contextmanager
@torch.no_grad()
def averaged(learner: "Learner") -> Iterator[None]:
    """Within the block the adapter is its average, if it has one; afterwards what it was.

    It is that to the bit. Nothing changes in a block within such a block.
    """
    if learner.ema is None or learner.shows_ema:
        yield
        return
    trained = [parameter.detach().clone() for parameter in learner.parameters]
    learner.shows_ema = True
    try:
        for parameter, average in zip(learner.parameters, learner.ema.values(), strict=True):
            parameter.copy_(average)
        yield
    finally:
        for parameter, own in zip(learner.parameters, trained, strict=True):
            parameter.data.copy_(own)
        learner.shows_ema = False
