"""What a run writes about itself, with W&B offline and no account anywhere."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trackers import BASE, LOSS, config_of, figures_of, learner_of, no_account
from train.rules import ConfigError
from train.tracking import Tracker


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_account(monkeypatch, tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def test_an_offline_run_writes_every_figure_and_asks_for_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(config_of("tracking.log_every=2"), folder, speaks=True)  # mode auto
    high, low = learner_of("high"), learner_of("low")
    tracker.heldout(0, [BASE], [BASE])
    with tracker.phase("training"):
        tracker.trained(1, 5, high, figures_of([1.0, 3.0], [0.25, 0.75], 2.0))
    tracker.trained(2, 5, high, figures_of([5.0, 9.0], [0.375, 0.125], 4.0))
    tracker.trained(3, 5, high, figures_of([7.0, 7.0], [0.5, 0.75], 8.0))
    tracker.trained(4, 5, low, figures_of([1.0, 2.0], [0.25, 0.375], 1.0))
    tracker.trained(5, 5, low, figures_of([8.0, 8.0], [0.25, 0.375], 1.0))  # the last
    high_loss = replace(LOSS, expert="high", mean=4.0)
    tracker.heldout(5, [LOSS, high_loss], [BASE, replace(BASE, expert="high")])
    tracker.finish()

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5, 5]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    first, window, mixed, last, after = lines
    assert first["heldout/low/loss"] == 5.0
    assert first["heldout/low/standard_error"] == 0.25
    assert [first["heldout/low/bin_0"], first["heldout/low/bin_1"]] == [4.0, 6.0]
    assert first["heldout/low/standard_error_bin_1"] == 0.75
    assert first["heldout_over_base/low/loss"] == 0  # the base is zero
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
    assert after["heldout_over_base/low/loss"] == -0.5
    assert after["heldout_over_base/low/bin_1"] == -0.5
    assert after["heldout_over_base/high/loss"] == pytest.approx(-0.2)
    assert window["time/data_s"] == 0.25  # of a step
    assert window["time/spent/training_s"] > 0

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
    tracker.heldout(3, [LOSS], [BASE])
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
    tracker.heldout(1, [LOSS], [BASE])
    tracker.figures(1, {"a": 1.0})
    tracker.samples(1, [], [], folder / "sheet.png", None)
    tracker.alert("a title", "a text")
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
