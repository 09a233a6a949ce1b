"""tools.render and `tools.lora export`, killed at random moments: a program of its own.

python -m tests.killed_tools HOME MODEL RUN KILLS SEED

As in tests/killed_runs.py each start is a fork. Whatever bears a final name after a kill must be,
to the byte, what a start that nobody disturbs has written; and such a start goes on in the folder
that the kills have left. Every second kill comes while a file is being written. Prints how many
there were of each tool, and how many of them met a file that was not finished.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tools import lora, render

SMALL = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "1", "--guidance-low", "1"]


def rendering(model: Path, out: Path) -> None:
    """Three videos and their sheet."""
    words = ["a ball", "a box", "a fox", *SMALL, "--guidance-high", "1", "--out", str(out)]
    sys.argv = ["tools.render", *words, "--model", str(model)]
    render.main()


def exporting(run: Path, out: Path) -> None:
    """The pair of a run, in a folder that earlier kills have not written whole files into."""
    shutil.rmtree(out, ignore_errors=True)
    sys.argv = ["tools.lora", "export", str(run), "--dtype", "fp32", "--out", str(out)]
    lora.main()


def start(work: Callable[[Path, Path], None], source: Path, out: Path) -> int:
    """The process id of a fork that works."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work(source, out)
        code = 0
    finally:
        os._exit(code)


def whole_files(folder: Path) -> dict[str, bytes]:
    """What has a final name."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def clear_partial(folder: Path) -> None:
    """Take away what an earlier kill left, to see the next one's."""
    for path in folder.glob(".*"):
        path.unlink()


def kill_often(
    work: Callable[[Path, Path], None], source: Path, home: Path, kills: int, random: Random
) -> tuple[int, int]:
    """Kills, and those that left a file half written, under a name that nobody reads."""
    expected, partial, killed = home / f"{work.__name__}_whole", 0, 0
    begun = time.monotonic()
    _, status = os.waitpid(start(work, source, expected), 0)
    assert status == 0, expected.with_suffix(".log").read_text()[-3000:]
    longest, wanted = time.monotonic() - begun, whole_files(expected)
    assert len(wanted) > 1
    out = home / work.__name__
    while killed < kills:
        clear_partial(out)
        process, begun = start(work, source, out), time.monotonic()
        wanted_moment = random.uniform(0, longest)
        while time.monotonic() - begun < (wanted_moment if killed % 2 else 2 * longest):
            if killed % 2 == 0 and any(out.glob(".*")):
                break
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        found = whole_files(out)
        assert found.items() <= wanted.items(), sorted(found)
        killed += os.WIFSIGNALED(status)
        partial += any(out.glob(".*"))
    _, status = os.waitpid(start(work, source, out), 0)
    assert status == 0, out.with_suffix(".log").read_text()[-3000:]
    assert whole_files(out) == wanted
    return killed, partial


def main(home: Path, model: Path, run: Path, kills: int, seed: int) -> None:
    """Kill both; see the module."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    random = Random(seed)
    seen = [
        kill_often(rendering, model, home, kills, random),
        kill_often(exporting, run, home, kills, random),
    ]
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    home_path, model_path, run_path = map(Path, sys.argv[1:4])
    main(home_path, model_path, run_path, int(sys.argv[4]), int(sys.argv[5]))
