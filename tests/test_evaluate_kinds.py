"""tools.evaluate on runs of other models and other adapters than a pair of plain ones."""

import json
from collections.abc import Sequence
from pathlib import Path

import decord
import numpy as np
import pytest

from tests import resumable_runs, toy_runs
from tests.toy_runs import make_image, make_video
from tools.evaluate import evaluate, parsed
from train.config import Config
from train.lora import train

STRENGTHS = ["--strengths", "0.5", "1"]


def evaluated(folder: Path, *words: str) -> Path:
    """Grid and sweep of a run's final adapters; their folder."""
    evaluate(parsed([str(folder), "--grid", "--sweep", *STRENGTHS, *words]))
    (target,) = (folder / "evaluation").glob("step_*")
    return target


def videos_of(path: Path) -> dict[str, np.ndarray]:
    """The frames of each video that a JSON list names, by its strengths."""
    return {
        json.dumps(row["strengths"]): decord.VideoReader(str(path.with_name(row["file"])))[
            :
        ].asnumpy()
        for row in json.loads(path.read_text())
    }


def check_measured(folder: Path, target: Path, experts: Sequence[str]) -> None:
    """The losses of the sweep are those of the run: of the base at 0, of its adapters at 1."""
    written = json.loads((target / "sweep" / "strengths.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert list(written["measured"]) == list(experts)
    for expert in experts:
        base, half, as_trained = written["measured"][expert]
        was, now = summary["heldout_base"][expert], summary["heldout_adapters"][expert]
        assert base["loss"] == pytest.approx(was["mean"], rel=1e-6)
        assert as_trained["loss"] == pytest.approx(now["mean"], rel=1e-4)
        assert len({base["loss"], half["loss"], as_trained["loss"]}) == 3


def given_images(home: Path, name: str, model: Path) -> Config:
    """A run whose previews start from an image."""
    for frames in (9, 10, 11):
        make_video(home / "data" / f"{frames}.mp4", frames, f"a video {frames}", (32, 64))
    image = make_image(home / "start.png", 0, "", (48, 40))
    return toy_runs.config_of(
        home / "data", model, f"model={name}", f"model.path={model}", "model.dtype=float32",
        "data.width=64", "data.frames=9", "data.heldout_fraction=0.3", "steps=2", "turn_steps=1",
        "optim.warmup_steps=0", "optim.learning_rate=0.1", "eval.bins=1", "eval.draws=2",
        "checkpoint.every=2", f"output_dir={home / 'out'}", "preview.prompts=[a fox]",
        f"preview.images=[{image}]", "preview.steps=2", "preview.frames=5", "preview.height=32",
        "preview.width=64", "preview.guidance_low=1", "tracking.mode=disabled",
        "export.dtype=float32",
    )  # fmt: skip


def check_images(target: Path, strengths: Sequence[dict[str, float]]) -> None:
    """Each combination has a video of its own that is told to start from the image."""
    rows = json.loads((target / "grid" / "grid.json").read_text())
    assert [row["strengths"] for row in rows] == list(strengths)
    assert {row["image"] for row in rows} == {"start.png"}


def test_a_run_of_i2v_is_evaluated_from_its_image(toy_i2v_model: Path, tmp_path: Path) -> None:
    train(given_images(tmp_path, "i2v_a14b", toy_i2v_model))
    target = evaluated(tmp_path / "out")
    check_images(target, [{"high": 1.0, "low": 1.0}, {"high": 1.0}, {"low": 1.0}])
    check_measured(tmp_path / "out", target, ["high", "low"])
    assert len(videos_of(target / "sweep" / "sweep.json")) == 4


def test_a_run_of_one_transformer_has_one_adapter_to_turn(
    toy_ti2v_model: Path, tmp_path: Path
) -> None:
    train(given_images(tmp_path, "ti2v_5b", toy_ti2v_model))
    target = evaluated(tmp_path / "out")
    check_images(target, [{"single": 1.0}])
    assert {path.name for path in (target / "grid").iterdir()} == {
        "00_adapters.mp4", "00_base_and_adapters.mp4", "grid.json", "sheet.png",
    }  # fmt: skip
    check_measured(tmp_path / "out", target, ["single"])
    half, whole = videos_of(target / "sweep" / "sweep.json").values()
    moved = np.abs(half.astype(int) - whole).mean((1, 2, 3))
    assert moved[0] < 1  # the image, whatever the adapter does
    assert moved[1:].max() > 1


def test_a_run_of_dora_is_evaluated(toy_model: Path, tmp_path: Path) -> None:
    home = resumable_runs.make_data(tmp_path)
    own = ["lora.kind=dora", "experts=[low]", "steps=2", "eval.draws=2", "checkpoint.every=1"]
    train(resumable_runs.config_of(home, toy_model, "dora", *own))
    folder = home / "out" / "dora"
    check_measured(folder, evaluated(folder, "--matrix"), ["low"])
    matrix = json.loads((folder / "evaluation" / "matrix" / "matrix.json").read_text())
    assert [row["step"] for row in matrix] == [1, 2]
