"""`speed.context`: two processes that share their clips train, measure, show and save as one."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.resumable_runs import (
    assert_alike,
    config_of,
    left_after,
    make_data,
    run,
)
from tests.two_processes import launch
from train.groups import check_groups, check_heads
from train.rules import ConfigError
from wan.variants import VARIANTS

FEW = ["steps=2", "turn_steps=2", "accumulate=1", "eval.bins=1", "lora.dropout=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    """The run of one process."""
    return run(config_of(home, toy_model, "whole", *FEW))


@pytest.fixture(scope="module")
def shared(home: Path, toy_model: Path) -> Path:
    """The same run of two processes that share each clip."""
    said = launch(home, toy_model, "shared", *FEW, "speed.context=2")
    assert (home / "out" / "shared" / "summary.json").exists(), said[-3000:]
    assert "a step     1 batches of one shape: processes 1, each 1 of 1 clips" in said
    return home / "out" / "shared"


def test_two_processes_make_the_run_of_one(shared: Path, whole: Path) -> None:
    assert_alike(shared, whole)


def test_one_process_goes_on_with_it(
    home: Path, toy_model: Path, shared: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_after(shared, home / "out" / "later", 2)
    run(config_of(home, toy_model, "later", *FEW))
    said = capsys.readouterr().out
    assert "goes on    after 2 of 4 steps" in said
    assert "changed    processes" not in said
    assert_alike(folder, whole)


def test_groups_that_cannot_be_are_refused(home: Path, toy_model: Path) -> None:
    config = config_of(home, toy_model, "five", "speed.context=5")
    with pytest.raises(ConfigError, match="is 5, and there are 1 processes, which cannot"):
        check_groups(config, Accelerator())
    with pytest.raises(ConfigError, match=r"5, but the 24 heads of .* 1, 2, 3, 4, 6, 8, 12, 24"):
        check_heads(config, VARIANTS["ti2v_5b"])
