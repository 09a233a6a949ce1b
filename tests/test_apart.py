"""`launch=experts`: two processes, an expert each, that meet in the run's folder alone."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.resumable_runs import config_of, make_data, run
from tests.two_processes import ends_soon, start, worker
from train.apart import OF_LAUNCHERS, newest_of_others, own_run
from train.checkpoint import checkpoints_in, step_of
from train.compose import compose
from train.lora import train
from train.rules import ConfigError

APART = "launch=experts"
FEW = [APART, "preview.prompts=[]", "eval.every=0", "tracking.log_every=1", "checkpoint.keep=2"]


def file_of(folder: Path, expert: str) -> Path:
    return folder / f"toy_{expert}_noise.safetensors"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("apart"))


def whole(process: subprocess.Popen[str]) -> str:
    """What a program says that ends well."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


def wait_for_both(folder: Path, process: subprocess.Popen[str]) -> dict[str, int]:
    """The steps of each expert's newest checkpoint, once each has one."""
    for _ in range(12_000):
        found = {e: checkpoints_in(folder / e / "checkpoints") for e in ("high", "low")}
        if all(found.values()) or process.poll() is not None:
            return {expert: step_of(paths[-1]) for expert, paths in found.items()}
        time.sleep(0.01)
    raise AssertionError("no checkpoint of each")


@pytest.fixture(scope="module")
def apart(home: Path, toy_model: Path) -> tuple[Path, str]:
    """A whole run of an expert in each of two processes, and what it said."""
    said = whole(start(home, toy_model, "apart", APART, launcher=True))
    return home / "out" / "apart", said


def test_each_process_trains_what_its_expert_alone_does(
    home: Path, toy_model: Path, apart: tuple[Path, str]
) -> None:
    folder, _ = apart
    for expert in ("high", "low"):
        alone = run(config_of(home, toy_model, f"alone_{expert}", f"experts=[{expert}]"))
        ours, theirs = load_file(file_of(folder, expert)), load_file(file_of(alone, expert))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=2e-2, atol=2e-4)


def test_the_pair_lies_in_the_folder_of_the_run(apart: tuple[Path, str]) -> None:
    folder, said = apart
    for expert in ("high", "low"):
        assert file_of(folder, expert).read_bytes() == file_of(folder / expert, expert).read_bytes()
        assert json.loads((folder / expert / "summary.json").read_text())["reload_error"]
        assert f"{expert:<5}adapters   (strength 1.0)" in said
    high, low = (metadata(file_of(folder, expert)) for expert in ("high", "low"))
    assert high["wan_lora.pair_id"] == low["wan_lora.pair_id"]
    assert high["wan_lora.expert"] == "high"
    assert low["wan_lora.expert"] == "low"


def test_the_same_command_goes_on_with_both(
    home: Path, toy_model: Path, apart: tuple[Path, str]
) -> None:
    folder, _ = apart
    said = whole(start(home, toy_model, "apart", APART, "steps=6", launcher=True))
    for expert in ("high", "low"):
        assert f"{expert:<5}goes on    after 5 of 6 steps" in said
        assert metadata(file_of(folder, expert))["ss_steps"] == "6"
        assert len(checkpoints_in(folder / expert / "checkpoints")) == 6


def test_both_stop_and_save_and_the_same_command_goes_on(home: Path, toy_model: Path) -> None:
    folder, steps = home / "out" / "stopped", "steps=5000"
    process = start(home, toy_model, "stopped", *FEW, steps, launcher=True)
    wait_for_both(folder, process)
    process.send_signal(signal.SIGTERM)  # to the launcher, as when a machine is taken away
    said, _ = process.communicate(timeout=120)
    assert said.count("stopped    SIGTERM. To go on:\naccelerate launch --num_processes 2 ") == 2
    done = wait_for_both(folder, process)
    for expert, step in done.items():
        (folder / expert / "metrics.jsonl").read_text()
        assert 1 <= step < 5000
    more = f"steps={max(done.values()) + 1}"
    said = whole(start(home, toy_model, "stopped", *FEW, more, launcher=True))
    for expert, step in done.items():
        assert f"{expert:<5}goes on    after {step} of" in said
        assert file_of(folder, expert).exists()


def test_one_that_dies_lets_the_other_save_itself(home: Path, toy_model: Path) -> None:
    folder = home / "out" / "dead"
    process = start(home, toy_model, "dead", *FEW, "steps=5000", launcher=True)
    wait_for_both(folder, process)
    os.kill(worker(process, 1), signal.SIGKILL)  # low; the launcher asks high to stop
    said = ends_soon(process)
    assert "SIGKILL" in said
    assert said.count("stopped    SIGTERM. To go on:") == 1
    assert min(wait_for_both(folder, process).values()) >= 1


def test_previews_take_the_newest_adapter_of_the_other(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it they are those of one expert alone, with it they are not."""
    sheets = {}
    for name in ("lonely", "met"):
        config = config_of(home, toy_model, name, "launch=experts", "experts=[low]", "eval.every=0")
        high = file_of(Path(config.output_dir), "high")
        if name == "met":
            other = config_of(home, toy_model, "high_first", "launch=experts", "experts=[high]")
            train(other)
            high.parent.mkdir()
            high.write_bytes(file_of(Path(other.output_dir), "high").read_bytes())
            assert newest_of_others(own_run(config)[0]) == {"high": high}
        capsys.readouterr()
        run(config)
        said = capsys.readouterr().out
        assert ("the other expert has no adapter yet" in said) == (name == "lonely")
        folder = Path(config.output_dir) / "low" / "samples" / "step_000005"
        sheets[name] = (folder / "00_adapters.mp4").read_bytes()
    assert sheets["lonely"] != sheets["met"]


@pytest.mark.parametrize(
    ("processes", "overrides", "words"),
    [
        ("1", [], "takes a process for each of high and low, and there are 1"),
        ("3", [], "and there are 3"),
        ("2", ["experts=[low]"], "and there are 2"),
        ("2", ["resume=somewhere"], "each expert has its own"),
        ("2", ["model=ti2v_5b", "model.path=x"], "has one expert"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    processes: str, overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    needed = ["name=toy", "model=tiny", "model.path=embedded", "data.path=x", "launch=experts"]
    with pytest.raises(ConfigError, match=words):
        own_run(compose([*needed, *overrides]))


def test_the_folder_of_another_kind_of_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    needed = ["name=toy", "model=tiny", "model.path=embedded", "data.path=x", "launch=experts"]
    with pytest.raises(ConfigError, match="a run that is not launch=experts"):
        own_run(compose([*needed, f"output_dir={tmp_path}"]))


def test_the_rank_says_which_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["name=toy", "model=tiny", "model.path=embedded", "data.path=x", "launch=experts"]
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what it changes is put back
    for rank, expert in enumerate(("high", "low")):
        for name in OF_LAUNCHERS:
            monkeypatch.setenv(name, "2" if "SIZE" in name else str(rank))
        for _ in range(2):  # runs of a sweep
            config, processes = own_run(compose(needed))
            assert (config.experts, config.output_dir) == ([expert], f"outputs/toy/{expert}")
            assert processes == 2
            assert not OF_LAUNCHERS & os.environ.keys()
