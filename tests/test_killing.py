"""kill -9 at random moments: the next start goes on, and nothing half-written is ever read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.resumable_runs import config_of, make_data, run

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("WAN_LORA_KILLS", "8"))  # 200 before a release


def killed(module: str, *arguments: object) -> Any:
    """What a program that kills others has seen."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_runs_that_are_killed_at_random_moments_end_as_if_nothing_had_been(
    tmp_path: Path, toy_model: Path
) -> None:
    home = make_data(tmp_path)
    reference = run(config_of(home, toy_model, "whole"))
    seen = killed("tests.killed_runs", home, toy_model, reference, KILLS, 0)
    assert seen["kills"] >= KILLS
    assert seen["finished"] >= 1
    assert len(set(seen["resumed_after"])) > 2  # the kills hit different stages of the run


def test_tools_that_are_killed_at_random_moments_leave_nothing_half_written(
    tmp_path: Path, toy_model: Path
) -> None:
    home = make_data(tmp_path)
    trained = run(config_of(home, toy_model, "trained", "steps=2", "preview.prompts=[]"))
    for kills, partial in killed("tests.killed_tools", home, toy_model, trained, KILLS // 4, 0):
        assert kills == KILLS // 4
        assert partial >= 1  # in the middle of a write
