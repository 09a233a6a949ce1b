"""Folders as runs leave them, of chosen figures and small videos, written by the real writers."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from adapter_examples import INFO, random_state

from train.compose import compose, resolved_yaml
from train.preview import save_samples
from train.preview_plan import plan_previews
from train.run_folder import write_summary
from train.video_files import write_mp4
from wan.lora_format import export_adapter
from wan.variants import EXPERTS, VARIANTS

BINS = 4
LOG_EVERY, EVAL_EVERY = 10, 50
BASE_COLOUR, ADAPTED_COLOUR = (200, 40, 40), (40, 160, 60)
RED_FOX = "A red fox <b>runs</b> & jumps."


def make_run(
    folder: Path,
    *overrides: str,
    steps: int = 100,
    samples: Sequence[int] = (50, 100),
    finished: bool = True,
) -> Path:
    """The folder of a run of both experts, in turns of 50 steps."""
    config = compose(
        [
            "experiment=demo", f"name={folder.name}", f"output_dir={folder}",
            f"high.steps={steps // 2}", f"low.steps={steps - steps // 2}",
            "data.path=/home/alice/secret/clips", "preview.seeds=[3]", *overrides,
        ]
    )  # fmt: skip
    config.preview.prompts = [RED_FOX, "a wall"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in history(steps)))
    plan = plan_previews(config.preview, VARIANTS["tiny"], 1)
    for step in samples:
        videos = [[film(colour) for _ in plan.shots] for colour in (BASE_COLOUR, ADAPTED_COLOUR)]
        save_samples(folder / "samples" / f"step_{step:06d}", plan, videos[0], videos[1], 8, {})
    if finished:
        seconds = {"encoding": 3.0, "training": 80.0, "rendering": 17.0}
        write_summary(folder, {"heldout_base": {}, "heldout_adapters": {}, "seconds": seconds})
        for expert in EXPERTS:
            info = replace(INFO, expert=expert)
            export_adapter(folder, folder.name, random_state(0), info, torch.bfloat16)
    return folder


def history(steps: int) -> list[str]:
    """The lines of metrics.jsonl: losses that fall, low after high in turns of 50 steps."""
    records = [_heldout(0)]
    for step in range(LOG_EVERY, steps + 1, LOG_EVERY):
        expert = EXPERTS[(step - 1) // 50 % 2]
        record: dict[str, float] = {"step": step, "seconds": step / 10, "time/step_s": 0.1}
        record |= {f"train/{expert}/loss": 0.2 + 1 / step, f"lr/{expert}": 1e-3}
        record[f"grad_norm/{expert}"] = 0.1
        record |= {f"train/{expert}/bin_{index}": 0.1 + index / step for index in range(BINS)}
        records.append(record)
        if step % EVAL_EVERY == 0:
            records.append(_heldout(step))
    return [json.dumps(record) for record in records]


def _heldout(step: int) -> dict[str, float]:
    record: dict[str, float] = {"step": step, "seconds": step / 10}
    for place, expert in enumerate(EXPERTS):
        fallen = math.exp(-step / 100) * (1 + place)
        record |= {f"heldout/{expert}/loss": 0.5 * fallen}
        record |= {f"heldout/{expert}/standard_error": 0.01}
        record |= {f"heldout/{expert}/bin_{index}": fallen + index for index in range(BINS)}
    return record


def film(colour: tuple[int, int, int], frames: int = 9, side: int = 64) -> np.ndarray:
    """uint8 (T, side, side, 3) of one colour, with a white square that moves."""
    video = np.empty((frames, side, side, 3), np.uint8)
    video[:] = colour
    for frame in range(frames):
        video[frame, 4:12, 4 * frame : 4 * frame + 8] = 255
    return video


def noise_film(path: Path, seed: int, side: int = 128) -> Path:
    """An mp4 that can hardly be compressed: some 200 KB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, side, side, 3), np.uint8)
    write_mp4(path, pixels, 8)
    return path
