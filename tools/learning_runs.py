"""Train the adapters of one expert under many settings at once, and measure them.

Order, captions, noise and noise levels are functions of (seed, place), as in training, and runs of
one seed have the same but for what their settings change: differences between them are paired.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from tools.learning_choices import Setting, bell
from tools.learning_data import StudyData
from tools.learning_stack import (
    Adapters,
    StackedAdamW,
    StackedLinear,
    fresh_adapters,
    set_adapters,
)
from wan import flow
from wan.transformer import predict_velocity
from wan.variants import VARIANTS, Expert

BATCH = 4
WARMUP_STEPS = 20
BINS, DRAWS = 8, 2  # of the held-out loss: noise bins, and draws of each clip in each
FACTS = VARIANTS["tiny"]

Shape = Literal["videos", "images"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One adapter to be trained."""

    setting: Setting
    seed: int


@dataclass(frozen=True)
class Stage:
    """An expert that takes stacked adapters, and its data; all on one device."""

    expert: Expert
    transformer: WanTransformer3DModel
    linears: dict[str, StackedLinear]
    data: StudyData

    @property
    def sigma_range(self) -> flow.SigmaRange:
        """The expert's own noise levels."""
        return flow.expert_range(FACTS.boundary, self.expert)

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.data.texts.device


@dataclass(frozen=True)
class Samples:
    """What S runs see in one step, run by run: S * n samples."""

    x0: Tensor  # (S * n, C, F, h, w)
    noise: Tensor
    sigma: Tensor  # (S * n,)
    text: Tensor  # (S * n, 512, D)
    weight: Tensor  # (S * n,)


def train_adapters(stage: Stage, runs: Sequence[Run], steps: int, say: Say) -> Adapters:
    """An adapter for each run after so many steps: what it would use, average or live."""
    adapters = fresh_adapters(
        stage.linears,
        [run.setting.rank for run in runs],
        [run_seed(stage, run) for run in runs],
    )
    parameters = adapters.tensors()
    optimizer = StackedAdamW(parameters)
    average = [parameter.detach().clone() for parameter in parameters]
    peaks = torch.tensor([run.setting.learning_rate for run in runs], device=stage.device)
    decays = torch.tensor([run.setting.ema for run in runs], device=stage.device)
    levels = draw_levels(stage, runs, steps * BATCH)
    set_adapters(stage.linears, adapters)
    for step in range(steps):
        losses = errors(stage, draw_samples(stage, runs, levels, step)).view(len(runs), BATCH)
        losses.mean(1).sum().backward()
        optimizer.step(peaks * rate_factor(step, steps))
        follow(average, parameters, decays.clamp(max=(step + 1) / (step + 10)))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            say(f"{stage.expert}: step {step + 1} of {steps}, loss {losses.mean().item():.4f}")
    set_adapters(stage.linears, None)
    linears = list(adapters.a)
    return Adapters(
        dict(zip(linears, average[: len(linears)], strict=True)),
        dict(zip(linears, average[len(linears) :], strict=True)),
    )


@torch.no_grad()
def follow(average: Sequence[Tensor], parameters: Sequence[Tensor], decays: Tensor) -> None:
    """Let averages (S, ...) follow with a decay for each run (S,); 0 copies the live weights."""
    share = (1 - decays).view(-1, 1, 1)
    for mean, parameter in zip(average, parameters, strict=True):
        mean.add_(share * (parameter - mean))


def run_seed(stage: Stage, run: Run) -> int:
    """The seed of one expert's training, as `train.learner` has it."""
    return flow.mix_seed(run.seed, stage.expert)


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine, as the demo has it."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def errors(stage: Stage, samples: Samples) -> Tensor:
    """Weighted mean squared error of the velocity, (S * n,), with the adapters that are set."""
    x = flow.add_noise(samples.x0, samples.noise, samples.sigma)
    predicted = predict_velocity(
        stage.transformer, x, flow.timestep_of(samples.sigma), samples.text
    )
    error = (predicted - flow.velocity(samples.x0, samples.noise)).square()
    return samples.weight * error.mean(dim=(1, 2, 3, 4))


@dataclass(frozen=True)
class Levels:
    """Noise levels and loss weights of all samples of S runs, (S, samples) on the device."""

    sigma: Tensor
    weight: Tensor


def draw_levels(stage: Stage, runs: Sequence[Run], count: int) -> Levels:
    """Those of the first `count` samples of each run."""
    sigmas, weights = [], []
    for run in runs:
        setting = run.setting
        law, drawn = setting.law(), setting.range(stage.sigma_range)
        u = flow.uniforms(run_seed(stage, run), 0, count, setting.low_discrepancy)
        sigmas.append(law.draw(u, drawn))
        weights.append(bell(sigmas[-1], law, drawn) if setting.bell else torch.ones(count))
    return Levels(torch.stack(sigmas).to(stage.device), torch.stack(weights).to(stage.device))


def draw_samples(stage: Stage, runs: Sequence[Run], levels: Levels, place: int) -> Samples:
    """The batches of all runs at a place; what runs of a seed share is drawn once."""
    shape, before = shape_at(place, stage.data)
    latents, rows = getattr(stage.data, shape), getattr(stage.data, f"{shape[:-1]}_texts")
    seeds = list(dict.fromkeys(run_seed(stage, run) for run in runs))
    slots = range(place * BATCH, (place + 1) * BATCH)
    orders = [clips_at(seed, shape, before, len(latents)) for seed in seeds]
    coins = [
        [Random(f"dropout {seed} {place} {slot}").random() for slot in range(BATCH)]
        for seed in seeds
    ]
    noise = [flow.noise_like(latents.shape[1:], seed, slot) for seed in seeds for slot in slots]

    where = torch.tensor([seeds.index(run_seed(stage, run)) for run in runs])  # (S,)
    share = torch.tensor([run.setting.caption_dropout for run in runs], dtype=torch.float64)
    keep = torch.tensor(coins, dtype=torch.float64)[where] >= share[:, None]  # (S, n)
    clips = torch.tensor(orders)[where].flatten().to(stage.device)
    drawn = torch.stack(noise).unflatten(0, (-1, BATCH)).to(stage.device)  # (seeds, n, ...)
    return Samples(
        x0=latents[clips],
        noise=drawn[where.to(stage.device)].flatten(0, 1),
        sigma=levels.sigma[:, slots.start : slots.stop].flatten(),
        text=stage.data.text(rows[clips] * keep.flatten().to(stage.device)),  # row 0: no caption
        weight=levels.weight[:, slots.start : slots.stop].flatten(),
    )


def shape_at(place: int, data: StudyData) -> tuple[Shape, int]:
    """Videos or images at a place, and how many batches of these came before it.

    Mixed evenly by how many batches of each an epoch has, and the same for all runs.
    """
    batches = {name: math.ceil(len(getattr(data, name)) / BATCH) for name in ("videos", "images")}
    share = batches["videos"] / sum(batches.values())
    before = math.floor(place * share)
    if math.floor((place + 1) * share) > before:
        return "videos", before
    return "images", place - before


def clips_at(seed: int, shape: Shape, batch: int, clips: int) -> list[int]:
    """The clips of a run's batch, the `batch`-th of its shape: epoch after epoch, each shuffled."""
    positions = range(batch * BATCH, (batch + 1) * BATCH)
    epochs = {position // clips for position in positions}
    orders = {e: Random(f"order {seed} {shape} {e}").sample(range(clips), clips) for e in epochs}
    return [orders[position // clips][position % clips] for position in positions]


@torch.no_grad()
def heldout_losses(stage: Stage, adapters: Adapters) -> Tensor:
    """Held-out loss (S, bins) of S runs under the demo's law, measured as `train.validate` does.

    Bins are equally probable under that law; the noise is the same for all runs.
    """
    law, clips = Setting().law(), range(len(stage.data.heldout))
    runs = len(next(iter(adapters.a.values())))
    losses = torch.zeros(runs, BINS)
    set_adapters(stage.linears, adapters)
    for clip in clips:
        seed = flow.mix_seed(0, "heldout", stage.expert, clip)
        sigma = law.draw(flow.binned_uniforms(seed, BINS, DRAWS), stage.sigma_range)
        samples = repeated(stage, clip, sigma, noises(stage, seed, BINS * DRAWS), runs)
        losses += errors(stage, samples).view(runs, DRAWS, BINS).mean(1).cpu() / len(clips)
    set_adapters(stage.linears, None)
    return losses


def repeated(stage: Stage, clip: int, sigma: Tensor, noise: Tensor, runs: int) -> Samples:
    """A held-out clip at noise levels (n,) with noise (n, C, F, h, w), the same for each run."""
    count = runs * len(sigma)
    return Samples(
        x0=stage.data.heldout[clip].expand(count, -1, -1, -1, -1),
        noise=noise.to(stage.device).repeat(runs, 1, 1, 1, 1),
        sigma=sigma.to(stage.device).repeat(runs),
        text=stage.data.text(stage.data.heldout_texts[clip].expand(count)),
        weight=torch.ones(count, device=stage.device),
    )


def noises(stage: Stage, seed: int, count: int) -> Tensor:
    """The first `count` noises (n, C, F, h, w) of a seed, in the shape of the held-out clips."""
    shape = stage.data.heldout.shape[1:]
    return torch.stack([flow.noise_like(shape, seed, index) for index in range(count)])
