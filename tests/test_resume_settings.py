"""Going on with other settings: what is told, what is refused, and what a reason allows."""

from pathlib import Path

import pytest
import torch

from tests.resumable_runs import config_of, last_state, left_after, make_data, run
from tests.toy_runs import make_image
from train.checkpoint import checkpoints_in, step_of
from train.rules import ConfigError

FEW = ["steps=2", "turn_steps=1", "optim.warmup_steps=0", "preview.prompts=[]", "eval.every=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def whole(home: Path, toy_model: Path) -> Path:
    return run(config_of(home, toy_model, "whole", *FEW))


def stopped(whole: Path, name: str, step: int = 2) -> Path:
    return left_after(whole, whole.with_name(name), step)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lora.rank=4", "lora.rank: 2 -> 4"),
        ("low.rank=4", "low.rank: 2 -> 4"),
        ("lora.alpha=1", "lora.alpha: 2"),
        ("lora.targets=attention", "lora.targets: all -> attention"),
        ("seed=1", "seed: 0 -> 1"),
        ("batch_size=2", "batch_size: 1 -> 2"),
        ("experts=[low]", "experts: null -> [low]"),
        ("optim.name=torch.optim.Adam", "optim.name: torch.optim.AdamW -> torch.optim.Adam"),
    ],
)
def test_what_makes_another_run_is_refused_with_both_values(
    home: Path, toy_model: Path, whole: Path, override: str, told: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(ConfigError) as error:
        run(config_of(home, toy_model, "whole", *FEW, override))
    for words in (told, "resume=never", "resume_reason", "step_000000004"):
        assert words in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_other_settings_change_and_are_told(
    home: Path, toy_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(whole, "told")
    changed = ["optim.learning_rate=0.002", "optim.args.weight_decay=0.5", "lora.dropout=0.1"]
    run(config_of(home, toy_model, "told", *FEW, *changed))
    said = capsys.readouterr().out
    assert "changed    optim.learning_rate: 0.01 -> 0.002" in said
    assert "changed    optim.args.weight_decay: 0.01 -> 0.5" in said
    assert "changed    lora.dropout: 0.3 -> 0.1" in said
    assert "seed" not in said
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 4
    # An argument of the optimizer that changed is used, although its state was saved with the old.
    state = (checkpoints_in(folder / "checkpoints")[-1] / "state.json").read_text()
    assert '["weight_decay", 0.5]' in state
    assert '["weight_decay", 0.01]' not in state


def test_more_steps_go_on_with_a_finished_run(home: Path, toy_model: Path, whole: Path) -> None:
    folder = left_after(whole, whole.with_name("more"), 4)
    (folder / "summary.json").write_text("{}")  # it had finished
    run(config_of(home, toy_model, "more", *FEW, "steps=3"))
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 6
    assert "heldout_base" in (folder / "summary.json").read_text()


def test_a_reason_lets_another_rank_go_on_with_what_fits(
    home: Path, toy_model: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(whole, "forced")
    reason = "resume_reason='rank 2 was too small'"
    run(config_of(home, toy_model, "forced", *FEW, "low.rank=4", "low.alpha=4", reason))
    said = capsys.readouterr().out
    assert "changed    low.rank: 2 -> 4" in said
    assert "low: 0 of 40 tensors of the adapter go on, the others and the optimizer start" in said
    assert "high: " not in said.partition("goes on")[2].partition("saved")[0]
    ranks = {t.shape[0] for n, t in last_state(folder).items() if "adapter" in n and "lora_A" in n}
    assert ranks == {2, 4}


def test_other_items_are_refused_unless_there_is_a_reason(
    home: Path, toy_model: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(whole, "items")
    for seed in range(6):
        make_image(tmp_path / "data" / f"{seed}.png", 100 + seed, "other")
    other = [f"data.path={tmp_path / 'data'}", f"data.cache={tmp_path / 'cache'}"]
    with pytest.raises(ValueError, match="another order of batches"):
        run(config_of(home, toy_model, "items", *FEW, *other))
    run(config_of(home, toy_model, "items", *FEW, *other, "resume_reason=more pictures"))
    assert "the order of items is another one from here on" in capsys.readouterr().out
    assert step_of(checkpoints_in(folder / "checkpoints")[-1]) == 4


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    home: Path, toy_model: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped(whole, "damaged", 3)
    newest = folder / "checkpoints" / "step_000000003"
    weights = newest / "state_low.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run(config_of(home, toy_model, "damaged", *FEW))
    told = f"{newest}: state_low.safetensors holds other bytes than were written"
    assert told in caplog.text
    for name, tensor in last_state(whole).items():
        assert torch.equal(tensor, last_state(folder)[name])


def test_what_resume_names_must_be_a_sound_checkpoint(
    home: Path, toy_model: Path, whole: Path
) -> None:
    with pytest.raises(ConfigError, match="resume is nowhere, which is no sound checkpoint"):
        run(config_of(home, toy_model, "new", *FEW, "resume=nowhere"))
    assert not (home / "out" / "new").exists()


def test_the_newest_and_the_best_checkpoints_stay(home: Path, toy_model: Path) -> None:
    # Learning backwards: the first measured checkpoint is the best.
    own = [*FEW, "eval.every=1", "checkpoint.keep=1", "optim.learning_rate=0.5"]
    folder = run(config_of(home, toy_model, "best", *own))
    steps = [step_of(path) for path in checkpoints_in(folder / "checkpoints")]
    assert steps[-1] == 4
    assert len(steps) == 2
    state = (folder / "checkpoints" / "step_000000004" / "state.json").read_text()
    assert f'"best": {steps[0]}' in state
