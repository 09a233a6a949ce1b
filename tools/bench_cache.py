"""Filling a cache, against the VAE alone on the same tensors: how busy the encoder is."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from data.buckets import Clip, ClipSettings, plan_clips
from data.cache import cache_latents
from data.files import FileFacts, read_files
from data.filling import Store
from data.items import KIND_OF_SUFFIX, Item
from data.media import read_clip
from data.workers import map_in_workers
from tools.bench_model import make_vae
from train.encode import as_video
from wan.latents import encode_video
from wan.variants import Variant


def bench_cache(
    folder: Path, facts: Variant, count: int, workers: int, dtype: torch.dtype
) -> dict[str, object]:
    """Clips a minute of the VAE alone and of filling a cache, decoding included."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact, vae = (make_vae(facts, kind, device) for kind in (torch.float32, dtype))

    def encode(frames: Tensor) -> Tensor:
        return encode_video(vae, as_video(frames.to(device)))[0].cpu()

    with tempfile.TemporaryDirectory() as scratch:
        clips, files = make_clips(folder, Path(scratch) / "data", facts, count)
        decoded = [t for _, t in map_in_workers(lambda i: read_clip(clips[i]), range(count), 4)]
        encode(decoded[0])  # the first call chooses kernels
        alone = seconds(lambda: [encode(frames) for frames in decoded])

        store = Store(Path(scratch) / "cache", workers, True, _quiet, print)
        filling = seconds(lambda: cache_latents(clips, files, lambda: encode, "bench", store))
        start = time.perf_counter()
        for clip in clips[:workers]:
            read_clip(clip)
        decoding = (time.perf_counter() - start) / max(1, workers)
    reference = encode_video(exact, as_video(decoded[0].to(device)))[0].cpu()
    error = (encode(decoded[0]) - reference).norm() / reference.norm()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "variant": facts.name,
        "dtype": str(dtype).removeprefix("torch."),
        "clips": count,
        "shape": list(decoded[0].shape[:3]),
        "workers": workers,
        "vae_alone_clips_per_minute": round(60 * count / alone, 1),
        "cache_clips_per_minute": round(60 * count / filling, 1),
        "encoder_busy": round(alone / filling, 3),
        "decoding_seconds_per_clip": round(decoding, 3),
        "latents_error_against_fp32": float(f"{error.item():.3g}"),
    }


def make_clips(
    folder: Path, target: Path, facts: Variant, count: int
) -> tuple[list[Clip], dict[Path, FileFacts]]:
    """So many clips of the variant's usual shape, each of a file of its own."""
    videos = sorted(
        path for path in folder.rglob("*") if KIND_OF_SUFFIX.get(path.suffix) == "video"
    )
    target.mkdir(parents=True)
    items = []
    for index, video in enumerate(islice(cycle(videos), count)):
        path = target / f"{index:05d}{video.suffix}"
        shutil.copyfile(video, path)
        with path.open("ab") as file:  # an empty box, which decoders skip: another file
            file.write((16).to_bytes(4, "big") + b"free" + index.to_bytes(8, "big"))
        items.append(Item(path, ("",), "video", path.name))
    paths = [item.path for item in items]
    read = read_files(paths, target.parent / "cache", 4, _quiet)
    infos = [facts.info for facts in read if facts.info is not None]
    settings = ClipSettings(
        resolution=(facts.height, facts.width),
        frames=facts.frames,
        fps=facts.fps,
        policy="resample",
        multiple=facts.geometry.multiple,
        time_stride=facts.geometry.time_stride,
        extraction="head",
    )
    return plan_clips(items, infos, settings).clips, dict(zip(paths, read, strict=True))


def seconds(work: Callable[[], object]) -> float:
    """How long a piece of work takes, the device's part of it included."""
    _finish()
    start = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quiet(steps: Iterable[int], _: str) -> Iterable[int]:
    return steps
