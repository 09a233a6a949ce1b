"""Speed against the limit, both measured in the same run.

python -m tools.bench cache DIR --clips 48 --workers 8      # DIR holds a few videos; on a GPU
python -m tools.bench cache datasets/demo/train --variant tiny --clips 16
python -m tools.bench model DIR --variant t2v_a14b          # DIR of python -m tools.random_model

`cache` fills a cache with clips of DIR (repeated until there are enough, each its own file) and
compares with the VAE alone on the same tensors, already in memory: their ratio is the share of the
time in which the encoder was at work. It also prints how far latents in bf16 are from fp32. The VAE
has its real size and random weights, but for `tiny`, whose weights are in this repository.

`model` loads all of a model, trains each expert for two steps, samples a video in four steps and
prints how long each took (of the steps, the second) and the peak of memory.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from data.batches import Batch
from data.buckets import Clip, ClipSettings, plan_clips
from data.cache import cache_latents
from data.files import FileFacts, read_files
from data.filling import Store
from data.items import KIND_OF_SUFFIX, Item
from data.media import read_clip
from data.workers import map_in_workers
from train.config import ModelConfig
from train.encode import as_video, model_paths
from train.step import NoiseDraw, velocity_error
from wan import lora
from wan.checkpoints import find_model, load_vae
from wan.conditioning import Condition, channels_condition
from wan.experts import load_experts
from wan.key_names import vae_config
from wan.latents import decode_latents, encode_video
from wan.sampler import SampleSettings, distilled, sample_latents
from wan.text import pad_text
from wan.variants import VARIANTS, Variant


def main() -> None:
    """Read the command line and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(required=True, dest="what")
    cache = what.add_parser("cache")
    cache.add_argument("folder", type=Path)
    cache.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
    cache.add_argument("--clips", type=int, default=24)
    cache.add_argument("--workers", type=int, default=4)
    cache.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    model = what.add_parser("model")
    model.add_argument("folder", type=Path)
    model.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
    model.add_argument("--frames", type=int, help="of the clip; the model's by default")
    model.add_argument("--height", type=int)
    model.add_argument("--width", type=int)
    arguments = parser.parse_args()
    facts = VARIANTS[arguments.variant]
    if arguments.what == "cache":
        dtype = getattr(torch, arguments.dtype)
        found = bench_cache(arguments.folder, facts, arguments.clips, arguments.workers, dtype)
    else:
        shape = (
            arguments.frames or facts.frames,
            arguments.height or facts.height,
            arguments.width or facts.width,
        )
        found = bench_model(arguments.folder, facts, shape)
    print(json.dumps(found))


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


def bench_model(folder: Path, facts: Variant, shape: tuple[int, int, int]) -> dict[str, object]:
    """Seconds and memory of loading, of a training step of each expert and of a 4-step sample."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    finding = time.perf_counter()
    model = find_model(model_paths(ModelConfig(facts.name, str(folder))), facts.name)
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "variant": facts.name,
        "shape": list(shape),
        "find_seconds": round(time.perf_counter() - finding, 2),
    }
    loading = time.perf_counter()
    experts = load_experts(model, dtype, device)
    found |= _spent("load", loading)
    for expert in experts:
        moving = time.perf_counter()
        transformer = experts[expert]
        found |= _spent(f"{expert}_to_device", moving)
        lora.attach(transformer, 16, 16.0, lora.target_modules("all"), 0.0, seed=0)
        transformer.enable_gradient_checkpointing()
        parameters = lora.adapter_parameters(transformer)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for step in range(2):
            started = time.perf_counter()
            batch, draw = random_batch(facts, shape, step)
            velocity_error(transformer, batch, draw, facts).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found |= _spent(f"{expert}_step", started)
        transformer.disable_gradient_checkpointing()

    if len(facts.experts) > 1:
        moving = time.perf_counter()
        _ = experts[facts.experts[0]]
        found |= _spent("swap", moving)
    settings = SampleSettings(4, facts.sample_shift, facts.guidance, *shape)
    text = pad_text([torch.randn(20, facts.transformer.text_dim)], facts.text_len).to(device)
    condition = None
    if facts.conditioning == "channels":
        latents = torch.randn(1, *facts.geometry.latent_shape(*shape), device=device)
        condition = Condition(channels=channels_condition(latents, last=False))
    started = time.perf_counter()
    sampled = sample_latents(
        experts, distilled(settings), facts, text, text, [0], condition or Condition()
    )
    found |= _spent("sample_4_steps", started)
    started = time.perf_counter()
    video = decode_latents(make_vae(facts, torch.float32, device), sampled)
    found |= _spent("decode", started)
    assert video.isfinite().all()
    found["host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    return found


def random_batch(facts: Variant, shape: tuple[int, int, int], seed: int) -> tuple[Batch, NoiseDraw]:
    """One clip of noise with a caption of noise, as the model takes them."""
    torch.manual_seed(seed)
    latents = torch.randn(1, *facts.geometry.latent_shape(*shape))
    yes = torch.ones(1, dtype=torch.bool)
    batch = Batch(
        clips=[0],
        latents=latents,
        text=[torch.randn(20, facts.transformer.text_dim)],
        mask=None,
        loss_weight=torch.ones(1),
        condition=torch.randn_like(latents) if facts.conditioning == "channels" else None,
        first_given=yes,
        last_given=~yes,
    )
    return batch, NoiseDraw(torch.tensor([0.9]), torch.randn_like(latents))


def _spent(what: str, started: float) -> dict[str, object]:
    """Seconds since then and the peak of the device's memory since the last such question."""
    _finish()
    found: dict[str, object] = {f"{what}_seconds": round(time.perf_counter() - started, 2)}
    if torch.cuda.is_available():
        found[f"{what}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        torch.cuda.reset_peak_memory_stats()
    return found


def make_vae(facts: Variant, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    """The VAE of a variant at its real size: random, but for the toy model's."""
    if facts.name == "tiny":
        model = find_model(model_paths(ModelConfig(path="embedded")), facts.name)
        return load_vae(model, dtype, device)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**vae_config(facts))  # pyright: ignore[reportArgumentType]
    return vae.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue]


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


if __name__ == "__main__":
    main()
