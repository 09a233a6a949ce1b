"""Sample videos during training, through the full inference pipeline, beside the base model's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from data.buckets import Bucket, Clip
from data.items import Item
from data.media import read_clip
from train.encode import as_video
from train.preview_plan import PreviewPlan, Shot
from train.video_files import side_by_side, write_mp4, write_sheet
from wan.conditioning import (
    Condition,
    channels_condition,
    first_frame_latents,
    image_condition,
)
from wan.experts import Experts
from wan.latents import decode_latents
from wan.sample_settings import SampleSettings
from wan.sampler import sample_latents
from wan.text import pad_text
from wan.variants import Expert, Variant

Progress = Callable[[Iterable[int], str], Iterable[int]]
Say = Callable[[str], None]


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
