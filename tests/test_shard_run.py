"""`speed.placement=shard`: two processes with half of the base each train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resumable_runs import (
    SHORT,
    assert_alike,
    config_of,
    left_after,
    make_data,
    run,
)

ROOT = Path(__file__).parent.parent
# Three samples for two processes, one of which makes none of its own in the second round.
FEW = [
    "steps=2", "turn_steps=2", "eval.bins=2", "accumulate=2", "lora.dropout=0",
    "preview.prompts=[one,two,three]",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("shard"))


def launch(home: Path, model: Path, name: str, *settings: str) -> str:
    """Run the program in two processes; what it says."""
    common = [
        f"output_dir={home / 'out' / name}", f"model.path={model}", f"data.path={home / 'data'}",
        f"data.cache={home / 'cache'}", "name=toy", "model=tiny", "data.height=32",
        "data.width=48", "data.workers=0", "lora.rank=2", *SHORT, *FEW,
        "accumulate=1", "speed.placement=shard",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked_runs", "2", *common, *settings],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,  # gloo may abort after all is written
    )
    return done.stdout


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    """The run of one process, with as many batches in a step."""
    return run(config_of(home, toy_model, "whole", *FEW))


@pytest.fixture(scope="module")
def sharded(home: Path, toy_model: Path) -> Path:
    said = launch(home, toy_model, "sharded")
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
    said = launch(home, toy_model, "back")
    assert "changed    speed.placement: swap -> shard" in said
    assert_alike(folder, whole)
