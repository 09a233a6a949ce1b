"""On a GPU a run that stopped and went on is the run that never stopped.

To the bit with deterministic kernels; with those that are used otherwise, as near as runs of the
same settings are to one another.
"""

import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch

from tests.resumable_runs import assert_same_run, config_of, last_state, left_after, make_data, run

ALIKE = 4  # runs of the same settings, which say how far apart such are

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first product


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("resumed_on_gpu"))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def whole_and_resumed(home: Path, model: Path, compiled: bool, names: list[str]) -> list[Path]:
    """Whole runs of these names; the last one is of a run that stopped in the middle of a turn."""
    own = [
        "preview.prompts=[]",
        "model.dtype=bfloat16",
        "lora.ema=0.6",
        f"speed.compile={compiled}",
    ]
    folders = [run(config_of(home, model, name, *own)) for name in names]
    resumed = left_after(folders[0], home / "out" / f"{names[0]}_resumed", step=4)
    again = run(config_of(home, model, resumed.name, *own))
    return [*folders, again]


def distance(one: Path, other: Path) -> float:
    """The largest difference of any number of the adapters, their averages and the optimizers."""
    ours, theirs = last_state(one), last_state(other)
    assert ours.keys() == theirs.keys()
    return max((ours[n].double() - theirs[n].double()).abs().max().item() for n in ours)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("deterministic")
def test_with_deterministic_kernels_to_the_bit(
    home: Path, toy_model: Path, compiled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = whole_and_resumed(home, toy_model, compiled, [f"deterministic_{compiled}"])
    assert "goes on    after 4 of 10 steps" in capsys.readouterr().out
    assert_same_run(resumed, whole)


def test_otherwise_within_the_spread_of_runs_that_are_alike(home: Path, toy_model: Path) -> None:
    names = [f"alike_{number}" for number in range(ALIKE)]
    *whole, resumed = whole_and_resumed(home, toy_model, False, names)
    spread = max(distance(one, other) for one, other in combinations(whole, 2))
    assert min(distance(resumed, one) for one in whole) <= spread
