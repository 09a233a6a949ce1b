"""A machine without any account, and learners and figures for trackers to tell."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data.batches import BatchOrder, Draws
from data.buckets import Bucket
from train.compose import compose
from train.config import Config, ExpertConfig
from train.learner import Learner, StepFigures
from train.validate import HeldoutLoss
from wan.flow import TimestepLaw, expert_range
from wan.variants import Expert

LOSS = HeldoutLoss("low", 2.5, 0.25, [2.0, 3.0], [0.0, 0.5, 1.0])
BASE = HeldoutLoss("low", 5.0, 0.25, [4.0, 6.0], [0.0, 0.5, 1.0], bin_errors=[0.5, 0.75])


def no_account(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Make this a machine on which nobody has ever logged in."""
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONFIG", "CACHE"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name))


def config_of(*overrides: str) -> Config:
    return compose(["name=toy", "model=tiny", "data.path=data", *overrides])


def learner_of(expert: Expert) -> Learner:
    """A learner of two noise bins that meet at sigma 0.5."""
    parameters = [nn.Parameter(torch.zeros(1))]
    return Learner(
        expert=expert,
        settings=ExpertConfig(rank=1, alpha=1.0, learning_rate=0.1, steps=9),
        parameters=parameters,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        law=TimestepLaw("uniform", 1.0),
        sigma_range=expert_range(0.875, expert),
        edges=torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64),
        order=BatchOrder([Bucket(1, 16, 16)], [1.0], 1, 0),
        seed=0,
        draws=Draws(0),
    )


def figures_of(losses: list[float], sigmas: list[float], grad_norm: float) -> StepFigures:
    """A step whose data took 0.25 s, with half a megapixel-frame in each sample."""
    values = torch.tensor(losses)
    return StepFigures(
        values.mean().item(), values, torch.tensor(sigmas), grad_norm, grad_norm / 8,
        seconds={"data": 0.25}, megapixel_frames=0.5 * len(losses),
    )  # fmt: skip
