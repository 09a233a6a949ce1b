"""Held-out loss by expert and noise bin, with the same clips, noise and noise levels every time."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from data.batches import Batch, Draws, EncodedClips, happens, load_batch
from train.step import NoiseDraw, velocity_error
from wan import flow
from wan.variants import Expert, Variant


@dataclass(frozen=True)
class HeldoutLoss:
    """Loss of one expert on held-out clips: in all, and in each of its noise bins."""

    expert: Expert
    mean: float
    standard_error: float  # of the mean, over clips and draws
    bins: list[float]
    edges: list[float]  # sigma at the bins' edges, one more than bins


@dataclass(frozen=True)
class HeldoutPlan:
    """What is measured: every clip, in every bin, with so many draws of noise."""

    clips: EncodedClips
    given: Draws  # what the model is given beside the noise
    law: flow.TimestepLaw
    bins: int
    draws: int
    batch_size: int
    seed: int


Progress = Callable[[Iterable[int], str], Iterable[int]]


@torch.no_grad()
def heldout_loss(
    transformer: WanTransformer3DModel,
    expert: Expert,
    facts: Variant,
    plan: HeldoutPlan,
    progress: Progress,
) -> HeldoutLoss:
    """Measure one expert. Bins have equal shares of the law: the mean of bins is the law's loss."""
    sigma_range = flow.expert_range(facts.boundary, expert)
    edges = flow.bin_edges(plan.law, sigma_range, plan.bins)
    was_training = transformer.training
    transformer.eval()
    losses = torch.zeros(len(plan.clips), plan.draws, plan.bins, dtype=torch.float64)
    for clip in progress(range(len(losses)), f"held-out loss, {expert}"):
        batch = _repeated(plan, clip)
        name = plan.clips.clips[clip].name
        draws = _draws(plan, sigma_range, expert, name, batch.latents.shape[1:])
        errors = []
        for start in range(0, len(draws.sigma), plan.batch_size):
            part = slice(start, start + plan.batch_size)
            draw = NoiseDraw(draws.sigma[part], draws.noise[part])
            error = velocity_error(transformer, _part(batch, part), draw, facts)
            errors.append(error.double().cpu())
        losses[clip] = torch.cat(errors).view(plan.draws, plan.bins)
    transformer.train(was_training)
    by_draw = losses.mean(-1).flatten()  # one estimate for each clip and draw
    return HeldoutLoss(
        expert=expert,
        mean=losses.mean().item(),
        standard_error=(by_draw.std() / math.sqrt(len(by_draw))).item()
        if len(by_draw) > 1
        else 0.0,
        bins=losses.mean(dim=(0, 1)).tolist(),
        edges=edges.tolist(),
    )


def _repeated(plan: HeldoutPlan, clip: int) -> Batch:
    """A clip draws x bins times, given the same each time, whatever clips are beside it."""
    count = plan.draws * plan.bins
    place = flow.mix_seed("heldout", plan.clips.clips[clip].name)
    one = load_batch(plan.clips, [clip], plan.given, place)
    first = [
        happens(plan.given.seed, "first", place, slot, plan.given.first_frame)
        for slot in range(count)
    ]
    return Batch(
        clips=one.clips * count,
        latents=one.latents.expand(count, *one.latents.shape[1:]),
        text=one.text * count,
        mask=None if one.mask is None else one.mask.expand(count, *one.mask.shape[1:]),
        loss_weight=one.loss_weight.expand(count),
        condition=None
        if one.condition is None
        else one.condition.expand(count, *one.condition.shape[1:]),
        first_given=torch.tensor(first),
        last_given=one.last_given.expand(count),
    )


def _part(batch: Batch, part: slice) -> Batch:
    """Some of the samples of a batch."""
    return Batch(
        clips=batch.clips[part],
        latents=batch.latents[part],
        text=batch.text[part],
        mask=None if batch.mask is None else batch.mask[part],
        loss_weight=batch.loss_weight[part],
        condition=None if batch.condition is None else batch.condition[part],
        first_given=batch.first_given[part],
        last_given=batch.last_given[part],
    )


def _draws(
    plan: HeldoutPlan,
    sigma_range: flow.SigmaRange,
    expert: Expert,
    clip: str,
    shape: torch.Size,
) -> NoiseDraw:
    """draws x bins noise levels, one in each bin at a place of its own, and their noise."""
    count = plan.draws * plan.bins
    seed = flow.mix_seed(plan.seed, "heldout", expert, clip)
    within = flow.uniforms(seed, 0, count, low_discrepancy=True)
    position = torch.arange(count) % plan.bins
    sigma = plan.law.draw((position + within) / plan.bins, sigma_range)
    noise = torch.stack([flow.noise_like(shape, seed, index) for index in range(count)])
    return NoiseDraw(sigma, noise)
