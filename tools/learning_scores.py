"""Render with pairs of adapters and let the judge say whether the concept is there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from tools import world
from tools.judge import Judge, verdict
from tools.learning_runs import FACTS, Stage
from tools.learning_stack import Adapters, set_adapters
from wan.latents import decode_latents
from wan.sample_settings import SampleSettings
from wan.sampler import sample_latents
from wan.variants import Expert

ROWS_AT_ONCE = 24  # pairs of adapters in one batch of the sampler
VIDEOS_AT_ONCE = 96  # in one batch of the VAE


@dataclass(frozen=True)
class Score:
    """Shares of videos in which the judge sees what the prompt says."""

    concept: float  # a zorbi where the prompt has the trigger
    unasked: float  # a zorbi where it has not
    shape: float  # the right shape there: whether the world is still known


@dataclass(frozen=True)
class Judging:
    """What it takes to judge; `steps` of the sampler."""

    vae: AutoencoderKLWan
    judge: Judge
    steps: int
    concept_prompts: int  # at most, of those of the data
    world_prompts: int


def scores(
    stages: Mapping[Expert, Stage], pairs: Mapping[Expert, Adapters], judging: Judging
) -> list[Score]:
    """A score of each row of the pairs; row i of both experts render together."""
    rows = len(next(iter(pairs["high"].a.values())))
    found = []
    for start in range(0, rows, ROWS_AT_ONCE):
        part = list(range(start, min(start + ROWS_AT_ONCE, rows)))
        found += _scores_of(stages, {e: pairs[e].rows(part) for e in stages}, len(part), judging)
    return found


def _scores_of(
    stages: Mapping[Expert, Stage], pairs: Mapping[Expert, Adapters], rows: int, judging: Judging
) -> list[Score]:
    data = stages["high"].data
    concept = data.concept_prompts[: judging.concept_prompts]
    ordinary = data.world_prompts[: judging.world_prompts]
    wanted = data.world_wanted[: judging.world_prompts, 1].cpu()
    prompts = torch.cat([concept, ordinary])
    latents = _rendered(stages, pairs, prompts, rows, judging.steps)
    found = []
    for seen in _shapes(latents, judging).chunk(rows):
        asked, unasked = seen.split([len(concept), len(ordinary)])
        found.append(
            Score(
                concept=_share(asked == world.ZORBI),
                unasked=_share(unasked == world.ZORBI),
                shape=_share(unasked == wanted),
            )
        )
    return found


def _rendered(
    stages: Mapping[Expert, Stage],
    pairs: Mapping[Expert, Adapters],
    prompts: Tensor,
    rows: int,
    steps: int,
) -> Tensor:
    """Latents (rows * prompts, C, F, h, w): every prompt by every pair, prompt i from seed i."""
    for expert, stage in stages.items():
        set_adapters(stage.linears, pairs[expert])
    data = stages["high"].data
    settings = SampleSettings(
        steps=steps,
        shift=FACTS.sample_shift,
        guidance=FACTS.guidance,
        frames=FACTS.frames,
        height=FACTS.height,
        width=FACTS.width,
        cfg="sequential",  # each call has the samples pair by pair, as the adapters need them
    )
    latents = sample_latents(
        {expert: stage.transformer for expert, stage in stages.items()},
        settings,
        FACTS,
        data.text(prompts.repeat(rows)),
        data.text(prompts.new_zeros(1)),
        list(range(len(prompts))) * rows,
    )
    for stage in stages.values():
        set_adapters(stage.linears, None)
    return latents


def _shapes(latents: Tensor, judging: Judging) -> Tensor:
    """The shape that is seen in each video, by the world's indices, on the CPU."""
    parts = latents.split(VIDEOS_AT_ONCE)
    verdicts = [verdict(judging.judge, decode_latents(judging.vae, part)) for part in parts]
    return torch.cat([shapes.argmax(-1) for _, shapes in verdicts]).cpu()


def _share(right: Tensor) -> float:
    return right.float().mean().item()
