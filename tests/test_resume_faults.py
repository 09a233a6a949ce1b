"""What goes wrong around a run: full disks, folders that vanish, clips that are gone, W&B lost."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.resumable_runs import assert_same_run, config_of, figures, left_after, make_data, run
from train.checkpoint import checkpoints_in, step_of
from train.metrics_file import MetricsFile
from train.rules import TrainingStopped

PLAIN = ["preview.prompts=[]", "eval.every=0", "tracking.log_every=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    return run(config_of(home, toy_model, "whole", *PLAIN))


class Meanwhile(threading.Thread):
    """Do something to a run once metrics.jsonl has so many lines."""

    def __init__(self, folder: Path, lines: int, do: object) -> None:
        super().__init__()
        self.folder, self.lines, self.do = folder, lines, do
        self.start()

    def run(self) -> None:
        path = self.folder / "metrics.jsonl"
        for _ in range(12_000):
            if path.exists() and path.read_text().count("\n") >= self.lines:
                assert callable(self.do)
                self.do()
                return
            time.sleep(0.005)


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_stops_at_the_second(
    home: Path, toy_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may grow beyond a limit, as on a full disk: state files do not fit, figures do."""
    folder = left_after(whole, home / "out" / "full", 4)
    config = config_of(home, toy_model, "full", *PLAIN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(TrainingStopped) as error:
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().out
    good = folder / "checkpoints" / "step_000000004"
    assert f"not saved  after 5 steps: File too large. The last good state is {good}." in said
    assert "cannot be written (File too large)" in str(error.value)
    assert str(good) in str(error.value)
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 4
    run(config)  # there is room again
    assert_same_run(folder, whole)


def test_figures_that_cannot_be_written_wait_and_none_is_lost(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    metrics = MetricsFile(folder / "metrics.jsonl", None, said.append)
    metrics.write({"step": 1})
    shutil.rmtree(folder)
    folder.write_text("in the way")
    metrics.write({"step": 2})
    metrics.write({"step": 3})
    assert len(said) == 1
    assert "cannot be written" in said[0]
    folder.unlink()
    metrics.write({"step": 4})
    assert (folder / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 3}\n{"step": 4}\n'
    again = MetricsFile(folder / "metrics.jsonl", len('{"step": 2}\n'), said.append)
    again.write({"step": 3})
    assert again.size() == 2 * len('{"step": 2}\n')


def test_a_folder_that_vanishes_is_made_again_and_the_run_goes_on(
    home: Path, toy_model: Path
) -> None:
    config = config_of(home, toy_model, "vanishing", *PLAIN, "checkpoint.every=2")
    folder = Path(config.output_dir)
    meanwhile = Meanwhile(folder, 3, lambda: folder.rename(home / "taken_away"))
    run(config)
    meanwhile.join()
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 10
    assert (folder / "config.yaml").is_file()
    kept = figures(home / "taken_away") + figures(folder)
    assert [line["step"] for line in kept if "lr/low" in line or "lr/high" in line] == [
        *range(1, 11)
    ]


def test_a_clip_that_is_gone_is_told_and_the_steps_before_it_are_kept(
    tmp_path: Path, toy_model: Path
) -> None:
    home = make_data(tmp_path)
    config = config_of(home, toy_model, "gone", *PLAIN, "checkpoint.every=0")
    folder = Path(config.output_dir)

    def take_away() -> None:
        shutil.rmtree(home / "data")
        shutil.rmtree(home / "cache" / "latents")

    meanwhile = Meanwhile(folder, 4, take_away)
    with pytest.raises(ValueError, match=r"\.png"):
        run(config)
    meanwhile.join()
    (saved,) = checkpoints_in(folder / "checkpoints")
    assert step_of(saved) >= 3
    make_data(tmp_path)
    run(config)
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 10


def test_too_many_bad_steps_stop_with_the_last_good_state(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first update so long that every loss after it overflows, and is not finite."""
    own = ["max_bad_steps=2", "experts=[low]", "checkpoint.every=0", "optim.warmup_steps=0"]
    config = config_of(home, toy_model, "bad", *PLAIN, *own, "optim.learning_rate=1e30")
    with pytest.raises(TrainingStopped) as error:
        run(config)
    said = capsys.readouterr().out
    assert said.count("skipped    low expert, step") == 3
    assert "3 steps in a row were skipped (max_bad_steps=2)" in str(error.value)
    assert "Lower low.learning_rate" in str(error.value)
    folder = Path(config.output_dir)
    assert [x["bad_steps/low"] for x in figures(folder) if "bad_steps/low" in x] == [1, 2, 3]
    assert str(checkpoints_in(folder / "checkpoints")[-1]) in str(error.value)


def test_losing_wandb_loses_nothing_else(home: Path, toy_model: Path, whole: Path) -> None:
    """Its service is killed in the middle of a run."""
    program = f"""
import os, signal, subprocess, sys, threading
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.resumable_runs import config_of, run
from tests.test_resume_faults import PLAIN, Meanwhile
home = Path({str(home)!r})
config = config_of(home, Path({str(toy_model)!r}), "lost", *PLAIN, "tracking.mode=offline")
def kill():
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            own = int((found.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if own == os.getpid() and b"wandb-core" in found.read_bytes():
                os.kill(int(found.parent.name), signal.SIGKILL)
        except OSError:
            pass
Meanwhile(Path(config.output_dir), 3, kill)
run(config)
"""
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wandb      lost (Connection lost)") == 1
    folder = home / "out" / "lost"
    assert figures(folder) == figures(whole)
    assert (folder / "toy_low_noise.safetensors").is_file()
