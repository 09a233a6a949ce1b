"""tools.evaluate on a run of the toy model: grids, sweeps, matrices, and what they support."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.resumable_runs import config_of, make_data, run
from tools.evaluate import evaluate, main, parsed
from tools.evaluation_stage import choose, saved_pairs
from tools.finished_run import recommended_strengths
from tools.strength_sweep import Curve, combinations
from train.config import Config
from train.rules import ConfigError
from train.validate import HeldoutLoss
from wan.safetensors_writer import file_hashes
from wan.variants import Expert


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Config:
    home = make_data(tmp_path_factory.mktemp("evaluate"))
    own = ["steps=2", "turn_steps=1", "eval.every=1", "eval.draws=2", "checkpoint.every=2"]
    return config_of(home, toy_model, "toy", *own)


@pytest.fixture(scope="module")
def folder(config: Config) -> Path:
    """A finished run of two steps of each expert, with checkpoints after 2 and 4."""
    return run(config)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def entries(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_a_grid_of_the_best_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(parsed([str(folder), "--checkpoint", "2", "--prompt", "a", "--seeds", "0", "1"]))
    target = folder / "evaluation" / "step_000000002" / "grid"
    assert str(target / "sheet.png") in capsys.readouterr().out
    kinds = ("adapters", "base_and_adapters", "grid", "high_only", "low_only")
    videos = [f"{shot:02d}_{kind}.mp4" for shot in (0, 1) for kind in kinds]
    assert names(target) == sorted([*videos, "grid.json", "sheet.png"])
    rows = entries(target / "grid.json")
    assert [(row["strengths"], row["seed"]) for row in rows] == [
        (strengths, seed)
        for strengths in ({"high": 1.0, "low": 1.0}, {"high": 1.0}, {"low": 1.0})
        for seed in (0, 1)
    ]
    assert all((target / row["file"]).is_file() for row in rows)


def test_a_sweep_shows_and_measures_each_strength(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(parsed([str(folder), "--sweep", "--strengths", "0.5", "1", "1.5"]))
    target = folder / "evaluation" / "step_000000004" / "sweep"
    rows = entries(target / "sweep.json")
    found = {(row["strengths"]["high"], row["strengths"]["low"]) for row in rows}
    assert found == {(0.5, 1), (1, 1), (1.5, 1), (1, 0.5), (1, 1.5), (0.5, 0.5), (1.5, 1.5)}
    assert len(rows) == len(found)
    assert all((target / row["file"]).is_file() for row in rows)
    written = json.loads((target / "strengths.json").read_text())
    for expert in ("high", "low"):
        measured = written["measured"][expert]
        assert [row["strength"] for row in measured] == [0.0, 0.5, 1.0, 1.5]
        assert len({row["loss"] for row in measured}) == 4
    summary = json.loads((folder / "summary.json").read_text())
    for expert in ("high", "low"):  # the same measurement as in training, of files in fp32
        base, _, as_trained, _ = written["measured"][expert]
        was, now = summary["heldout_base"][expert], summary["heldout_adapters"][expert]
        assert base["loss"] == pytest.approx(was["mean"], rel=1e-6)
        assert as_trained["loss"] == pytest.approx(now["mean"], rel=1e-5)
    said = capsys.readouterr().out
    assert "<- recommended" in said
    assert "rule: the strength with the lowest held-out loss" in said
    with Image.open(target / "sheet.png") as sheet:
        assert sheet.height > 3 * 192


def test_publishing_takes_what_the_sweep_of_these_files_recommends(folder: Path) -> None:
    hashes: dict[Expert, str] = {
        "high": file_hashes(folder / "toy_high_noise.safetensors").sha256,
        "low": file_hashes(folder / "toy_low_noise.safetensors").sha256,
    }
    target = folder / "evaluation" / "step_000000004" / "sweep" / "strengths.json"
    wanted = json.loads(target.read_text())["recommended"]
    assert recommended_strengths(folder, hashes) == wanted
    other: dict[Expert, str] = {**hashes, "high": "0" * 64}
    assert recommended_strengths(folder, other) == {}
    assert recommended_strengths(folder / "checkpoints", hashes) == {}


def test_a_matrix_has_a_column_for_each_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--matrix"])
    main()
    target = folder / "evaluation" / "matrix"
    assert capsys.readouterr().out.splitlines()[-1] == str(target / "sheet.png")
    rows = entries(target / "matrix.json")
    assert [row["step"] for row in rows] == [2, 4]
    videos = [(target / row["file"]).read_bytes() for row in rows]
    assert videos[0] != videos[1]


def test_checkpoints_are_chosen_by_name(folder: Path, config: Config) -> None:
    pairs = saved_pairs(folder, config)
    assert [pair.step for pair in pairs] == [2, 4, 4]
    assert choose(pairs, "final", None).files["low"].parent == folder
    assert choose(pairs, "best", 2).step == 2
    assert choose(pairs, "4", None).files["low"].parent.name == "step_000000004"
    for wrong in ("best", "3", "newest"):
        with pytest.raises(ConfigError, match=rf"--checkpoint {wrong} .*give final, best, or 2, 4"):
            choose(pairs, wrong, None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strengths", "-1"], "--strengths must be numbers above 0"),
        (["--checkpoint", "77"], "--checkpoint 77 is none of this run"),
    ],
)
def test_what_cannot_be_is_told(folder: Path, words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        evaluate(parsed([str(folder), *words]))


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml is missing"):
        evaluate(parsed([str(tmp_path)]))


def test_a_sweep_varies_each_adapter_and_both() -> None:
    assert combinations(["single"], [0.5, 1.0]) == {
        "single alone": [{"single": 0.5}, {"single": 1.0}]
    }
    rows = combinations(["high", "low"], [0.5])
    assert list(rows.values()) == [
        [{"high": 0.5, "low": 1.0}], [{"high": 1.0, "low": 0.5}], [{"high": 0.5, "low": 0.5}],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "recommended"),
    [
        ({0.0: [9, 9], 0.8: [3.0, 4.0], 1.0: [3.5, 4.5], 1.2: [4, 5]}, 0.8),
        ({0.0: [9, 9], 0.8: [3.0, 4.9], 1.0: [3.5, 4.5], 1.2: [4, 5]}, 1.0),  # not beyond the error
        ({0.0: [1, 1], 0.8: [4.0, 5.0], 1.0: [3.5, 4.5]}, 1.0),  # never the base
        ({0.0: [9], 0.8: [3.0], 1.0: [3.5]}, 1.0),  # one estimate supports nothing
    ],
)
def test_a_strength_is_recommended_only_if_a_number_supports_it(
    losses: dict[float, list[float]], recommended: float
) -> None:
    measured = {
        strength: HeldoutLoss("low", sum(values) / len(values), 0.1, [], [], values)
        for strength, values in losses.items()
    }
    assert Curve(measured).recommended == recommended
