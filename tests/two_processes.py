"""The training program in two processes of this machine that talk by gloo, and how they end."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.forked_runs import free_port
from tests.resumable_runs import SHORT
from train.checkpoint import checkpoints_in, step_of

ROOT = Path(__file__).parent.parent
SOON = 60.0  # seconds within which all processes end when one does


def start(
    home: Path, model: Path, name: str, *settings: str, launcher: bool = False
) -> subprocess.Popen[str]:
    """The run of `resumable_runs.config_of` with these settings, begun.

    Under torchrun where its launcher matters, else forked from one process: half the time.
    """
    program = ["-m", "tests.forked_runs", "2"]
    if launcher:
        program = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        program += [f"--master_port={free_port()}", str(ROOT / "train" / "lora.py")]
    common = [
        f"output_dir={home / 'out' / name}", f"model.path={model}", f"data.path={home / 'data'}",
        f"data.cache={home / 'cache'}", "name=toy", "model=tiny", "data.height=32",
        "data.width=48", "data.workers=0", "lora.rank=2", *SHORT,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *program, *common, *settings],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(home: Path, model: Path, name: str, *settings: str, launcher: bool = False) -> str:
    """The same to its end, whatever that is: gloo may abort after all is written. What it said."""
    return start(home, model, name, *settings, launcher=launcher).communicate(timeout=300)[0]


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of those that a launcher started."""
    launcher = process.pid
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Return once the run in `folder` has a checkpoint that is so far, or has ended."""
    for _ in range(12_000):
        found = checkpoints_in(folder / "checkpoints")
        if process.poll() is not None or (found and step_of(found[-1]) >= step):
            return
        time.sleep(0.01)


def wait_for_text(process: subprocess.Popen[str], text: str) -> str:
    """What was said until this was, the name of a progress bar for instance."""
    assert process.stdout is not None
    said = ""
    while text not in said:
        letter = process.stdout.read(1)
        assert letter, said[-3000:]
        said += letter
    return said


def ends_soon(process: subprocess.Popen[str]) -> str:
    """What was said, after an end with an error within a minute."""
    begun = time.monotonic()
    said, _ = process.communicate(timeout=2 * SOON)
    assert time.monotonic() - begun < SOON, said[-3000:]
    assert process.returncode != 0, said[-3000:]
    return said
