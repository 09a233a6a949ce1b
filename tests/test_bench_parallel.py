"""The program that measures several processes against one, at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_exchange import Message
from tools.bench_random import RANK
from tools.scaling import load_of, volumes
from wan.variants import VARIANTS

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
    ways = ["experts", "data", "shard", "context"]
    assert [line["way"] for line in lines] == ways
    for line in lines:
        clips = 1 if line["way"] == "context" else 2
        work = clips * line["alone_seconds"] / line["seconds"]
        assert line["efficiency"] == pytest.approx(work / 2, rel=0.1, abs=0.01)
        assert (line["processes"], line["shape"], line["blocks"]) == (2, [5, 32, 32], 2)
        assert (line["exchange_seconds"] > 0) == (line["sent_gb"] > 0)
    tiny = VARIANTS["tiny"]
    layers = tiny.transformer.layers
    load = load_of(tiny, (5, 32, 32), RANK)
    sent = {line["way"]: 1e9 * line["sent_gb"] for line in lines}
    counted = volumes(tiny, load, 2)  # of all blocks
    assert sent["experts"] == 0
    assert sent["data"] == pytest.approx(counted.gradients * 2 / layers)
    assert sent["shard"] - sent["data"] == pytest.approx(counted.weights * 2 / layers, rel=0.02)
    # Queries, keys, values, output; and once in a step the velocity, whole on each process.
    blocks = counted.tokens * 2 / layers
    assert blocks * 8 / 11 < sent["context"] - sent["data"] < blocks * 1.5
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in table] == ["| way", *(f"| {way}" for way in ways)]


def test_a_message_leaves_a_process_as_rings_send_it() -> None:
    assert Message("all_reduce", 800).sent(4) == 1200
    assert Message("all_gather", 800).sent(4) == 2400
    assert Message("all_to_all", 800).sent(4) == 600
