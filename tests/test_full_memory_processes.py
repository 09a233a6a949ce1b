"""The memory of one of two processes is full: both end soon, nothing is lost, and it goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.resumable_runs import SHORT, config_of, make_data, run
from train.checkpoint import checkpoints_in, step_of

ROOT = Path(__file__).parent.parent
SOON = 60.0  # seconds after the error
FEW = ["preview.prompts=[]", "eval.every=0", "checkpoint.every=0", "steps=4"]
WORKING = 7  # forward passes of the process that fails: two steps of three, and one more
# The program, in whose process 1 the memory is full at a forward pass.
FAILING = f"""
import os, runpy, sys, time
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

passed = []

def check(module, inputs):
    if type(module).__name__ == "WanRotaryPosEmbed" and torch.is_grad_enabled():
        passed.append(module)
        if len(passed) > {WORKING}:
            Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
            raise torch.OutOfMemoryError("CUDA out of memory")

if os.environ["RANK"] == os.environ["FAILS"]:
    register_module_forward_pre_hook(check)
runpy.run_path("{ROOT / "train" / "lora.py"}", run_name="__main__")
"""


@pytest.mark.parametrize("fails", [0, 1])
def test_full_memory_of_one_process_loses_no_step(
    fails: int, tmp_path: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, program, failed_at = make_data(tmp_path), tmp_path / "failing.py", tmp_path / "failed"
    program.write_text(FAILING)
    folder = home / "out" / "full"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
        f"--master_port={29671 + fails}", str(program), "name=toy", "model=tiny",
        f"model.path={toy_model}", f"data.path={home / 'data'}", f"data.cache={home / 'cache'}",
        "data.height=32", "data.width=48", "data.workers=0", "lora.rank=2", *SHORT, *FEW,
        f"output_dir={folder}",
    ]  # fmt: skip
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    told = {"FAILS": str(fails), "FAILED_AT": str(failed_at)}
    done = subprocess.run(
        command, cwd=home, env={**os.environ, **own, **told},
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert time.time() - float(failed_at.read_text()) < SOON, said[-3000:]
    assert done.returncode != 0
    assert "is full, in step 3: its batch of 1x32x48 is predicted to take" in said
    assert "Change, in this order (predicted): " in said
    (saved,) = checkpoints_in(folder / "checkpoints")
    assert step_of(saved) == 2
    run(config_of(home, toy_model, "full", *FEW, "accumulate=6"))
    assert "goes on    after 2 of 8 steps" in capsys.readouterr().out
    assert (folder / "summary.json").exists()
