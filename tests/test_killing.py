"""kill -9 at random moments: the next start goes on, and nothing half-written is ever read."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.resumable_runs import config_of, make_data, run

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("WAN_LORA_KILLS", "16"))  # 200 before a release


def test_runs_that_are_killed_at_random_moments_end_as_if_nothing_had_been(
    tmp_path: Path, toy_model: Path
) -> None:
    home = make_data(tmp_path)
    reference = run(config_of(home, toy_model, "whole"))
    command = [sys.executable, "-m", "tests.killed_runs", home, toy_model, reference, KILLS, 0]
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] >= KILLS
    assert seen["finished"] >= 1
    assert len(set(seen["resumed_after"])) > 2  # the kills hit different stages of the run
