"""What a checkpoint holds beside adapters and optimizers comes back too: averages and history."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from tests.resumable_runs import assert_same_run, config_of, last_state, left_after, make_data, run
from train.checkpoint import checkpoints_in, step_of

RANDOM_STEPS = Random(8).sample(range(1, 10), 2)
PARTS = ["done", "turn", "learners", "heldout", "beside", "stopped", "shown", "best"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("parts"))


AVERAGED = ["lora.ema=0.6", "export.weights=ema"]


@pytest.fixture(scope="module")
def averaged(home: Path, toy_model: Path) -> Path:
    """A run that never stopped, with an average of each adapter that is measured and exported."""
    return run(config_of(home, toy_model, "averaged", *AVERAGED))


def state_after(folder: Path) -> dict[str, object]:
    """What is no tensor in the newest checkpoint, without the times."""
    newest = checkpoints_in(folder / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    return {name: state[name] for name in PARTS}


@pytest.mark.parametrize("step", RANDOM_STEPS)
def test_averages_and_all_that_was_measured_go_on_to_the_bit(
    home: Path, toy_model: Path, averaged: Path, step: int
) -> None:
    folder = left_after(averaged, home / "out" / f"averaged_{step}", step)
    run(config_of(home, toy_model, folder.name, *AVERAGED))
    assert_same_run(folder, averaged)
    assert state_after(folder) == state_after(averaged)
    state = last_state(folder)
    averages = {name for name in state if " ema." in name}
    assert len(averages) == sum(" adapter." in name for name in state)
    assert any(
        (state[name] != state[name.replace(" ema.", " adapter.")]).any() for name in averages
    )


def test_the_best_checkpoint_of_before_the_stop_stays_the_best(home: Path, toy_model: Path) -> None:
    # Learning so fast that it soon goes backwards.
    own = ["eval.every=1", "optim.learning_rate=0.5", "preview.prompts=[]", "steps=3"]
    whole = run(config_of(home, toy_model, "best", *own))
    best = state_after(whole)["best"]
    assert isinstance(best, int)
    assert 0 < best < 5
    folder = left_after(whole, home / "out" / "best_stopped", best)
    run(config_of(home, toy_model, folder.name, *own, "checkpoint.keep=1"))
    assert state_after(folder)["best"] == best
    assert [step_of(path) for path in checkpoints_in(folder / "checkpoints")] == [best, 6]
    ours, theirs = (json.loads((path / "best.json").read_text()) for path in (folder, whole))
    assert (ours["step"], ours["heldout"]) == (best, theirs["heldout"])


def test_worker_processes_that_read_and_encode_anew_change_nothing(
    home: Path, toy_model: Path, averaged: Path
) -> None:
    folder = left_after(averaged, home / "out" / "workers", RANDOM_STEPS[0])
    shutil.rmtree(home / "cache")
    run(config_of(home, toy_model, folder.name, *AVERAGED, "data.workers=2"))
    assert_same_run(folder, averaged)
