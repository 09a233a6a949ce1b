"""What a run needs of this machine beside its GPU: versions, room on the disk, an account.

Nothing here asks the network.
"""

import importlib.util
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

import torch

from data.buckets import Clip
from train.compose import trained_experts
from train.run import Checked
from train.wandb_log import account_told
from wan.cards import adapter_numbers
from wan.variants import Variant

GB = 1e9
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
TEXT_TOKENS = 200  # of a caption: a long one
CHECKPOINT_BYTES = 4 + 8 + 2  # of a trained number: itself, AdamW's two, and the exported file
EMA_BYTES = 4
# (package, start of its version) -> what is wrong with it. Sources: `spec/wan22.md` trap 20; the
# release notes of PyTorch 2.9.1.
KNOWN_BAD = {
    ("torch", "2.9.0"): "its 3D convolutions in bf16 take far more memory; take 2.9.1 or later",
}


def versions() -> list[str]:
    """What is installed, and a line for each thing that is known to go wrong with it."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    installed = {name: version(name) for name in packages}
    lines = ["versions   " + ", ".join(f"{name} {found}" for name, found in installed.items())]
    for (name, start), problem in KNOWN_BAD.items():
        if installed[name].startswith(start):
            lines.append(f"           {name} {installed[name]}: {problem}")
    return [*lines, *(f"           {problem}" for problem in gpu_problems())]


def gpu_problems() -> list[str]:
    """Why an NVIDIA GPU that is there is not used, or not as well as it could be."""
    if not torch.cuda.is_available():
        if not NVIDIA_DRIVER.exists():
            return ["no NVIDIA GPU here: the CPU trains the toy model alone"]
        if torch.version.cuda is None:
            return ["there is an NVIDIA driver, but this torch is made for CPUs: install another"]
        return [f"the NVIDIA driver is too old for CUDA {torch.version.cuda}: update it"]
    problems = []
    if not (shutil.which("cc") or shutil.which("gcc")):
        problems.append("no C compiler: blocks run uncompiled, a third slower; install gcc")
    if importlib.util.find_spec("bitsandbytes") is None:
        problems.append("bitsandbytes is not installed: speed=nf4 and optim=adamw8bit need it")
    return problems


def wandb(checked: Checked) -> str:
    """Where the run's figures will go."""
    return f"wandb      tracking.mode={checked.config.tracking.mode}, {account_told()}"


def disk(checked: Checked) -> list[str]:
    """What will be written where, against the room that is there."""
    config, facts = checked.config, checked.facts
    both = [*checked.clips.train, *checked.clips.heldout]
    itemsize = getattr(torch, config.data.vae_dtype).itemsize
    encoded = cache_bytes(both, facts, itemsize)
    kept = checkpoint_bytes(checked)
    count = config.checkpoint.keep + 2  # the best, and the one that is being written
    return [
        _room(Path(config.data.cache), encoded, "cache"),
        _room(Path(config.output_dir), count * kept, f"{count} checkpoints"),
    ]


def cache_bytes(clips: Sequence[Clip], facts: Variant, itemsize: int) -> float:
    """Bytes of the entries of these clips and their captions, about."""
    total = 0.0
    for clip in clips:
        bucket = clip.bucket
        shape = facts.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
        channels, frames, height, width = shape
        given = facts.in_channels - channels  # I2V-A14B's condition
        total += itemsize * (channels + given) * frames * height * width
        total += len(clip.item.captions) * TEXT_TOKENS * facts.transformer.text_dim * 2
    return total


def checkpoint_bytes(checked: Checked) -> float:
    """Bytes of one checkpoint: adapters, their optimizers, and the files to upload."""
    config, facts = checked.config, checked.facts
    ranks = [attrgetter(f"{expert}.rank")(config) for expert in trained_experts(config)]
    numbers = sum(adapter_numbers(facts.transformer, rank) for rank in ranks)
    return numbers * (CHECKPOINT_BYTES + (EMA_BYTES if config.lora.ema is not None else 0))


def _room(folder: Path, size: float, what: str) -> str:
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    free = shutil.disk_usage(there).free
    short = "" if size < free else "  NOT ENOUGH"
    return f"disk       {what}: up to {size / GB:.2f} GB in {folder}/, {free / GB:.0f} free{short}"
