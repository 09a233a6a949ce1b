"""How much low-discrepancy draws of noise levels calm a gradient and a measurement.

One adapter, trained and then held fixed, is looked at from many places: rows of the stack are the
same adapter, each with a seed of its own, so one backward pass gives as many gradients. Clips,
captions and noise of a row are the same with both ways of drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.learning_choices import Setting
from tools.learning_runs import (
    BATCH,
    BINS,
    DRAWS,
    Run,
    Stage,
    draw_levels,
    draw_samples,
    errors,
    noises,
    repeated,
)
from tools.learning_stack import Adapters, set_adapters
from wan import flow

CLIPS = 8  # held-out clips at most


@dataclass(frozen=True)
class Repeats:
    """How variances are estimated."""

    count: int  # rows of the stack
    batches: int  # that are averaged in the longer of two windows; the shorter is one
    seed: int


@dataclass(frozen=True)
class Spread:
    """Variances over the repeats, for each way of drawing noise levels."""

    windows: list[int]  # batches that are averaged: one, and as many as a few steps have
    gradient: list[list[float]]  # low-discrepancy, random: |g - mean|^2 / |mean|^2 of each window
    loss: list[list[float]]  # low-discrepancy, random: of the mean training loss of each window
    heldout: list[float]  # of the held-out loss: one in each bin, low-discrepancy, random


def spread(stage: Stage, adapters: Adapters, row: int, repeats: Repeats) -> Spread:
    """Measure with the adapter in one row of a stack."""
    fixed = adapters.rows([row] * repeats.count)
    for tensor in fixed.tensors():
        tensor.requires_grad_()
    set_adapters(stage.linears, fixed)
    ways = [_training(stage, fixed, repeats, even) for even in (True, False)]
    measured = _heldout(stage, repeats)
    set_adapters(stage.linears, None)
    return Spread(
        [1, repeats.batches], [way[0] for way in ways], [way[1] for way in ways], measured
    )


def _training(
    stage: Stage, adapters: Adapters, repeats: Repeats, even: bool
) -> tuple[list[float], list[float]]:
    """Relative variance of the gradient, and variance of the loss, of each window."""
    setting = replace(Setting(), low_discrepancy=even)
    runs = [Run(setting, flow.mix_seed(repeats.seed, "spread", n)) for n in range(repeats.count)]
    levels = draw_levels(stage, runs, repeats.batches * BATCH)
    losses: list[Tensor] = []
    gradient, loss = [], []
    for place in range(repeats.batches):
        found = (
            errors(stage, draw_samples(stage, runs, levels, place))
            .view(repeats.count, BATCH)
            .mean(1)
        )
        found.sum().backward()
        losses.append(found.detach())
        if place + 1 in (1, repeats.batches):
            gradient.append(relative_variance(_gradients(adapters)))
            loss.append(torch.stack(losses).mean(0).var().item())
    for tensor in adapters.tensors():
        tensor.grad = None
    return gradient, loss


def _gradients(adapters: Adapters) -> list[Tensor]:
    return [tensor.grad for tensor in adapters.tensors() if tensor.grad is not None]


def relative_variance(gradients: Sequence[Tensor]) -> float:
    """E |g - mean|^2 / |E g|^2 over the rows of stacked gradients (K, ...), without bias.

    |mean of K|^2 is too large by 1/K of the variance.
    """
    rows = gradients[0].shape[0]
    variance = sum(g.var(0).sum().item() for g in gradients)
    squared_mean = sum(g.mean(0).square().sum().item() for g in gradients) - variance / rows
    return variance / squared_mean if squared_mean > 0 else float("inf")


@torch.no_grad()
def _heldout(stage: Stage, repeats: Repeats) -> list[float]:
    """Variance of the held-out loss when all its draws are others, drawn in each way."""
    law, count = Setting().law(), BINS * DRAWS
    ways = (
        lambda s, _: flow.binned_uniforms(s, BINS, DRAWS),
        lambda s, n: flow.uniforms(s, 0, n, low_discrepancy=True),
        lambda s, n: flow.uniforms(s, 0, n, low_discrepancy=False),
    )
    clips = min(CLIPS, len(stage.data.heldout))
    totals = torch.zeros(len(ways), repeats.count)
    for clip in range(clips):
        seeds = [flow.mix_seed(repeats.seed, "spread", n, clip) for n in range(repeats.count)]
        noise = torch.cat([noises(stage, s, count) for s in seeds])
        for total, uniforms in zip(totals, ways, strict=True):
            sigma = [law.draw(uniforms(s, count), stage.sigma_range) for s in seeds]
            found = errors(stage, repeated(stage, clip, torch.cat(sigma), noise, 1))
            total += found.view(repeats.count, count).mean(1).cpu() / clips
    return totals.var(1).tolist()
