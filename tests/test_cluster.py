"""conf/cluster: every file is one that its program reads, every command of it and docs/scaling.md
composes, and sweeps make one run after the other.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.resumable_runs import SHORT, make_data
from tools import scaling
from train.compose import compose
from wan.variants import VARIANTS

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "conf" / "cluster"
DOCS = (ROOT / "docs" / "scaling.md").read_text()
PROCESSES = {"one_gpu": (1, 1), "two_gpus": (2, 1), "eight_gpus": (8, 1), "two_nodes": (16, 2)}
STARTS = ("accelerate launch ", "sbatch ", "sky launch ")


def commands_of(text: str) -> list[str]:
    """The commands that start a run, each on a line of its own, a comment's too."""
    lines = [line.lstrip("# ") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(STARTS)]


def settings_of(command: str) -> list[str]:
    """What follows the program, or the script of a cluster."""
    words = shlex.split(command)
    if words[0] == "sky":
        return words[-1].removeprefix("RUN=").split()
    programs = ("train/lora.py", "conf/cluster/slurm.sh")
    start = next(index for index, word in enumerate(words) if word in programs)
    return [word for word in words[start + 1 :] if word != "-m"]


def combinations(settings: list[str]) -> list[list[str]]:
    """The runs of a sweep."""
    runs: list[list[str]] = [[]]
    for setting in settings:
        name, _, value = setting.partition("=")
        values = [value] if value.startswith("[") else value.split(",")
        runs = [[*run, f"{name}={v}"] for run in runs for v in values]
    return runs


FILES = sorted(path for path in CLUSTER.iterdir())
COMMANDS = [*commands_of(DOCS), *(c for path in FILES for c in commands_of(path.read_text()))]
COMMANDS = sorted({command for command in COMMANDS if "experiment=" in command})


def test_every_file_has_its_command_and_the_docs_name_it() -> None:
    assert len(FILES) >= 6
    for path in FILES:
        assert commands_of(path.read_text()), path
        assert f"conf/cluster/{path.name}" in DOCS


def test_the_tables_of_the_docs_are_what_the_tool_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scaling.main([])
    for part in capsys.readouterr().out.split("\n\n")[1:]:
        assert part.strip() in DOCS


@pytest.mark.parametrize("count", [2, 8, 64])
def test_volumes_are_those_of_what_is_sent(count: int) -> None:
    """Against numbers counted by hand for T2V-A14B: 40 blocks of ten linears."""
    facts = VARIANTS["t2v_a14b"]
    load = scaling.load_of(facts, (81, 480, 832), rank=16)
    found = scaling.volumes(facts, load, count)
    adapter = 40 * 16 * (8 * (5120 + 5120) + 2 * (5120 + 13824))
    assert found.gradients == pytest.approx(2 * (count - 1) / count * 4 * adapter)
    linears = 40 * (8 * 5120**2 + 2 * 5120 * 13824) * 2
    assert found.weights == pytest.approx(2 * (count - 1) / count * linears, rel=1e-2)
    assert found.tokens * count**2 / (count - 1) == pytest.approx(11 * 40 * 32760 * 5120 * 2)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_its_files(name: str) -> None:
    path = CLUSTER / f"{name}.yaml"
    read = load_config_from_file(str(path))
    assert isinstance(read, ClusterConfig)
    assert (read.num_processes, read.num_machines) == PROCESSES[name]
    assert read.mixed_precision == "no"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    runs = combinations(settings_of(command))
    names = {compose(run).output_dir for run in runs}
    assert len(names) == len(runs)
    for word in shlex.split(command):
        if word.startswith("conf/"):
            assert (ROOT / word).is_file()
    if command.startswith("accelerate"):
        launch_command_parser().parse_args(shlex.split(command.replace("$RANK", "1"))[2:])


def test_slurm_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    """With stand-ins for what a cluster has, on its second machine."""
    stand_ins = {
        "scontrol": 'printf "first\\nsecond\\n"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ]; shift; exec "$@"',
        "accelerate": 'printf "%s\\n" "$@"',
    }
    for name, lines in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_NNODES": "2", "SLURM_NODEID": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    run = ["experiment=demo", "preview.prompts=[A zorbi, rolling.]"]
    script = ["bash", str(CLUSTER / "slurm.sh"), *run]
    told = subprocess.run(script, env=given, capture_output=True, text=True, check=True).stdout
    words = told.splitlines()
    assert words[-2:] == run
    read = launch_command_parser().parse_args(words[1:])
    assert (read.num_processes, read.num_machines, read.machine_rank) == (16, 2, 1)
    assert (read.main_process_ip, read.main_process_port) == ("first", 20007)
    assert read.training_script == "train/lora.py"


def test_skypilot_gets_a_task() -> None:
    task = yaml.safe_load((CLUSTER / "sky.yaml").read_text())
    assert {"resources", "num_nodes", "setup", "run"} <= task.keys()
    (command,) = commands_of(task["run"])
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert command.endswith(" train/lora.py $RUN")


def test_a_sweep_makes_one_run_after_the_other(tmp_path: Path, toy_model: Path) -> None:
    home = make_data(tmp_path)
    few = ["steps=1", "optim.warmup_steps=0", "preview.prompts=[]", "eval.every=0", "accumulate=1"]
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "train" / "lora.py"), "-m", "model=tiny",
            f"model.path={toy_model}", f"data.path={home / 'data'}", "data.height=32",
            "data.width=48", "data.workers=0", *SHORT, *few, "lora.rank=2,4",
            "name=rank${lora.rank}",
        ],
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (2, 4):
        assert (home / "outputs" / f"rank{rank}" / f"rank{rank}_high_noise.safetensors").exists()
    assert {path.name for path in home.iterdir()} == {"data", "cache", "outputs"}
    assert (home / "outputs" / "multirun.yaml").exists()
