"""Held-out loss by expert and noise bin, with the same clips, noise and noise levels every time."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from data.batches import Batch, Draws, EncodedClips, happens, load_batch
from data.buckets import Clip
from train.config import Config
from train.groups import Parts, in_parts
from train.learner import sample_draws, timestep_law
from train.step import NoiseDraw, velocity_error
from wan import flow
from wan.variants import Expert, Variant


@dataclass(frozen=True)
class HeldoutLoss:
    """Loss of one expert on held-out clips: in all, and in each of its noise bins."""

    expert: Expert
    mean: float
    standard_error: float  # of the mean, see `_error_of_mean`
    bins: list[float]
    edges: list[float]  # sigma at the bins' edges, one more than bins
    by_draw: list[float] = field(default_factory=list)  # of each clip and draw, for `change`
    draws: int = 1  # of each clip, beside each other in `by_draw`
    bin_errors: list[float] = field(default_factory=list)  # standard errors of the bins


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


def plan_checks(config: Config, facts: Variant, clips: EncodedClips) -> HeldoutPlan:
    """The measurement that a run's settings mean, on these clips; captions are never dropped."""
    return HeldoutPlan(
        clips=clips,
        given=replace(sample_draws(config, facts, config.seed), caption_dropout=0.0),
        law=timestep_law(config),
        bins=config.eval.bins,
        draws=config.eval.draws,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def fixed_choice(
    plan: HeldoutPlan, clips: EncodedClips, indices: Sequence[int], count: int
) -> HeldoutPlan:
    """The same measurement on `count` of the clips with these indices, or on all of them.

    Which ones is a function of the seed and of their names, whatever their order.
    """
    chosen = [clips.clips[index] for index in indices]
    chosen.sort(key=lambda clip: (flow.mix_seed(plan.seed, "chosen", clip.name), clip.latents))
    return replace(plan, clips=replace(clips, clips=chosen[:count]))


def plan_train_checks(
    plan: HeldoutPlan, encoded: EncodedClips, clips: Sequence[Clip]
) -> HeldoutPlan:
    """The same measurement on as many of the `clips` that are trained on, to compare with.

    None is of a regularisation set, unless all are.
    """
    own = [index for index, clip in enumerate(clips) if not clip.item.regularisation]
    return fixed_choice(plan, encoded, own or range(len(clips)), len(plan.clips))


@torch.no_grad()
def heldout_loss(
    transformer: WanTransformer3DModel,
    expert: Expert,
    facts: Variant,
    plan: HeldoutPlan,
    progress: Progress,
    name: str = "held-out loss",
    parts: Parts | None = None,
) -> HeldoutLoss:
    """Measure one expert. Bins have equal shares of the law: the mean of bins is the law's loss.

    With `parts` the clips are divided among the groups of processes, and all have the same result.
    """
    sigma_range = flow.expert_range(facts.boundary, expert)
    edges = flow.bin_edges(plan.law, sigma_range, plan.bins)
    was_training = transformer.training
    transformer.eval()

    def measured(clip: int) -> Tensor:
        errors = [
            velocity_error(transformer, batch, draw, facts).double().cpu()
            for batch, draw in samples_of(plan, sigma_range, expert, clip)
        ]
        return torch.cat(errors).view(plan.draws, plan.bins)

    told = f"{name}, {expert}"
    losses = in_parts(len(plan.clips), measured, progress, told, parts)  # (clips, draws, bins)
    transformer.train(was_training)
    by_draw = losses.mean(-1).flatten()  # one estimate for each clip and draw
    return HeldoutLoss(
        expert=expert,
        mean=losses.mean().item(),
        standard_error=_error_of_mean(by_draw, plan.draws),
        bins=losses.mean(dim=(0, 1)).tolist(),
        edges=edges.tolist(),
        by_draw=by_draw.tolist(),
        draws=plan.draws,
        bin_errors=[_error_of_mean(part.flatten(), plan.draws) for part in losses.unbind(-1)],
    )


def change(before: HeldoutLoss, after: HeldoutLoss) -> tuple[float, float]:
    """How much a loss changed, and the standard error of that, over clips and draws.

    Clips, noise and levels are the same, so their differences have far less spread than they have
    themselves. The error is infinite if there is one estimate alone, or other clips.
    """
    error = math.inf
    if len(before.by_draw) == len(after.by_draw) > 1:
        pairs = torch.tensor([before.by_draw, after.by_draw], dtype=torch.float64)
        error = _error_of_mean(pairs[1] - pairs[0], after.draws)
    return after.mean - before.mean, error


def _error_of_mean(estimates: Tensor, draws: int) -> float:
    """Standard error of the mean of (clips * draws,) estimates, as of other clips and other noise.

    Draws of a clip share what is hard about it, so each clip's mean is one estimate. The error
    over all draws is a lower bound, for few clips, which may agree by chance. 0 of one estimate.
    """
    of_clips = estimates.view(-1, draws).mean(-1)
    errors = [part.std() / math.sqrt(len(part)) for part in (estimates, of_clips) if len(part) > 1]
    return max(float(error) for error in errors) if errors else 0.0


def samples_of(
    plan: HeldoutPlan, sigma_range: flow.SigmaRange, expert: Expert, clip: int
) -> Iterator[tuple[Batch, NoiseDraw]]:
    """All that is measured on a clip, in batches: draw by draw, and in each bin by bin."""
    whole = _repeated(plan, clip)
    name = plan.clips.clips[clip].name
    draws = _draws(plan, sigma_range, expert, name, whole.latents.shape[1:])
    for start in range(0, len(draws.sigma), plan.batch_size):
        part = slice(start, start + plan.batch_size)
        yield _part(whole, part), NoiseDraw(draws.sigma[part], draws.noise[part])


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
    sigma = plan.law.draw(flow.binned_uniforms(seed, plan.bins, plan.draws), sigma_range)
    noise = torch.stack([flow.noise_like(shape, seed, index) for index in range(count)])
    return NoiseDraw(sigma, noise)
