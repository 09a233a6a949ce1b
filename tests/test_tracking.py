"""What a run writes about itself, with W&B offline and no account anywhere."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from data.batches import BatchOrder, Draws
from data.buckets import Bucket
from train.compose import compose
from train.config import Config, ExpertConfig
from train.learner import Learner, StepFigures
from train.rules import ConfigError
from train.tracking import Tracker
from train.validate import HeldoutLoss
from wan.flow import TimestepLaw, expert_range
from wan.variants import Expert


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nobody has ever logged in."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


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
    values = torch.tensor(losses)
    return StepFigures(values.mean().item(), values, torch.tensor(sigmas), grad_norm, grad_norm / 8)


LOSS = HeldoutLoss("low", 2.5, 0.25, [2.0, 3.0], [0.0, 0.5, 1.0])


def test_an_offline_run_writes_every_figure_and_asks_for_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(config_of("tracking.log_every=2"), folder, speaks=True)  # mode auto
    high, low = learner_of("high"), learner_of("low")
    tracker.heldout(0, [LOSS])
    with tracker.phase("training"):
        tracker.trained(1, 5, high, figures_of([1.0, 3.0], [0.25, 0.75], 2.0))
    tracker.trained(2, 5, high, figures_of([5.0, 9.0], [0.375, 0.125], 4.0))
    tracker.trained(3, 5, high, figures_of([7.0, 7.0], [0.5, 0.75], 8.0))
    tracker.trained(4, 5, low, figures_of([1.0, 2.0], [0.25, 0.375], 1.0))
    tracker.trained(5, 5, low, figures_of([8.0, 8.0], [0.25, 0.375], 1.0))  # the last
    tracker.heldout(5, [LOSS, replace(LOSS, expert="high", mean=4.0)])
    tracker.finish()

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5, 5]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    first, window, mixed, last, after = lines
    assert first["heldout/low/loss"] == 2.5
    assert first["heldout/low/standard_error"] == 0.25
    assert [first["heldout/low/bin_0"], first["heldout/low/bin_1"]] == [2.0, 3.0]
    assert window["train/high/loss"] == 4.5  # of steps 1 and 2
    assert window["train/high/bin_0"] == 5.0  # of 1, 5 and 9
    assert window["train/high/bin_1"] == 3.0
    assert window["grad_norm/high"] == 3.0
    assert window["lr/high"] == 0.5  # of the last step
    assert not [name for name in window if "low" in name]
    assert mixed["train/high/loss"] == 7.0  # the window ended with the turn of one expert
    assert mixed["train/high/bin_1"] == 7.0  # an edge belongs to the bin above
    assert "train/high/bin_0" not in mixed
    assert mixed["train/low/loss"] == 1.5
    assert last["train/low/loss"] == 8.0  # an incomplete window is written at the end
    assert after["heldout/high/loss"] == 4.0

    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    terminal = "".join(capfd.readouterr())
    assert "wandb      offline" in terminal
    for word in ("login", "API key", "Enter your choice"):
        assert word not in terminal


def test_online_without_an_account_is_told_and_never_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())  # pytest -s on a terminal would hang
    # On a terminal W&B would wait for a choice; without one it raises an error of its own.
    with pytest.raises(ConfigError, match=r"tracking\.mode"):
        Tracker(config_of("tracking.mode=online"), folder, speaks=True)


def test_a_disabled_wandb_leaves_the_metrics_in_the_folder(folder: Path) -> None:
    tracker = Tracker(config_of("tracking.mode=disabled"), folder, speaks=True)
    tracker.heldout(3, [LOSS])
    tracker.finish()
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["heldout/low/loss"] == 2.5
    assert not list(folder.glob("wandb/*run-*"))


def test_a_tracker_that_does_not_speak_writes_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(config_of("tracking.log_every=1"), folder, speaks=False)
    tracker.say("hello")
    with tracker.phase("training"):
        tracker.trained(1, 1, learner_of("high"), figures_of([1.0], [0.25], 2.0))
    tracker.heldout(1, [LOSS])
    tracker.figures(1, {"a": 1.0})
    tracker.samples(1, [], [], folder / "sheet.png")
    assert list(tracker.progress(range(3), "a bar")) == [0, 1, 2]
    tracker.finish()
    assert list(folder.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_phases_add_up_and_end_with_an_error(folder: Path) -> None:
    tracker = Tracker(config_of(), folder, speaks=False)
    with tracker.phase("training"):
        pass
    first = tracker.seconds["training"]
    with pytest.raises(RuntimeError), tracker.phase("training"):
        raise RuntimeError
    with tracker.phase("measuring"):
        pass
    assert tracker.seconds["training"] > first >= 0
    assert list(tracker.seconds) == ["training", "measuring"]
    assert "training" in tracker.time_spent()
