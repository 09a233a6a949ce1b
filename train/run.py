"""What a run consists of once all is checked and loaded, and what is done with it repeatedly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from train.config import Config
from train.dataset import Clips
from train.encode import EncodedDataset
from train.export import Exporter
from train.learner import Learner
from train.preview import PreviewPlan, render, save_samples
from train.tracking import Tracker
from train.validate import HeldoutLoss, HeldoutPlan, heldout_loss
from wan.checkpoints import Model
from wan.experts import Experts
from wan.variants import Expert, Variant


@dataclass(frozen=True)
class Checked:
    """A run's inputs, found and checked; no weight has been read."""

    config: Config
    facts: Variant
    model: Model
    clips: Clips
    previews: PreviewPlan


@dataclass(frozen=True)
class Run:
    """Everything that training needs, loaded."""

    config: Config
    facts: Variant
    folder: Path
    accelerator: Accelerator
    tracker: Tracker
    dataset: EncodedDataset
    experts: Experts
    vae: AutoencoderKLWan
    learners: Mapping[Expert, Learner]
    checks: HeldoutPlan
    previews: PreviewPlan
    exporter: Exporter


def measure(run: Run, done: int) -> list[HeldoutLoss]:
    """Held-out loss of each trained expert after `done` steps of the run."""
    with run.tracker.phase("measuring"):
        found = [
            heldout_loss(run.experts[expert], expert, run.facts, run.checks, run.tracker.progress)
            for expert in run.learners
        ]
    run.tracker.heldout(done, found)
    return found


def sample(run: Run) -> list[np.ndarray]:
    """The configured previews as the models are now, uint8 (T, H, W, 3) each."""
    with run.tracker.phase("rendering"):
        return render(
            run.previews, run.facts, run.experts, run.vae, run.dataset.prompts, run.tracker.progress
        )


def show(run: Run, done: int, base: Sequence[np.ndarray]) -> Path | None:
    """Render, write and log the previews beside the base model's; the sheet, if there are any."""
    if not run.previews.shots:
        return None
    adapted = sample(run)
    if not run.accelerator.is_main_process:
        return None
    samples = run.folder / "samples" / f"step_{done:06d}"
    files = save_samples(samples, run.previews, base, adapted, run.facts.fps)
    sheet = samples / "sheet.png"
    run.tracker.samples(done, run.previews.shots, files, sheet)
    return sheet
