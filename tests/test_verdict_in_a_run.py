"""What a run does about an expert that overfits, seen on a run that is loaded and not trained."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.toy_runs import config_of, make_image, silent
from train.evaluation import Beside
from train.history import History
from train.lora import check, prepare
from train.run import Run, conclude
from train.run_folder import open_run_folder
from train.stopping import stop_requests
from train.validate import HeldoutLoss
from wan.variants import Expert

STEPS = 20


@pytest.fixture
def run(toy_model: Path, tmp_path: Path) -> Iterator[Run]:
    for seed in range(4):
        make_image(tmp_path / "data" / f"{seed}.png", seed, "a ball")
    config = config_of(
        tmp_path / "data", toy_model, f"output_dir={tmp_path / 'out'}", "data.frames=1",
        "optim.warmup_steps=0", f"steps={STEPS}", "eval.patience=2", "tracking.mode=disabled",
    )  # fmt: skip
    accelerator = Accelerator()
    with stop_requests(None) as stop:
        folder = open_run_folder(config, accelerator)
        checked = check(config, accelerator.device, silent)
        yield prepare(checked, folder, accelerator, stop)


def measured(run: Run, heldout: list[float], trained: list[float]) -> Run:
    """The run as if low had been measured so, after each of its steps, and high not at all."""
    history = History()
    for step, (loss, own) in enumerate(zip(heldout, trained, strict=True)):
        one, other = (HeldoutLoss("low", v, 0.1, [], [], [v, v]) for v in (loss, own))
        history.heldout[step] = [replace(one, expert="high"), one]
        still = Beside(0, replace(other, expert="high"), 0.0)
        history.beside[step] = {"high": still, "low": Beside(step, other, 0.0)}
    run.learners["low"].steps_done = len(heldout) - 1
    run.turns.done = {"low": len(heldout) - 1}
    return replace(run, history=history)


def alarms(run: Run) -> dict[str, float]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    figures = [json.loads(line) for line in lines]
    return {name: row[name] for row in figures for name in row if name.startswith("alarm/")}


@pytest.mark.parametrize("early_stop", [False, True])
def test_overfitting_is_told_and_ends_that_expert_if_wanted(
    run: Run,
    early_stop: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[str] = []  # tests/test_wandb.py has the way of an alert from there on
    monkeypatch.setattr(run.tracker, "alert", lambda title, text: sent.append(f"{title}: {text}"))
    run.config.eval.early_stop = early_stop
    run = measured(run, [1.0, 0.5, 0.6, 0.7], [1.0, 0.5, 0.4, 0.3])
    conclude(run)
    said = capsys.readouterr().out
    (alert,) = sent
    assert alert.startswith("overfits: low expert: since step 1 its held-out loss has changed")
    assert "overfits   low expert: since step 1 its held-out loss has changed by +0.2000" in said
    assert ("ends early low expert" in said) == early_stop
    assert "high" not in said
    assert alarms(run) == {"alarm/low": 1.0}
    stopped: dict[Expert, int] = {"low": 3} if early_stop else {}
    assert run.history.stopped == stopped
    assert run.total == STEPS + (3 if early_stop else STEPS)
    assert next(iter(run.turns)) == ("high", 0)


def test_a_plateau_is_no_alarm_but_ends_an_expert_early(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.eval.early_stop = True
    run = measured(run, [1.0, 0.5, 0.5, 0.5], [1.0, 0.5, 0.4, 0.3])
    conclude(run)
    assert "overfits" not in capsys.readouterr().out
    assert alarms(run) == {"alarm/low": 0.0}
    assert run.history.stopped == {"low": 3}
    conclude(run)  # it is over: nothing more is said
    assert capsys.readouterr().out == ""


def test_an_expert_that_still_learns_goes_on(run: Run) -> None:
    run.config.eval.early_stop = True
    run = measured(run, [1.0, 0.9, 0.8, 0.7], [1.0, 0.9, 0.8, 0.7])
    conclude(run)
    assert run.history.stopped == {}
    assert run.total == 2 * STEPS
