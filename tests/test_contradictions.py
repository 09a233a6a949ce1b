"""Settings that contradict each other are refused, and the message names both."""

import shlex
from pathlib import Path

import pytest

from tests.resumable_runs import config_of, make_data, run
from tests.toy_runs import config_of as toy_config
from tests.toy_runs import make_image, planned
from train.compose import CONF, compose
from train.config import schema
from train.errors import explain


def mistake(arguments: str) -> str:
    """What a user reads who types these arguments."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  (of Hydra, of OmegaConf or ours)
        compose(shlex.split(f"name=x data.path=x model.path=x {arguments}"))
    return explain(caught.value)


@pytest.mark.parametrize(
    ("arguments", "both"),
    [
        ("preview.shift=4", ["preview.shift is 4", "preview.prompts=[]", "timesteps.shift"]),
        (
            "preview.shift=4 preview.prompts=[a] preview.distilled=[b]",
            ["preview.shift is 4", "preview.distilled"],
        ),
        (
            "timesteps.base=uniform timesteps.scale=2",
            ["timesteps.scale is 2", "timesteps.base=uniform"],
        ),
        ("model=i2v_a14b data.frames=1", ["data.frames is 1", "model.variant is i2v_a14b"]),
        (
            "model=ti2v_5b preview.guidance_high=4",
            ["preview.guidance_high is 4", "model.variant=ti2v_5b", "preview.guidance_low"],
        ),
        (
            "steps=100 optim.schedule=cosine optim.warmup_steps=100",
            ["optim.warmup_steps is 100", "high.steps is 100"],
        ),
        (
            "experts=[low] low.steps=20 optim.warmup_steps=20",
            ["optim.warmup_steps is 20", "low.steps is 20"],
        ),
        ("eval.early_stop=true eval.every=0", ["eval.early_stop is true", "eval.every is 0"]),
        ("experts=[low] preview.grid=true", ["preview.grid is true", "one expert alone"]),
        ("optim=muon lora.kind=dora", ["torch.optim.Muon", "lora.kind=dora"]),
        ("lora.ema=0.9 optim=schedulefree", ["lora.ema is 0.9", "optim.name"]),
        ("speed.placement=shard speed.frozen=fp8", ["placement is shard", "frozen is fp8"]),
        ("speed.placement=shard launch=experts", ["placement is shard", "launch is experts"]),
        ("speed.placement=shard lora.kind=dora", ["placement is shard", "kind is dora"]),
    ],
)
def test_a_contradiction_is_told_with_both_keys(arguments: str, both: list[str]) -> None:
    said = mistake(arguments)
    assert [part for part in both if part not in said] == []


@pytest.mark.parametrize(
    "key", ["timesteps.boundary", "+timesteps.boundary", "boundary", "+model.boundary_ratio"]
)
@pytest.mark.parametrize("variant", ["t2v_a14b", "i2v_a14b", "ti2v_5b"])
def test_a_boundary_cannot_be_set(key: str, variant: str) -> None:
    said = mistake(f"model={variant} {key}=0.9")
    assert f"{key.removeprefix('+')} is not a key" in said
    assert "belongs to model.variant (0.875 of t2v_a14b, 0.9 of i2v_a14b, 0.875 of tiny)" in said


def test_no_key_and_no_file_has_a_boundary() -> None:
    assert not [path for path in schema() if "boundary" in path]
    assert not [file for file in CONF.rglob("*.yaml") if "boundary:" in file.read_text()]


def test_images_alone_teach_i2v_nothing(tmp_path: Path) -> None:
    make_image(tmp_path / "data" / "a.png", 0, "A picture.")
    config = toy_config(tmp_path / "data", tmp_path, "model=i2v_a14b", "data.frames=5")
    with pytest.raises(ValueError, match=r"a\.png: is a single frame, and Wan 2\.2 I2V-A14B"):
        planned(config)
    config.data.skip_bad = True
    assert [entry.name for entry in planned(config).dropped] == ["a.png"]


def test_more_steps_than_a_schedule_was_made_for_are_told(
    tmp_path: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_data(tmp_path)
    own = ["preview.prompts=[]", "eval.every=0", "optim.schedule=linear", "optim.warmup_steps=0"]
    run(config_of(home, toy_model, "run", *own, "steps=2"))
    run(config_of(home, toy_model, "run", *own, "steps=4"))
    said = capsys.readouterr().out
    assert (
        "changed    low.steps: optim.schedule=linear lasted 2 steps and now lasts 4: after 2 the "
        "learning rate goes on at 0.005, not 0" in said
    )
