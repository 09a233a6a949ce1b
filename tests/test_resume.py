"""A run that stopped anywhere and goes on is, to the bit, the run that never stopped."""

from pathlib import Path

import pytest
import torch

from tests.resumable_runs import (
    assert_same_run,
    config_of,
    exported,
    figures,
    last_state,
    left_after,
    make_data,
    run,
    same_tensors,
)
from train.checkpoint import checkpoints_in, step_of

LAST = 10  # steps of both experts


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    """A run that never stopped, with every checkpoint that it could have stopped at."""
    return run(config_of(home, toy_model, "whole"))


# 1: mid-turn, mid-epoch, mid-window of figures. 4: the other expert's turn, all looks are due.
# 9: one expert has finished. 10: killed before the final files were written.
@pytest.mark.parametrize("step", [1, 4, 9, 10])
def test_a_run_goes_on_as_if_never_stopped(
    home: Path, toy_model: Path, whole: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_after(whole, home / "out" / f"stopped_{step}", step)
    torch.manual_seed(1234 + step)  # must have no say
    run(config_of(home, toy_model, folder.name))
    said = capsys.readouterr().out
    assert f"goes on    after {step} of {LAST} steps" in said
    assert "output_dir" in said  # the one setting that differs between the two
    assert_same_run(folder, whole)


def test_stopping_twice_is_as_good_as_never(home: Path, toy_model: Path, whole: Path) -> None:
    first = run(config_of(home, toy_model, "twice", "steps=2"))
    assert figures(first) != figures(whole)
    run(config_of(home, toy_model, "twice", "steps=4"))
    run(config_of(home, toy_model, "twice"))
    # Where a shorter run ended it was measured and shown once more; all else is the same.
    assert same_tensors(last_state(first), last_state(whole))
    for name, (tensors, _) in exported(whole).items():
        assert same_tensors(tensors, exported(first)[name][0])


def test_saving_changes_no_training(home: Path, toy_model: Path, whole: Path) -> None:
    config = config_of(home, toy_model, "rarely", "checkpoint.every=0")
    folder = run(config)
    assert [step_of(path) for path in checkpoints_in(folder / "checkpoints")] == [LAST]
    assert same_tensors(last_state(folder), last_state(whole))
    assert figures(folder) == figures(whole)


def test_the_same_command_after_the_end_does_nothing(
    home: Path, toy_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    run(config_of(home, toy_model, "whole"))
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_never_starts_over_and_keeps_the_earlier_run(
    home: Path, toy_model: Path, whole: Path
) -> None:
    folder = left_after(whole, home / "out" / "again", 9)
    run(config_of(home, toy_model, "again", "resume=never", "steps=1", "optim.warmup_steps=0"))
    assert [step_of(path) for path in checkpoints_in(folder / "checkpoints")] == [1, 2]
    kept = checkpoints_in(home / "out" / "again-1" / "checkpoints")
    assert step_of(kept[-1]) == 9


def test_a_run_begins_at_the_checkpoint_of_another(
    home: Path, toy_model: Path, whole: Path
) -> None:
    start = whole / "checkpoints" / "step_000000004"
    folder = run(config_of(home, toy_model, "branch", f"resume={start}"))
    assert same_tensors(last_state(folder), last_state(whole))
    assert figures(folder) == [line for line in figures(whole) if line["step"] > 4]


def test_an_earlier_checkpoint_of_the_same_run_puts_later_ones_aside(
    home: Path, toy_model: Path, whole: Path
) -> None:
    folder = left_after(whole, home / "out" / "back", LAST)
    start = folder / "checkpoints" / "step_000000003"
    run(config_of(home, toy_model, "back", f"resume={start}"))
    assert_same_run(folder, whole)
    aside = checkpoints_in(folder / "checkpoints-1")
    assert [step_of(path) for path in aside] == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    "optim",
    [
        ["optim=prodigy"],
        ["optim=schedulefree"],
        ["optim=lion"],
        ["optim.name=torch.optim.Adagrad", "~optim.args.betas"],
    ],
)
def test_other_optimizers_go_on_exactly_too(
    home: Path, toy_model: Path, optim: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rate = "optim.learning_rate=1" if "prodigy" in optim[0] else "optim.learning_rate=0.003"
    own = [*optim, rate, "preview.prompts=[]", "eval.every=0", "steps=3", "turn_steps=2"]
    name = "".join(filter(str.isalnum, optim[0]))
    folder = run(config_of(home, toy_model, name, *own))
    begun = left_after(folder, home / "out" / f"{name}_begun", 3)
    run(config_of(home, toy_model, begun.name, *own))
    assert "after 3 of 6 steps" in capsys.readouterr().out
    assert_same_run(begun, folder)
