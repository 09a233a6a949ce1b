"""The base model's previews: rendered once, and kept for when the run goes on."""

import hashlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from train.run import Run, sample
from train.run_folder import BASE_SAMPLES
from train.stopping import on_any
from wan.safetensors_writer import data_sha256, write_safetensors


def base_samples(run: Run) -> list[np.ndarray]:
    """The configured previews without adapters, uint8 (T, H, W, 3) each.

    Those of an earlier start are read if they were made by the same weights with the same settings,
    and every byte is as it was written.
    """
    path = run.folder / "samples" / BASE_SAMPLES
    made_of = repr((run.previews, run.exporter.base_hash, asdict(run.config.model)))
    recipe = hashlib.sha256(made_of.encode()).hexdigest()
    kept = _read(path, recipe)
    if not on_any(run.accelerator, not kept):  # they are rendered by all or none
        return kept
    videos = sample(run, {})
    if run.accelerator.is_main_process and videos:
        tensors = {f"{index:04d}": torch.from_numpy(video) for index, video in enumerate(videos)}
        with suppress(OSError):  # they are rendered again, then
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"recipe": recipe, "data": data_sha256(tensors)}
            write_safetensors(path, tensors, metadata)
    return videos


def _read(path: Path, recipe: str) -> list[np.ndarray]:
    """What was kept, if it is there, sound, and made by this recipe."""
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if file.metadata() == {"recipe": recipe, "data": data_sha256(kept)}:
            return [kept[name].numpy() for name in sorted(kept)]
    return []
