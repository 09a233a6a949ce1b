"""Overfitting is told, an expert stops alone, and the best checkpoint has a reason."""

import json
from pathlib import Path

import pytest

from tests.resumable_runs import (
    assert_same_run,
    config_of,
    figures,
    last_state,
    left_after,
    make_data,
    run,
    same_tensors,
)
from train.checkpoint import checkpoints_in
from train.evaluation import Beside
from train.history import History
from train.turns import Turns
from train.validate import HeldoutLoss, change
from train.verdict import judge, write_best


def loss_of(*by_draw: float) -> HeldoutLoss:
    mean = sum(by_draw) / len(by_draw)
    return HeldoutLoss("low", mean, 0.1, [mean], [0.0, 1.0], list(by_draw))


def history_of(*measured: tuple[int, float, float]) -> History:
    """(own steps, held-out loss, loss on training clips) each; noise is 0.01 about a difference."""
    history = History()
    for done, (steps, heldout, trained) in enumerate(measured):
        wobble = 0.01 * done
        history.heldout[done] = [loss_of(heldout + wobble, heldout - wobble)]
        history.beside[done] = {"low": Beside(steps, loss_of(trained, trained), 0.0)}
    return history


def test_a_change_has_the_error_of_differences() -> None:
    risen, error = change(loss_of(1.0, 5.0, 9.0), loss_of(1.1, 5.3, 9.2))
    assert risen == pytest.approx(0.2)
    assert error == pytest.approx(0.1 / 3**0.5)  # the losses themselves are 4 apart
    assert change(loss_of(1.0, 2.0), loss_of(1.0, 2.0)) == (0.0, 0.0)
    assert change(loss_of(1.0), loss_of(2.0))[1] == float("inf")
    assert change(loss_of(1.0, 2.0), loss_of(1.0, 2.0, 3.0))[1] == float("inf")


@pytest.mark.parametrize(
    ("measured", "stale", "rising"),
    [
        ([(0, 1.0, 1.0), (5, 0.8, 0.8), (9, 0.6, 0.6)], 0, 0),
        ([(0, 1.0, 1.0), (5, 0.8, 0.8), (9, 0.9, 0.7), (12, 1.0, 0.6)], 2, 2),
        ([(0, 1.0, 1.0), (5, 0.8, 0.8), (9, 0.9, 0.9)], 1, 0),  # nothing is learned by heart
        ([(0, 1.0, 1.0), (5, 0.8, 0.8), (9, 0.799, 0.7), (12, 0.801, 0.6)], 2, 0),  # a plateau
        ([(0, 1.0, 1.0), (5, 0.8, 0.8), (5, 0.9, 0.7), (5, 0.9, 0.7)], 0, 0),  # it did not move
        ([(0, 1.0, 1.0), (5, 0.8, 0.8), (9, 0.9, 0.7), (12, 0.8, 0.6)], 2, 0),  # no longer
        ([(0, 1.0, 1.0)], 0, 0),
    ],
)
def test_an_expert_overfits_if_it_rises_beyond_its_error_while_training_clips_fall(
    measured: list[tuple[int, float, float]], stale: int, rising: int
) -> None:
    verdict = judge(history_of(*measured), "low")
    assert (verdict.stale, verdict.rising) == (stale, rising)


def test_one_estimate_alone_never_raises_the_alarm() -> None:
    history = History()
    for done, loss in enumerate((1.0, 0.8, 1.5, 1.6, 1.7)):
        history.heldout[done] = [loss_of(loss)]
        history.beside[done] = {"low": Beside(done, loss_of(1 / (1 + done)), 0.0)}
    verdict = judge(history, "low")
    assert (verdict.lowest.done, verdict.rising) == (1, 0)


def test_the_words_name_expert_and_figures() -> None:
    measured = [(0, 1.0, 1.0), (5, 0.8, 0.8), (9, 0.9, 0.7)]
    told = judge(history_of(*measured), "low").told("low")
    assert told.startswith("low expert: since step 1 its held-out loss has changed by +0.1000")
    assert "that on clips trained on by -0.1000" in told


def test_an_expert_that_ends_is_passed_over_and_the_other_goes_on() -> None:
    turns = Turns({"high": 4, "low": 4}, 2)
    order = []
    for expert, step in turns:
        order.append((expert, step))
        if (expert, step) == ("high", 0):
            turns.end("high")
    assert order == [("high", 0), *[("low", step) for step in range(4)]]


def test_best_names_checkpoint_files_and_reason(tmp_path: Path) -> None:
    history = history_of((0, 1.0, 1.0), (1, 0.8, 0.8), (2, 0.5, 0.8), (3, 0.7, 0.8))
    checkpoints = [tmp_path / "checkpoints" / f"step_{step:09d}" for step in (1, 3, 7)]
    for path in checkpoints:
        path.mkdir(parents=True)
        for name in (f"toy_{path.name[5:]}_low_noise.safetensors", "state_low.safetensors"):
            (path / name).touch()
    write_best(tmp_path, history, checkpoints)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["step"] == 3  # 2 was better, but was not saved; 7 was not measured
    assert best["checkpoint"] == "checkpoints/step_000000003"
    assert best["files"] == ["toy_000000003_low_noise.safetensors"]
    assert best["heldout"]["low"] == {"loss": 0.7, "standard_error": 0.1, "base": 1.0}
    assert "0.7000 as mean of the experts, of 2 checkpoints" in best["reason"]
    write_best(tmp_path / "nowhere", history, [])  # nothing to tell


# Beyond all measure: the loss on clips held out rises at once. Only low moves that far.
BURNS = [
    "steps=4", "turn_steps=1", "eval.every=1", "eval.patience=1", "eval.early_stop=true",
    "eval.draws=3", "low.learning_rate=1", "high.learning_rate=0.0001", "preview.prompts=[]",
    "lora.ema=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("verdict"))


@pytest.fixture(scope="module")
def burnt(home: Path, toy_model: Path) -> Path:
    return run(config_of(home, toy_model, "burnt", *BURNS))


def state_of(folder: Path) -> dict:
    return json.loads((checkpoints_in(folder / "checkpoints")[-1] / "state.json").read_text())


def test_one_expert_stops_early_and_the_other_goes_on(burnt: Path) -> None:
    state = state_of(burnt)
    assert state["stopped"]["low"] < 4
    done = {expert: learner["steps_done"] for expert, learner in state["learners"].items()}
    assert done["low"] == state["stopped"]["low"]
    assert done["high"] == state["stopped"].get("high", 4)
    last = max(state["heldout"], key=int)
    assert int(last) == sum(done.values())  # the end was measured, too
    assert (burnt / "summary.json").is_file()


def test_a_run_that_stopped_early_goes_on_exactly(
    home: Path, toy_model: Path, burnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = state_of(burnt)["stopped"]["low"]
    folder = left_after(burnt, home / "out" / "again", 2 * low)  # low has just stopped
    run(config_of(home, toy_model, "again", *BURNS))
    assert "ends early low" not in capsys.readouterr().out
    assert_same_run(folder, burnt)


def test_a_run_that_stopped_early_is_finished(
    home: Path, toy_model: Path, burnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in burnt.rglob("*")}
    run(config_of(home, toy_model, "burnt", *BURNS))
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in burnt.rglob("*")} == before


def test_without_early_stop_it_is_only_told(
    home: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(config_of(home, toy_model, "told", *BURNS, "eval.early_stop=false"))
    assert state_of(folder)["stopped"] == {}
    assert "ends early" not in capsys.readouterr().out


def test_every_figure_is_in_the_metrics(burnt: Path) -> None:
    names = set().union(*figures(burnt))
    for expert in ("high", "low"):
        assert {
            f"trained_on/{expert}/loss", f"trained_on/{expert}/bin_1", f"gap/{expert}",
            f"drift/{expert}", f"heldout_ema/{expert}/loss", f"alarm/{expert}",
            f"health/{expert}/norm", f"health/{expert}/norm/block_00",
            f"health/{expert}/update/ffn.net.2", f"health/{expert}/effective_rank",
            f"health/{expert}/dead", f"train/{expert}/running_bin_0", f"grad_norm/{expert}",
        } <= names  # fmt: skip
    live, average = (
        [f[f"{name}/low/loss"] for f in figures(burnt) if f.get(f"{name}/low/loss") and f["step"]]
        for name in ("heldout", "heldout_ema")
    )
    assert len(average) == len(live) > 0
    assert all(one != other for one, other in zip(live[1:], average[1:], strict=True))


def test_looking_changes_no_training(home: Path, toy_model: Path) -> None:
    """Measured and rendered at each step with all that there is, or never: the same to the bit."""
    looks = ["eval.every=1", "preview.every=1", "preview.grid=true"]
    rates = ["steps=2", "turn_steps=1", "lora.alpha=3", "lora.rank=5", "lora.ema=0.5"]
    often = run(config_of(home, toy_model, "often", *rates, *looks))
    never = ["eval.every=0", "preview.every=0", "preview.prompts=[]"]
    seldom = run(config_of(home, toy_model, "seldom", *rates, *never))
    assert len(list((often / "samples").glob("step_*/*_grid.mp4"))) == 4
    trained, alone = last_state(often), last_state(seldom)
    kept = [name for name in alone if " measured." not in name]
    assert len(kept) > 100
    assert same_tensors({n: trained[n] for n in kept}, {n: alone[n] for n in kept})
