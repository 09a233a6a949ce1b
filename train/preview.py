"""Sample videos during training, through the full inference pipeline, beside the base model's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from data.buckets import Bucket, Clip
from data.items import DataError, Item, kind_of
from data.media import probe, read_clip
from train.config import PreviewConfig
from train.encode import as_video
from train.few_step import few_step_files
from train.rules import ConfigError
from train.video_files import side_by_side, write_mp4, write_sheet
from wan.conditioning import (
    Condition,
    channels_condition,
    first_frame_latents,
    image_condition,
)
from wan.experts import Experts
from wan.latents import decode_latents
from wan.sampler import SampleSettings, distilled, sample_latents
from wan.text import pad_text
from wan.variants import Expert, Guidance, Variant


@dataclass(frozen=True)
class Shot:
    """One video to render: what, and from which noise."""

    prompt: str
    seed: int
    image: Path | None = None  # its first frame


@dataclass(frozen=True)
class PreviewPlan:
    """What is rendered at each preview, and how."""

    shots: list[Shot]
    settings: SampleSettings
    negative_prompt: str
    batch_size: int
    few_step: Mapping[Expert, Path] = field(default_factory=dict)  # distilled adapters beside ours

    @property
    def texts(self) -> list[str]:
        """Everything that must be encoded for it."""
        return [*(shot.prompt for shot in self.shots), self.negative_prompt]


Progress = Callable[[Iterable[int], str], Iterable[int]]
Say = Callable[[str], None]


def plan_previews(preview: PreviewConfig, facts: Variant, batch_size: int) -> PreviewPlan:
    """The configured prompts and seeds, and the variant's values for what is not configured.

    `ConfigError` if the size is none that the model can make, or a file cannot be used.
    """
    settings = SampleSettings(
        steps=preview.steps or facts.sample_steps,
        shift=preview.shift or facts.sample_shift,
        guidance=Guidance(
            low=facts.guidance.low if preview.guidance_low is None else preview.guidance_low,
            high=facts.guidance.high if preview.guidance_high is None else preview.guidance_high,
        ),
        frames=preview.frames or facts.frames,
        height=preview.height or facts.height,
        width=preview.width or facts.width,
    )
    try:
        facts.geometry.latent_shape(settings.frames, settings.height, settings.width)
    except ValueError as error:
        raise ConfigError(
            f"preview.frames={settings.frames}, preview.height={settings.height}, "
            f"preview.width={settings.width}: {error}"
        ) from error
    negative = preview.negative_prompt
    images = [Path(image) for image in preview.images] or [None] * len(preview.prompts)
    for image in images:
        if image is not None:
            _check_image(image)
    few_step = few_step_files(preview.distilled, facts)
    return PreviewPlan(
        shots=[
            Shot(prompt, seed, image)
            for prompt, image in zip(preview.prompts, images, strict=True)
            for seed in preview.seeds
        ],
        settings=distilled(settings) if few_step else settings,
        negative_prompt=facts.negative_prompt if negative is None else negative,
        batch_size=batch_size,
        few_step=few_step,
    )


def render(
    plan: PreviewPlan,
    facts: Variant,
    experts: Experts,
    vae: AutoencoderKLWan,
    text: Mapping[str, Tensor],
    progress: Progress,
    say: Say,
) -> list[np.ndarray]:
    """The videos of the plan's shots, uint8 (T, H, W, 3) each; the models are left as they were.

    When memory runs out, they are made again one at a time, with guidance in two passes, and `say`
    is told; decoding falls back to tiles by itself. `torch.OutOfMemoryError` if that is too much.
    """
    was_training: dict[Expert, bool] = {expert: experts[expert].training for expert in experts}
    for expert in experts:
        experts[expert].eval()
    try:
        try:
            return _render(plan, facts, experts, vae, text, progress, say)
        except torch.OutOfMemoryError:
            if plan.batch_size == 1 and plan.settings.cfg == "sequential":
                raise
        torch.cuda.empty_cache()  # what the attempt held is free once its error is gone
        say(
            "rendering  not enough memory: samples are made one at a time, with guidance in two "
            "passes, which takes longer and changes them by rounding alone"
        )
        small = replace(plan, batch_size=1, settings=replace(plan.settings, cfg="sequential"))
        return _render(small, facts, experts, vae, text, progress, say)
    finally:
        for expert, training in was_training.items():
            experts[expert].train(training)


def _render(
    plan: PreviewPlan,
    facts: Variant,
    experts: Experts,
    vae: AutoencoderKLWan,
    text: Mapping[str, Tensor],
    progress: Progress,
    say: Say,
) -> list[np.ndarray]:
    device = vae.device
    negative = pad_text([text[plan.negative_prompt]], facts.text_len).to(device)
    videos = []
    starts = range(0, len(plan.shots), plan.batch_size)
    for start in progress(starts, "rendering samples"):
        shots = plan.shots[start : start + plan.batch_size]
        prompts = pad_text([text[shot.prompt] for shot in shots], facts.text_len).to(device)
        seeds = [shot.seed for shot in shots]
        condition = _condition(shots, plan.settings, facts, vae)
        latents = sample_latents(experts, plan.settings, facts, prompts, negative, seeds, condition)
        for row in latents:
            video = decode_latents(vae, row[None], say=say)[0]  # (3, T, H, W) in [-1, 1]
            levels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            videos.append(levels.permute(1, 2, 3, 0).cpu().numpy())
    return videos


def _check_image(image: Path) -> None:
    """`ConfigError` unless this is an image that can be decoded."""
    if kind_of(image) != "image":
        raise ConfigError(f"preview.images: {image} is no image; give a .png, .jpg or .webp")
    if not image.is_file():
        raise ConfigError(f"preview.images: {image} does not exist; give an image")
    try:
        probe(image, "image", str(image))
    except DataError as problem:
        raise ConfigError(f"preview.images: {problem}") from problem


def _condition(
    shots: Sequence[Shot], settings: SampleSettings, facts: Variant, vae: AutoencoderKLWan
) -> Condition:
    """The first frames of the shots as the model takes them, at the size of the video."""
    if not all(shot.image for shot in shots):
        return Condition()
    pictures = [_picture(shot, settings) for shot in shots]
    images = torch.cat([as_video(picture)[:, :, 0] for picture in pictures])  # (B, 3, H, W)
    if facts.conditioning == "first_frame":
        return Condition(first_frame=first_frame_latents(vae, images))
    latents = image_condition(vae, images, None, settings.frames)
    return Condition(channels=channels_condition(latents, last=False))


def _picture(shot: Shot, settings: SampleSettings) -> Tensor:
    """The image of a shot at the size of its video: uint8 (1, H, W, 3)."""
    assert shot.image is not None
    bucket = Bucket(1, settings.height, settings.width)
    item = Item(shot.image, ("",), "image", str(shot.image))
    return read_clip(Clip(item, bucket, 0.0, 0.0, "keep"))


def _still(shot: Shot, settings: SampleSettings) -> np.ndarray:
    """The image of a shot as a video (T, H, W, 3) in which nothing moves."""
    return np.repeat(_picture(shot, settings).numpy(), settings.frames, axis=0)


def save_samples(
    folder: Path,
    plan: PreviewPlan,
    base: Sequence[np.ndarray],
    adapted: Sequence[np.ndarray],
    fps: int,
    alone: Mapping[Expert, Sequence[np.ndarray]],
) -> list[Path]:
    """Write each adapted video, its side-by-side with the base's, and one sheet of all of them.

    With videos by each adapter `alone`, these too, and a grid of the four. Returns the
    side-by-sides, or the grids, in the order of the shots.
    """
    columns: dict[str, Sequence[np.ndarray]] = {}
    if plan.shots[0].image is not None:
        columns["input image"] = [_still(shot, plan.settings) for shot in plan.shots]
    columns |= {"base": base, **{f"{e} only": videos for e, videos in alone.items()}}
    columns["both" if alone else "adapters"] = adapted
    rows = [
        (f"{shot.prompt} (seed {shot.seed})", list(videos))
        for shot, *videos in zip(plan.shots, *columns.values(), strict=True)
    ]
    write_sheet(folder / "sheet.png", rows, list(columns))
    compared = []
    for index, (_, videos) in enumerate(rows):
        two = folder / f"{index:02d}_base_and_adapters.mp4"
        write_mp4(folder / f"{index:02d}_adapters.mp4", adapted[index], fps)
        write_mp4(two, side_by_side([base[index], adapted[index]], ["base", "adapters"]), fps)
        for expert in alone:
            write_mp4(folder / f"{index:02d}_{expert}_only.mp4", alone[expert][index], fps)
        if alone:
            write_mp4(folder / f"{index:02d}_grid.mp4", side_by_side(videos, list(columns)), fps)
        compared.append(folder / f"{index:02d}_grid.mp4" if alone else two)
    return compared
