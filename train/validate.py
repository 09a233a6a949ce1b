"""Held-out loss by expert and noise bin, with the same clips, noise and noise levels every time."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from data.cache import load_latents, load_text
from train.dataset import CachedClips
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

    clips: CachedClips
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
    losses = torch.zeros(len(plan.clips.latents), plan.draws, plan.bins, dtype=torch.float64)
    for clip in progress(range(len(losses)), f"held-out loss, {expert}"):
        latents = load_latents(plan.clips.latents[clip])  # (C, F, h, w)
        text = load_text(plan.clips.text[clip])
        draws = _draws(plan, sigma_range, expert, plan.clips.names[clip], latents)
        errors = []
        for start in range(0, len(draws.sigma), plan.batch_size):
            part = slice(start, start + plan.batch_size)
            draw = NoiseDraw(draws.sigma[part], draws.noise[part])
            count = len(draw.sigma)
            batch = latents.expand(count, *latents.shape)
            error = velocity_error(transformer, batch, [text] * count, draw, facts.text_len)
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


def _draws(
    plan: HeldoutPlan, sigma_range: flow.SigmaRange, expert: Expert, clip: str, latents: Tensor
) -> NoiseDraw:
    """draws x bins noise levels, one in each bin at a place of its own, and their noise."""
    count = plan.draws * plan.bins
    seed = flow.mix_seed(plan.seed, "heldout", expert, clip)
    within = flow.uniforms(seed, 0, count, low_discrepancy=True)
    position = torch.arange(count) % plan.bins
    sigma = plan.law.draw((position + within) / plan.bins, sigma_range)
    noise = torch.stack([flow.noise_like(latents.shape, seed, index) for index in range(count)])
    return NoiseDraw(sigma, noise)
