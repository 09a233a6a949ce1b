"""One of two processes dies: the other ends soon, all is told, and one process can go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.items import DataError
from tests.resumable_runs import SHORT, config_of, make_data, run
from train.checkpoint import checkpoints_in, step_of
from train.errors import clear_errors
from train.rules import ConfigError

ROOT = Path(__file__).parent.parent
SOON = 60.0  # seconds
FEW = ["turn_steps=2", "preview.prompts=[]", "eval.every=0", "tracking.log_every=1"]
LONG = ["steps=5000", "checkpoint.keep=2"]  # longer than any test waits


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("failing"))


def start(home: Path, model: Path, port: int, *overrides: str) -> subprocess.Popen[str]:
    """The program in two processes under the launcher, with the clips in `home`."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
        f"--master_port={port}", str(ROOT / "train" / "lora.py"), "name=toy", "model=tiny",
        f"model.path={model}", f"data.path={home / 'data'}", f"data.cache={home / 'cache'}",
        "data.height=32", "data.width=48", "data.workers=0", "lora.rank=2", *SHORT, *FEW, *LONG,
        *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=home,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker(launcher: int, rank: int) -> int:
    """The process id of one of those that a launcher started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_step(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    """Return once there is a checkpoint that is so far."""
    for _ in range(12_000):
        found = checkpoints_in(folder / "checkpoints")
        if process.poll() is not None or (found and step_of(found[-1]) >= step):
            return
        time.sleep(0.01)


def ends_soon(process: subprocess.Popen[str]) -> str:
    """What was said, after an end with an error within a minute."""
    begun = time.monotonic()
    said, _ = process.communicate(timeout=2 * SOON)
    assert time.monotonic() - begun < SOON, said[-3000:]
    assert process.returncode != 0, said[-3000:]
    return said


def test_a_process_that_is_killed_ends_all_and_one_goes_on(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "out" / "killed"
    process = start(home, toy_model, 29651, f"output_dir={folder}")
    wait_for_step(folder, process, 2)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
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
    folder, clips = home / "broken", make_data(home / "clips")
    process = start(clips, toy_model, 29652, f"output_dir={folder}")
    wait_for_step(folder, process, 2)
    shutil.rmtree(clips / "data")
    shutil.rmtree(clips / "cache")
    said = ends_soon(process)
    assert "error: " in said
    assert ".png" in said.split("error: ")[1]


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
