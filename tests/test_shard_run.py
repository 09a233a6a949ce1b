"""`speed.placement=shard`: two processes with half of the base each train as one does."""

from pathlib import Path

import pytest

from tests.resumable_runs import (
    assert_alike,
    config_of,
    left_after,
    make_data,
    run,
)
from tests.two_processes import launch
from tools.evaluate import evaluate, parsed

# Three samples for two processes, one of which makes none of its own in the second round.
FEW = [
    "steps=2", "turn_steps=2", "eval.bins=2", "accumulate=2", "lora.dropout=0",
    "preview.prompts=[one,two,three]", "lora.ema=0.5",
]  # fmt: skip
SHARD = [*FEW, "accumulate=1", "speed.placement=shard"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("shard"))


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    """The run of one process, with as many batches in a step."""
    return run(config_of(home, toy_model, "whole", *FEW))


@pytest.fixture(scope="module")
def sharded(home: Path, toy_model: Path) -> Path:
    said = launch(home, toy_model, "sharded", *SHARD)
    assert (home / "out" / "sharded" / "summary.json").exists(), said[-5000:]
    return home / "out" / "sharded"


def test_two_processes_make_the_run_of_one(sharded: Path, whole: Path) -> None:
    assert_alike(sharded, whole)


def test_one_process_goes_on_with_it(
    home: Path, toy_model: Path, sharded: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_after(sharded, home / "out" / "alone", 2)
    run(config_of(home, toy_model, "alone", *FEW))
    said = capsys.readouterr().out
    assert "goes on    after 2 of 4 steps" in said
    assert "changed    speed.placement: shard -> swap" in said
    assert_alike(folder, whole)


def test_two_go_on_with_that_of_one(home: Path, toy_model: Path, whole: Path) -> None:
    folder = left_after(whole, home / "out" / "back", 2)
    said = launch(home, toy_model, "back", *SHARD)
    assert "changed    speed.placement: swap -> shard" in said
    assert_alike(folder, whole)


def test_two_share_clips_too(home: Path, toy_model: Path, whole: Path) -> None:
    said = launch(home, toy_model, "both", *SHARD, "accumulate=2", "speed.context=2")
    folder = home / "out" / "both"
    assert (folder / "summary.json").exists(), said[-5000:]
    assert_alike(folder, whole)


def test_one_process_evaluates_it(sharded: Path) -> None:
    evaluate(parsed([str(sharded)]))
    (grid,) = (sharded / "evaluation").glob("*/grid/grid.json")
    assert len(list(grid.parent.glob("??_adapters.mp4"))) == 3
