"""A run's folder that becomes read-only under way: told in a sentence, and no step is lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resumable_runs import assert_same_run, config_of, make_data, run
from train.checkpoint import checkpoints_in, step_of

PLAIN = ["preview.prompts=[]", "eval.every=0", "tracking.log_every=1"]
# What is written where it does not belong would be hidden by these.
POWERS = "-dac_override,-dac_read_search,-fowner,-chown"
PROGRAM = """
import sys
from pathlib import Path
from tests.resumable_runs import config_of, run
from tests.test_read_only_folder import PLAIN
from tests.test_resume_faults import Meanwhile
from train.errors import clear_errors
home, model = map(Path, sys.argv[1:])
config = config_of(home, model, "run", *PLAIN)
folder = Path(config.output_dir)
def seal():
    for path in (folder / "metrics.jsonl", folder / "checkpoints", folder):
        path.chmod(0o555)
Meanwhile(folder, 5, seal)
with clear_errors():
    run(config)
"""


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None,
    reason="root may write anywhere, and there is no setpriv to give that up",
)
def test_a_folder_that_becomes_read_only_loses_no_step(tmp_path: Path, toy_model: Path) -> None:
    home, elsewhere = make_data(tmp_path / "home"), tmp_path / "temporary"
    elsewhere.mkdir()
    whole = run(config_of(home, toy_model, "whole", *PLAIN))
    weaker = ["setpriv", f"--bounding-set={POWERS}", f"--inh-caps={POWERS}", "--"]
    command = [sys.executable, "-c", PROGRAM, str(home), str(toy_model)]
    done = subprocess.run(
        [*(weaker if os.geteuid() == 0 else []), *command],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TMPDIR": str(elsewhere), "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    (said,) = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)
    folder = home / "out" / "run"
    found = re.fullmatch(
        rf"{folder}/checkpoints cannot be written \(Permission denied\)\. These (\d+) steps are in "
        rf"({elsewhere}/toy_\w+/step_\d+): make room, or make the folder writable, and move it to "
        rf"{folder}/checkpoints\. Then type the same command again\.",
        said,
    )
    assert found, said
    kept = Path(found[2])
    newest = checkpoints_in(folder / "checkpoints")[-1]
    assert step_of(kept) == int(found[1]) == step_of(newest) + 2
    assert list(elsewhere.iterdir()) == [kept.parent]

    for path in (folder, folder / "checkpoints", folder / "metrics.jsonl"):
        path.chmod(0o755)
    kept.rename(folder / "checkpoints" / kept.name)
    run(config_of(home, toy_model, "run", *PLAIN))
    assert_same_run(folder, whole)
