"""The whole program on the embedded model and the demo's real files, shortened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.toy_runs import CPU, silent
from train import compose as settings
from train.lora import check, train

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden_losses.json"
SHORT = [
    "experiment=demo",
    f"data.path={ROOT}/datasets/demo/train",
    f"data.heldout_path={ROOT}/datasets/demo/heldout",
    f"data.mix.world.path={ROOT}/datasets/demo/world",
    "preview.prompts=[]",
    "tracking.mode=disabled",
    "optim.warmup_steps=1",
    "eval.every=0",
    "checkpoint.every=0",
    "low.steps=${steps}",
    "eval.bins=1",
    "eval.draws=1",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file keep their latents, so that only the first encodes."""
    return tmp_path_factory.mktemp("cache")


def run(folder: Path, cache: Path, *overrides: str) -> dict:
    """Train on one core, as sums in another order would round otherwise; return summary.json."""
    places = [f"output_dir={folder}/out", f"data.cache={cache}"]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        train(settings.compose([*SHORT, *places, *overrides]))
    finally:
        os.sched_setaffinity(0, cores)
    return json.loads((folder / "out" / "summary.json").read_text())


def losses(folder: Path) -> list[float]:
    """Every training loss that was written, in order."""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    keys = ("train/high/loss", "train/low/loss")
    return [record[key] for record in records for key in keys if key in record]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, dict]:
    """24 steps of each expert."""
    folder = tmp_path_factory.mktemp("short")
    measured = ["eval.bins=4", "eval.draws=3"]
    return folder, run(
        folder, cache, "steps=24", "turn_steps=12", "tracking.log_every=1", *measured
    )


def test_both_experts_learn_the_concept(short_run: tuple[Path, dict]) -> None:
    """Held-out loss falls by many times what another draw of the noise would change it."""
    _, summary = short_run
    for expert in ("high", "low"):
        before, after = (summary[key][expert] for key in ("heldout_base", "heldout_adapters"))
        assert before["mean"] - after["mean"] > 5 * before["standard_error"]
        assert after["mean"] < 0.97 * before["mean"]


def test_without_learning_nothing_falls(tmp_path: Path, cache: Path) -> None:
    summary = run(tmp_path, cache, "steps=2", "optim.learning_rate=1e-12", "seed=1")
    for expert in ("high", "low"):
        before, after = (summary[key][expert] for key in ("heldout_base", "heldout_adapters"))
        assert after["mean"] == pytest.approx(before["mean"], rel=1e-6)


def test_the_files_are_what_was_trained(short_run: tuple[Path, dict]) -> None:
    folder, summary = short_run
    assert all(error < 0.02 for error in summary["reload_error"].values())
    metadata = {}
    for expert in ("high", "low"):
        path = folder / "out" / f"demo_{expert}_noise.safetensors"
        with safe_open(path, "pt") as file:
            metadata[expert] = file.metadata()
        text = json.dumps(metadata[expert])
        assert str(ROOT) not in text
        assert "rolling" not in text  # no captions
        assert metadata[expert]["modelspec.trigger_phrase"] == "zorbi"
    assert metadata["high"]["wan_lora.pair_id"] == metadata["low"]["wan_lora.pair_id"]
    assert metadata["high"]["modelspec.timestep_range"] == "875,1000"
    assert metadata["low"]["modelspec.timestep_range"] == "0,875"


def test_losses_are_golden(short_run: tuple[Path, dict]) -> None:
    """A change that should not move the losses must not, to the bit on the machine that wrote them.

    `WAN_LORA_WRITE_GOLDEN=1 pytest tests/test_train.py` writes them, for a change that should.
    """
    folder, _ = short_run
    machine = {
        "torch": torch.__version__.split("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    found = [value.hex() for value in losses(folder)[:10]]
    if os.environ.get("WAN_LORA_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"machine": machine, "losses": found}, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] == machine:
        assert found == golden["losses"]
    wanted = [float.fromhex(value) for value in golden["losses"]]
    assert [float.fromhex(value) for value in found] == pytest.approx(wanted, rel=1e-4)


def test_one_expert_alone_trains_as_beside_the_other(
    short_run: tuple[Path, dict], tmp_path: Path, cache: Path
) -> None:
    """`experts=[low]` gives the low file of the pair, to the bit: turns do not touch each other."""
    folder, _ = short_run
    run(tmp_path, cache, "steps=24", "experts=[low]", "tracking.log_every=1")
    assert not list((tmp_path / "out").glob("*high*"))
    alone = load_file(tmp_path / "out" / "demo_low_noise.safetensors")
    beside = load_file(folder / "out" / "demo_low_noise.safetensors")
    assert all(torch.equal(alone[key], beside[key]) for key in beside)


def test_experts_have_their_own_rank_rate_and_length(tmp_path: Path, cache: Path) -> None:
    own = ["high.rank=2", "low.rank=4", "high.steps=3", "low.steps=5", "high.learning_rate=1e-5"]
    run(tmp_path, cache, "turn_steps=2", *own)
    for expert, rank, steps in (("high", 2, 3), ("low", 4, 5)):
        path = tmp_path / "out" / f"demo_{expert}_noise.safetensors"
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_network_dim"] == str(rank)
            assert file.metadata()["ss_steps"] == str(steps)


def test_two_processes_train_what_one_does_with_twice_the_accumulation(
    tmp_path: Path, cache: Path
) -> None:
    common = [*SHORT, f"data.cache={cache}", "steps=2", "batch_size=2", "data.caption_dropout=0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(settings.compose([*common, f"output_dir={one}", "accumulate=2"]))
    command = [sys.executable, "-m", "tests.forked_runs", "2"]
    done = subprocess.run(
        [*command, *common, f"output_dir={two}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,  # gloo may abort a process after all is written
    )
    for expert in ("high", "low"):
        name = f"demo_{expert}_noise.safetensors"
        assert (two / name).exists(), done.stderr[-2000:]
        ours, theirs = load_file(one / name), load_file(two / name)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=2e-2, atol=2e-4)


def test_previews_are_written_beside_the_base(tmp_path: Path, cache: Path) -> None:
    prompts = "preview.prompts=[A zorbi at night.]"
    run(tmp_path, cache, "steps=2", prompts, "preview.steps=2", "preview.frames=5")
    (sheet,) = (tmp_path / "out" / "samples").rglob("sheet.png")
    assert len(list(sheet.parent.glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.path=nowhere", ["model.path", "nowhere"]),
        ("data.path=nowhere", ["data.path", "nowhere"]),
        ("high.rank=0", ["high.rank", "0", "at least 1"]),
        ("experts=[medium]", ["experts", "medium", "high"]),
        ("data.height=40", ["data.height", "40", "16"]),
        ("optim.name=torch.optim.Adamm", ["optim.name", "Adamm"]),
        ("preview.frames=4", ["preview.frames", "4n+1"]),
        ("preview.height=40", ["preview.height", "16"]),
        ("name=my_checkpoint", ["name", "checkpoint"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(override: str, words: list[str]) -> None:
    """`check` reads headers only: nothing is encoded, loaded or written when it refuses."""
    with pytest.raises(ValueError, match=r"\w") as error:
        check(settings.compose([*SHORT, override]), CPU, silent)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mistakes_in_the_data_folder_are_told_with_the_file(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError, match=r"\w") as error:
            check(settings.compose([*SHORT, f"data.path={tmp_path}"]), CPU, silent)
        return str(error.value)

    assert "no video or image" in message()
    (tmp_path / "lonely.txt").write_text("A zorbi.")
    (tmp_path / "fine.png").write_bytes((ROOT / "datasets/demo/train/image_01.png").read_bytes())
    (tmp_path / "fine.txt").write_text("A zorbi.")
    assert "lonely.txt" in message()
    (tmp_path / "lonely.mp4").write_bytes(b"not a video")
    assert "lonely.mp4" in message()
