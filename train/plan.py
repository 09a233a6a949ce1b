"""What a run will take, told before any weight is read: memory in each phase, time and money.

Everything is predicted by `wan/footprint.py` and `wan/cards.py` from the settings, the clips and
the headers of weight files; `docs/plan.md` has how far off that was where it was measured.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import cast

import torch
from omegaconf import OmegaConf

from data.buckets import Clip
from data.shapes import Bucket
from train.compose import CONF, trained_experts
from train.config import Config, SpeedConfig
from train.dataset import Progress, check_sides, plan_dataset
from train.encode import model_paths
from train.preview_plan import plan_previews
from train.run import Checked
from wan import cards
from wan.cards import Card
from wan.checkpoints import find_model
from wan.footprint import (
    BESIDE,
    CONTEXT,
    GIB,
    TRAINED,
    ExpertWeights,
    Load,
    activation_budget,
    activation_bytes,
    chosen_keep,
    decode_bytes,
    encode_bytes,
    expert_weights,
    host_bytes,
    resting_bytes,
    sample_bytes,
    tokens_of,
    waiting_bytes,
)
from wan.memory import MARGIN, Auto
from wan.speed_choices import FrozenFormat, InputPlace, Keep
from wan.variants import VARIANTS, Variant
from wan.weights import parameter_count

HOUR = 3600.0


@dataclass(frozen=True)
class Work:
    """A training step on one shape, or what it would be with other settings."""

    bucket: Bucket
    keep: tuple[Keep, ...]
    peak: float  # bytes on the device
    seconds: float  # a forward and backward pass of one batch
    waiting: int = 0  # bytes of blocks' inputs in host memory


@dataclass(frozen=True)
class Setting:
    """A run's settings on a card: what its predictions are made from."""

    config: Config
    facts: Variant
    card: Card
    experts: tuple[ExpertWeights, ...]
    measured: Mapping[Bucket, float] = field(default_factory=dict)  # seconds of a pass, on a shape

    @property
    def resting(self) -> float:
        """Bytes of frozen weights on the card at once."""
        return resting_bytes(self.experts, self.config.speed.placement)

    @property
    def trained(self) -> int:
        """Bytes of all adapters in fp32; those of both experts stay on the card."""
        ranks = [attrgetter(f"{e}.rank")(self.config) for e in trained_experts(self.config)]
        return 4 * sum(cards.adapter_numbers(self.facts.transformer, rank) for rank in ranks)

    @property
    def usable(self) -> float:
        """Bytes of the card that a step may fill."""
        return (1 - MARGIN) * self.card.gib * GIB - CONTEXT


def look_up(config: Config, progress: Progress) -> Checked:
    """Files and clips of a run, as `train.lora.check` finds them, whatever this machine can do."""
    facts = VARIANTS[config.model.variant]
    model = find_model(model_paths(config.model), facts.name)
    clips = plan_dataset(config.data, facts, progress)
    check_sides(clips, config.data)
    previews = plan_previews(config.preview, facts, config.batch_size)
    return Checked(config, facts, model, clips, previews, starts={})


def setting_of(checked: Checked, card: Card, speed: SpeedConfig | None = None) -> Setting:
    """The settings of a run on a card, or with another preset of `conf/speed`."""
    config = checked.config if speed is None else replace(checked.config, speed=speed)
    frozen = cast("FrozenFormat | None", config.speed.frozen)
    dtype = getattr(torch, config.model.dtype)
    parts = [checked.model.parts[expert] for expert in checked.facts.experts]
    experts = tuple(expert_weights(part, dtype, frozen) for part in parts)
    return Setting(config, checked.facts, card, experts)


def load_of(setting: Setting, bucket: Bucket, batch: int | None = None) -> Load:
    """What a batch of a shape is to the transformer."""
    config, facts = setting.config, setting.facts
    latents = facts.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
    return Load(
        facts=facts.transformer,
        tokens=tokens_of(latents),
        batch=batch or config.batch_size,
        rank=max(attrgetter(f"{e}.rank")(config) for e in trained_experts(config)),
        frozen=cast("FrozenFormat | None", config.speed.frozen),
        compiled=config.speed.compile is not False,
        processes=config.speed.context,
        inputs=cast("InputPlace", config.speed.inputs),
    )


def largest_bucket(checked: Checked) -> Bucket:
    """The shape of most pixels, of all that is trained or measured on."""
    clips = [*checked.clips.train, *checked.clips.heldout]
    return max((clip.bucket for clip in clips), key=lambda b: b.frames * b.height * b.width)


def training(setting: Setting, buckets: Sequence[Bucket]) -> list[Work]:
    """A step on each shape; what blocks keep is chosen once, for the largest.

    Times are predicted, but for those that `setting` holds measured.
    """
    loads = {bucket: load_of(setting, bucket) for bucket in buckets}
    largest = max(loads.values(), key=lambda load: load.tokens)
    budget = activation_budget(setting.card.gib * GIB, setting.resting, setting.trained)
    wanted = cast("Keep | Auto", setting.config.speed.keep)
    keep = chosen_keep(largest, wanted, setting.facts.transformer.layers, budget)
    streamed = setting.experts[0] if setting.config.speed.placement == "stream" else None
    resting = setting.resting + TRAINED // 4 * setting.trained + BESIDE
    works = [
        Work(
            bucket=bucket,
            keep=keep,
            peak=resting + activation_bytes(load, keep),
            seconds=cards.step_seconds(load, keep, setting.card, streamed),
            waiting=waiting_bytes(load, keep),
        )
        for bucket, load in loads.items()
    ]
    return as_measured(works, setting.measured)


def in_host_memory(setting: Setting, works: Sequence[Work]) -> int:
    """Bytes locked there: weights that wait, and the inputs of blocks at the largest shape."""
    weights = host_bytes(setting.experts, setting.config.speed.placement)
    return weights + max(work.waiting for work in works)


def as_measured(works: Sequence[Work], measured: Mapping[Bucket, float]) -> list[Work]:
    """The same with times that were measured; those of other shapes are scaled as these are."""
    ratios = [measured[work.bucket] / work.seconds for work in works if work.bucket in measured]
    ratio = median(ratios) if ratios else 1.0
    return [
        replace(work, seconds=measured.get(work.bucket, ratio * work.seconds)) for work in works
    ]


def caching_bytes(setting: Setting, checked: Checked, largest: Bucket) -> float:
    """Most of the VAE on the largest clip, and of the text encoder after it."""
    size = (largest.frames, largest.height, largest.width)
    itemsize = getattr(torch, setting.config.data.vae_dtype).itemsize
    text = parameter_count(checked.model.parts["text_encoder"])
    text_bytes = text * getattr(torch, setting.config.model.dtype).itemsize
    return max(encode_bytes(*size, checked.model.parts["vae"], itemsize), text_bytes)


def sampling_bytes(setting: Setting, checked: Checked) -> float:
    """Most while a preview is rendered and decoded; 0 if there is none."""
    if not checked.previews.shots:
        return 0
    settings = checked.previews.settings
    size = (settings.frames, settings.height, settings.width)
    load = load_of(setting, Bucket(*size))
    rendering = sample_bytes(load, is_guided(checked))
    decoding = decode_bytes(*size, checked.model.parts["vae"])
    resting = setting.resting + TRAINED // 4 * setting.trained + BESIDE
    return resting + max(rendering, decoding)


def is_guided(checked: Checked) -> bool:
    """Whether a sample takes two passes a step."""
    guidance = checked.previews.settings.guidance
    return max(guidance.high, guidance.low) > 1


@dataclass(frozen=True)
class Hours:
    """How long a run is at what."""

    training: float
    sampling: float
    measuring: float
    caching: float
    swapping: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.sampling + self.measuring + self.caching + self.swapping


def hours(setting: Setting, checked: Checked) -> Hours:
    """Of the whole run, both experts; the cache is taken to be empty."""
    config, card = setting.config, setting.card
    clips = checked.clips.train
    works = {work.bucket: work for work in training(setting, buckets_of(clips))}
    visits = sum(clip.item.visits for clip in clips)
    step = sum(works[clip.bucket].seconds * clip.item.visits for clip in clips) / visits
    steps = total_steps(config)
    streamed = setting.experts[0] if config.speed.placement == "stream" else None
    swaps = 0.0
    if config.speed.placement == "swap" and len(setting.experts) == 2:
        swaps = steps / config.turn_steps * setting.experts[0].whole / (1e9 * card.link)
    both = [*clips, *checked.clips.heldout]
    encoded = sum(
        cards.video_seconds(c.bucket.frames, c.bucket.height, c.bucket.width, card, cards.ENCODED)
        for c in both
    )
    return Hours(
        training=steps * config.accumulate * step / HOUR,
        sampling=_sampling_seconds(setting, checked, streamed) / HOUR,
        measuring=_measuring_seconds(setting, checked, streamed) / HOUR,
        caching=encoded * (2 if setting.facts.conditioning == "channels" else 1) / HOUR,
        swapping=swaps / HOUR,
    )


def total_steps(config: Config) -> int:
    """Optimizer steps of all experts."""
    return sum(attrgetter(f"{expert}.steps")(config) for expert in trained_experts(config))


def buckets_of(clips: Sequence[Clip]) -> list[Bucket]:
    """The shapes that occur, the most frequent first."""
    return [bucket for bucket, _ in Counter(clip.bucket for clip in clips).most_common()]


def _times_due(every: int, total: int) -> int:
    """How often something is done that is done before, after, and every so many steps."""
    between = (total - 1) // every if every else 0
    return 2 + between


def _sampling_seconds(setting: Setting, checked: Checked, streamed: ExpertWeights | None) -> float:
    previews, settings = checked.previews, checked.previews.settings
    if not previews.shots:
        return 0
    size = (settings.frames, settings.height, settings.width)
    passes = settings.steps * (2 if is_guided(checked) else 1)
    load = load_of(setting, Bucket(*size), batch=1)
    video = passes * cards.forward_seconds(load, setting.card, streamed)
    video += cards.video_seconds(*size, setting.card, cards.DECODED)
    times = _times_due(setting.config.preview.every, total_steps(setting.config))
    grids = 2 * (times - 1) if setting.config.preview.grid else 0
    return (times + grids) * len(previews.shots) * video


def _measuring_seconds(setting: Setting, checked: Checked, streamed: ExpertWeights | None) -> float:
    """Held-out clips and as many of those that are trained on, for each expert."""
    config, heldout = setting.config, checked.clips.heldout
    seconds = sum(
        cards.forward_seconds(load_of(setting, clip.bucket, batch=1), setting.card, streamed)
        for clip in heldout
    )
    times = _times_due(config.eval.every, total_steps(config)) * len(trained_experts(config))
    return 2 * times * config.eval.bins * config.eval.draws * seconds


@dataclass(frozen=True)
class Choice:
    """A preset of `conf/speed` on a card."""

    name: str
    peak: float  # bytes, of training: samples make do with less
    host: float  # bytes
    seconds: float  # of a step on the most frequent shape
    fits: bool
    rounds: bool  # frozen weights are in fewer bits than the run has them in


def choices(checked: Checked, card: Card) -> list[Choice]:
    """All presets, the fastest that fit first."""
    found = []
    for file in sorted((CONF / "speed").glob("*.yaml")):
        setting = setting_of(checked, card, _preset(file))
        works = training(setting, buckets_of(checked.clips.train))
        peak = max(work.peak for work in works)
        host = in_host_memory(setting, works)
        rounds = setting.config.speed.frozen is not None
        fits = peak <= setting.usable
        found.append(Choice(file.stem, peak, host, works[0].seconds, fits, rounds))
    return sorted(found, key=lambda choice: (not choice.fits, choice.seconds))


def _preset(file: Path) -> SpeedConfig:
    merged = OmegaConf.merge(OmegaConf.structured(SpeedConfig), OmegaConf.load(file))
    return cast("SpeedConfig", OmegaConf.to_object(merged))
