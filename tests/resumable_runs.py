"""Whole runs of the toy model that stop and go on, and all that they leave, to be compared."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests import toy_runs
from train.checkpoint import checkpoints_in, step_of
from train.config import Config
from train.lora import train

# Of 4 clips 3 in each step: epochs end within steps. Turns, figures and looks overlap in all ways.
SHORT = [
    "data.frames=1", "tracking.mode=disabled", "steps=5", "turn_steps=3", "accumulate=3",
    "optim.warmup_steps=1", "optim.learning_rate=0.01", "data.caption_dropout=0.5",
    "lora.dropout=0.3", "tracking.log_every=3", "eval.every=2", "eval.bins=2", "eval.draws=1",
    "preview.every=4", "preview.prompts=[a noise]", "preview.steps=1", "preview.frames=1",
    "preview.height=32", "preview.width=48", "preview.guidance_high=1", "preview.guidance_low=1",
    "checkpoint.every=1", "checkpoint.keep=99", "export.dtype=float32",
]  # fmt: skip
OF_THE_RUN = re.compile(r".*(date|started|finished|config_sha256|pair_id|session_id|legacy_hash).*")


def make_data(home: Path) -> Path:
    """Five images, of which one is held out."""
    for seed in range(5):
        toy_runs.make_image(home / "data" / f"{seed}.png", seed, f"noise {seed}")
    return home


def config_of(home: Path, model: Path, name: str, *overrides: str) -> Config:
    """A short run into `home/out/<name>`."""
    own = [f"output_dir={home / 'out' / name}", *SHORT]
    return toy_runs.config_of(home / "data", model, *own, *overrides)


def run(config: Config) -> Path:
    """Train on one core: sums in another order would round otherwise."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        train(config)
    finally:
        os.sched_setaffinity(0, cores)
    return Path(config.output_dir)


def left_after(whole: Path, target: Path, step: int) -> Path:
    """A copy of a run's folder as if the machine had been switched off after the save of a step.

    Figures and samples of later steps are still there, as they would be.
    """
    shutil.copytree(whole, target)
    for path in checkpoints_in(target / "checkpoints"):
        if step_of(path) > step:
            shutil.rmtree(path)
    for path in [*target.glob("*.safetensors"), target / "summary.json"]:
        path.unlink()
    return target


def figures(folder: Path) -> list[dict]:
    """Every line of metrics.jsonl, without the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "time/", "throughput/", "memory/")
    return [
        {name: v for name, v in json.loads(line).items() if not name.startswith(times)}
        for line in lines
    ]


def digests(folder: Path) -> dict[str, str]:
    """Of the sample videos and sheets."""
    files = sorted((folder / "samples").glob("step_*/*"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def exported(folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of the final pair, without dates and what names the run."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            said = {k: v for k, v in file.metadata().items() if not OF_THE_RUN.fullmatch(k)}
        found[path.name] = load_file(path), said
    return found


def last_state(folder: Path) -> dict[str, Tensor]:
    """Adapters and optimizers of both experts at the newest checkpoint."""
    newest = checkpoints_in(folder / "checkpoints")[-1]
    return {
        f"{path.name} {name}": tensor
        for path in sorted(newest.glob("state_*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(one: Path, other: Path) -> None:
    """To the bit: losses and rates in their order, samples, adapters, optimizers, final files."""
    assert figures(one) == figures(other)
    assert digests(one) == digests(other)
    assert same_tensors(last_state(one), last_state(other))
    ours, theirs = exported(one), exported(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2
    for name in ours:
        assert same_tensors(ours[name][0], theirs[name][0])
        assert ours[name][1] == theirs[name][1]


def assert_alike(folder: Path, whole: Path) -> None:
    """Runs of one process and of several: the same up to how sums are rounded."""
    for ours, theirs in zip(figures(folder), figures(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    ours, theirs = last_state(folder), last_state(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-4)
    assert digests(folder).keys() == digests(whole).keys()
    assert exported(folder).keys() == exported(whole).keys()
