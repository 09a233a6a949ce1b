"""Two processes: they go on exactly, stop together, and hand over to one with the same items."""

import signal
from pathlib import Path

import pytest
import torch

from tests.resumable_runs import (
    assert_same_run,
    config_of,
    figures,
    last_state,
    left_after,
    make_data,
    run,
)
from tests.two_processes import launch, start, wait_for_step
from train.checkpoint import checkpoints_in, step_of

FEW = ["steps=3", "turn_steps=2", "preview.prompts=[]", "eval.every=0", "tracking.log_every=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    """A run of two processes that never stopped."""
    said = launch(home, toy_model, "whole", *FEW)
    folder = home / "out" / "whole"
    assert (folder / "summary.json").exists(), said[-3000:]  # gloo may abort after all is written
    return folder


def test_two_processes_stop_together_and_go_on_exactly(
    home: Path, toy_model: Path, whole: Path
) -> None:
    folder = left_after(whole, home / "out" / "stopped", 1)
    process = start(home, toy_model, "stopped", *FEW, launcher=True)
    wait_for_step(process, folder, 2)
    process.send_signal(signal.SIGTERM)  # to the launcher, as when a machine is taken away
    said, _ = process.communicate()
    stopped_at = step_of(checkpoints_in(folder / "checkpoints")[-1])
    assert 2 <= stopped_at < 6, said[-3000:]
    assert "stopped    SIGTERM. To go on:\naccelerate launch --num_processes 2 " in said
    said = launch(home, toy_model, "stopped", *FEW)
    assert f"goes on    after {stopped_at} of 6 steps" in said
    assert_same_run(folder, whole)


def test_one_process_goes_on_with_the_items_of_two(
    home: Path, toy_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_after(whole, home / "out" / "alone", 3)
    run(config_of(home, toy_model, "alone", *FEW, "accumulate=6"))
    said = capsys.readouterr().out
    assert "changed    processes: 2 -> 1: the items go on where they stopped" in said
    # The same noise levels and losses, up to how sums are rounded.
    for ours, theirs in zip(figures(folder), figures(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ours, theirs = last_state(folder), last_state(whole)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-4)


def test_another_size_of_step_is_told_with_what_keeps_the_items(
    home: Path, toy_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_after(whole, home / "out" / "smaller", 3)
    run(config_of(home, toy_model, "smaller", *FEW))
    said = capsys.readouterr().out
    assert "a step has 3 batches instead of 6; accumulate=6 gives each step the same items" in said
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 6
    state = (folder / "checkpoints" / "step_000000006" / "state.json").read_text()
    assert '"place": 15' in state  # of high: 2 steps of 6 batches, then one of 3
