"""Clips as small pictures: first, middle and last frame, made by worker processes.

A clip is decoded, resized and cropped by `data.media`, as for the model, and only then made small.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log10

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from data.buckets import Clip
from data.files import Progress
from data.items import DataError
from data.media import read_clip
from data.workers import map_in_workers
from tools.near_duplicates import LOOK_SIZE, look_of
from train.encode import as_video
from wan.latents import decode_latents, encode_video

HEIGHT = 112  # pixels of a small frame
QUALITY = 60  # of WebP: 2 to 8 KB for three frames
GAP = 2  # transparent pixels between two frames


@dataclass(frozen=True)
class Shot:
    """A clip at a glance: WebP `strips` of its frames as given, and as the VAE gives them back.

    A file that was probed and yet cannot be decoded has no strip, but a `problem`.
    """

    clip: Clip
    strips: tuple[bytes, ...]
    look: np.ndarray  # as in near_duplicates; zeros of a file that cannot be decoded
    psnr: float | None = None  # dB of the round trip, over all frames
    problem: str = ""


def take_shots(clips: Sequence[Clip], workers: int, progress: Progress) -> list[Shot]:
    """A shot of each clip, of its first, middle and last frame."""

    def shoot(index: int) -> Shot:
        try:
            frames = first_middle_last(clips[index]).numpy()
        except DataError as problem:
            return Shot(clips[index], (), np.zeros(LOOK_SIZE, np.float32), problem=str(problem))
        return Shot(clips[index], (_strip(frames),), look_of(frames))

    order = progress(range(len(clips)), "decoding clips")
    return [shot for _, shot in map_in_workers(shoot, order, workers, _namer(clips))]


def add_round_trips(
    shots: Sequence[Shot], vae: AutoencoderKLWan, workers: int, progress: Progress
) -> list[Shot]:
    """The shots with what the VAE makes of each clip. Workers decode while it computes."""
    clips = [shot.clip for shot in shots]
    order = (index for index in progress(range(len(shots)), "VAE") if not shots[index].problem)
    made = list(shots)
    for index, frames in map_in_workers(
        lambda index: read_clip(clips[index]), order, workers, _namer(clips)
    ):
        strip, psnr = _round_trip(frames, vae)
        made[index] = replace(shots[index], strips=(*shots[index].strips, strip), psnr=psnr)
    return made


def _namer(clips: Sequence[Clip]) -> Callable[[int], str]:
    return lambda index: clips[index].item.name


def first_middle_last(clip: Clip) -> Tensor:
    """Frames of a clip, uint8 (3, H, W, 3), without decoding those between; of an image (1, ...).

    They are those that `read_clip` has at 0, T // 2 and T - 1.
    """
    last = clip.bucket.frames - 1
    if last == 0:
        return read_clip(clip)
    if clip.policy == "keep":  # its frames are counted, not timed
        return read_clip(clip)[[0, last // 2, last]]
    return read_clip(replace(clip, bucket=replace(clip.bucket, frames=3), fps=2 * clip.fps / last))


def _strip(frames: np.ndarray) -> bytes:
    """WebP of uint8 frames (n, H, W, 3) side by side."""
    count, height, width, _ = frames.shape
    small = (max(1, round(width * HEIGHT / height)), HEIGHT)
    strip = Image.new("RGBA", (count * (small[0] + GAP) - GAP, HEIGHT))
    for place, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize(small, Image.Resampling.LANCZOS)
        strip.paste(picture, (place * (small[0] + GAP), 0))
    file = io.BytesIO()
    strip.save(file, "webp", quality=QUALITY)
    return file.getvalue()


def _round_trip(frames: Tensor, vae: AutoencoderKLWan) -> tuple[bytes, float]:
    """The strip and the PSNR in dB of frames, uint8 (T, H, W, 3), encoded and decoded."""
    video = as_video(frames)  # (1, 3, T, H, W)
    decoded = decode_latents(vae, encode_video(vae, video)).cpu()
    error = (decoded - video).div(2).square().mean().item()  # of a range of 1
    pixels = ((decoded[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    last = len(pixels) - 1
    return _strip(pixels[[0, last // 2, last]] if last else pixels), -10 * log10(max(error, 1e-12))
