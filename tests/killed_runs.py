"""Runs of the toy model that are killed at random moments and started again: a program of its own.

python -m tests.killed_runs HOME MODEL REFERENCE KILLS SEED

Each start is a fork of a process that has imported everything and computed nothing, which makes
hundreds of them cheap. After each kill all that is on the disk is looked at: what bears a final
name must be whole. A run that reaches its end must be the one that was never killed; then another
begins, with an empty cache. Prints what was seen as JSON.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random

from safetensors.torch import load_file

from tests.resumable_runs import assert_same_run, config_of
from train.checkpoint import checkpoints_in, problem_with
from train.config import Config
from train.lora import train


def start(config: Config, log: Path) -> int:
    """The process id of a run in a fork of this process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        train(config)
        code = 0
    finally:
        os._exit(code)


def look_at(folder: Path, cache: Path) -> None:
    """Whatever has a final name is whole."""
    for path in checkpoints_in(folder / "checkpoints"):
        assert problem_with(path) is None, (path, problem_with(path))
    for path in [*folder.glob("*.safetensors"), *cache.glob("*/*/[!.]*.safetensors")]:
        load_file(path)
    for path in [folder / "summary.json", *cache.glob("*.json")]:
        if path.exists():
            json.loads(path.read_text())


def moment(folder: Path, cache: Path) -> str:
    """What a run was at when it was killed, by what it had not finished."""
    unfinished = {
        "export": folder.glob(".*.safetensors.*"),
        "save": folder.glob("checkpoints/.step_*"),
        "cache": cache.glob("*/*/.*"),
        "render": folder.glob("samples/**/.*"),
    }
    return next((name for name, files in unfinished.items() if any(files)), "between writes")


def main(home: Path, model: Path, reference: Path, kills: int, seed: int) -> None:
    """Kill so many times; see the module."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    random, longest = Random(seed), 4.0
    seen = {"kills": 0, "finished": 0, "resumed_after": [], "moments": []}
    number = 0
    while seen["kills"] < kills or seen["finished"] == 0:
        cache = home / f"cache_{number}"
        config = config_of(home, model, f"killed_{number}", f"data.cache={cache}")
        folder = Path(config.output_dir)
        begun = time.monotonic()
        process = start(config, home / "log.txt")
        if seen["kills"] < kills:
            time.sleep(random.uniform(0, longest))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        look_at(folder, cache)
        if os.WIFSIGNALED(status):
            seen["kills"] += 1
            seen["moments"].append(moment(folder, cache))
            saved = len(checkpoints_in(folder / "checkpoints"))
            if [saved] == seen["resumed_after"][-1:]:
                longest *= 2  # a busy machine: no kill would come after a save
            seen["resumed_after"].append(saved)
            continue
        assert os.WEXITSTATUS(status) == 0, (home / "log.txt").read_text()[-3000:]
        assert_same_run(folder, reference)
        seen["finished"] += 1
        longest = max(2.0, min(longest, time.monotonic() - begun))
        shutil.rmtree(cache)
        number += 1
    assert not list(home.glob("out/killed_*-1")), "a run was moved aside instead of going on"
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:4]]
    main(*paths, int(sys.argv[4]), int(sys.argv[5]))
