"""The means of an expert's steps since figures were last written, and how fast they went."""

from dataclasses import dataclass, field

import torch
from torch import distributed

from train.learner import Learner, StepFigures
from wan.flow import bin_of

GIB = 2**30


@dataclass
class Window:
    """What an expert has done since figures were last written."""

    losses: list[float] = field(default_factory=list)  # of steps
    grad_norms: list[float] = field(default_factory=list)
    learning_rate: float = 0.0
    sample_losses: list[float] = field(default_factory=list)
    bins: list[int] = field(default_factory=list)  # of noise, of the same samples
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the step
    megapixel_frames: float = 0.0
    waiting: list[float] = field(default_factory=list)  # shares of steps
    imbalance: list[float] = field(default_factory=list)

    def add(self, learner: Learner, figures: StepFigures) -> list[int]:
        """One step; the noise bins of its samples."""
        bins = bin_of(figures.sigmas, learner.edges).tolist()
        self.losses.append(figures.loss)
        self.grad_norms.append(figures.grad_norm)
        self.learning_rate = figures.learning_rate
        self.sample_losses += figures.losses.tolist()
        self.bins += bins
        for part, spent in figures.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self.megapixel_frames += figures.megapixel_frames
        self.waiting.append(figures.waiting)
        self.imbalance.append(figures.imbalance)
        return bins

    def figures(self, expert: str) -> dict[str, float]:
        """The means; of losses also in each noise bin that was visited."""
        losses, bins = torch.tensor(self.sample_losses), torch.tensor(self.bins)
        by_bin = {
            f"train/{expert}/bin_{index}": losses[bins == index].mean().item()
            for index in bins.unique().tolist()
        }
        return {
            f"train/{expert}/loss": sum(self.losses) / len(self.losses),
            f"lr/{expert}": self.learning_rate,
            f"grad_norm/{expert}": sum(self.grad_norms) / len(self.grad_norms),
        } | by_bin


def pace(windows: list[Window], seconds: float, floor: float | None) -> dict[str, float]:
    """How fast all these steps went that took so many `seconds` of training.

    `floor` is the time that a clip's kernels take alone: over all clips of a device and over
    `seconds`, it is how much of the card is used.
    """
    steps = sum(len(window.losses) for window in windows)
    samples = sum(len(window.sample_losses) for window in windows)
    devices = distributed.get_world_size() if distributed.is_initialized() else 1
    record = {"time/step_s": seconds / steps}
    if devices > 1:
        record["time/waiting_share"] = sum(sum(window.waiting) for window in windows) / steps
        record["throughput/imbalance"] = sum(sum(window.imbalance) for window in windows) / steps
    for part in dict.fromkeys(part for window in windows for part in window.seconds):
        spent = sum(window.seconds.get(part, 0.0) for window in windows)
        record[f"time/{part}_s"] = spent / steps
    if seconds > 0:
        megapixels = sum(window.megapixel_frames for window in windows)
        record["throughput/samples_per_s"] = samples / seconds
        record["throughput/megapixel_frames_per_s"] = megapixels / seconds
        if floor is not None:
            record["throughput/mfu"] = floor * samples / devices / seconds
    return record


def peak_memory() -> dict[str, float]:
    """Most memory of this process's GPU since the last call, in GiB; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    record = {
        "memory/peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "memory/peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }
    torch.cuda.reset_peak_memory_stats()
    return record
