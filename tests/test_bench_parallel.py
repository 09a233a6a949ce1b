"""The program that measures several processes against one, at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_each_way_is_compared_with_one_process() -> None:
    toy = ["--variant", "tiny", "--blocks", "2", "--shape", "5x32x32", "--rounds", "1"]
    done = subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"],
            *["--master_port=29643", "-m", "tools.bench_parallel", *toy],
        ],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["way"] for line in lines] == ["data", "shard", "context"]
    for line in lines:
        clips = 1 if line["way"] == "context" else 2
        work = clips * line["alone_seconds"] / line["seconds"]
        assert line["efficiency"] == pytest.approx(work / 2, rel=0.1, abs=0.01)
        assert (line["processes"], line["shape"], line["blocks"]) == (2, [5, 32, 32], 2)
