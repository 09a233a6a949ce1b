"""One of two processes dies: the other ends soon, all is told, and one process can go on."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from data.items import DataError
from tests.resumable_runs import config_of, make_data, run
from tests.toy_runs import make_image
from tests.two_processes import ends_soon, start, wait_for_step, wait_for_text, worker
from train.checkpoint import checkpoints_in, step_of
from train.errors import clear_errors
from train.rules import ConfigError

FEW = ["turn_steps=2", "preview.prompts=[]", "eval.every=0", "tracking.log_every=1"]
LONG = ["steps=5000", "checkpoint.keep=2"]  # longer than any test waits


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("failing"))


def test_a_process_that_is_killed_ends_all_and_one_goes_on(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "out" / "killed"
    process = start(home, toy_model, "killed", *FEW, *LONG, launcher=True)
    wait_for_step(process, folder, 2)
    os.kill(worker(process, 1), signal.SIGKILL)
    said = ends_soon(process)
    assert "SIGKILL" in said  # of the launcher
    assert "another process of this run has ended" in said
    last = step_of(checkpoints_in(folder / "checkpoints")[-1])
    assert last >= 2
    steps = last // 2 + 2
    run(config_of(home, toy_model, "killed", *FEW, f"steps={steps}", "accumulate=6"))
    said = capsys.readouterr().out
    assert f"goes on    after {last} of" in said
    assert "changed    processes: 2 -> 1: the items go on where they stopped" in said
    assert (folder / "summary.json").exists()


def test_an_error_of_one_process_is_told_and_ends_all(home: Path, toy_model: Path) -> None:
    """Its clips are gone, those of the cache too."""
    clips = make_data(home / "clips")
    folder = clips / "out" / "broken"
    process = start(clips, toy_model, "broken", *FEW, *LONG, launcher=True)
    wait_for_step(process, folder, 2)
    shutil.rmtree(clips / "data")
    shutil.rmtree(clips / "cache")
    said = ends_soon(process)
    assert "error: " in said
    assert ".png" in said.split("error: ")[1]


@pytest.mark.parametrize(
    ("phase", "settings"),
    [
        ("encoding latents", []),
        ("held-out", ["eval.every=1", "eval.draws=2000"]),
        ("rendering samples", ["preview.prompts=[one,two]", "preview.steps=3000"]),
    ],
)
def test_a_process_that_is_killed_between_steps_ends_all(
    phase: str,
    settings: list[str],
    tmp_path: Path,
    toy_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_data(tmp_path)
    for seed in range(5, 60):
        make_image(tmp_path / "data" / f"{seed}.png", seed, f"noise {seed}")
    short = [*FEW, "eval.every=0", "steps=1", "optim.warmup_steps=0"]
    process = start(tmp_path, toy_model, "early", *short, *settings, launcher=True)
    wait_for_text(process, phase)
    os.kill(worker(process, 1), signal.SIGKILL)
    assert "SIGKILL" in ends_soon(process)
    assert not checkpoints_in(tmp_path / "out" / "early" / "checkpoints")
    folder = run(config_of(tmp_path, toy_model, "early", *short))
    assert (folder / "summary.json").exists()
    if phase != "encoding latents":
        assert "latents: 60 reused, 0 encoded" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "spoken"), [(DataError, True), (ConfigError, False)])
def test_what_one_process_alone_meets_it_tells_itself(
    error: type[Exception],
    spoken: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), clear_errors():
        raise error("clip.mp4 is gone")
    assert ("clip.mp4 is gone" in capsys.readouterr().err) == spoken
