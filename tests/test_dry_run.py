"""A rehearsal takes every kind of step and leaves nothing."""

from pathlib import Path

import pytest

from tests.full_size_models import full_size_model
from tests.toy_runs import config_of, make_image, make_video
from train import lora
from train.compose import compose
from train.rehearsal import rehearsed, schedule
from train.rules import ConfigError
from wan.variants import VARIANTS


@pytest.mark.parametrize("name", ["i2v_a14b", "ti2v_5b"])
def test_every_kind_of_step_is_taken(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    full_size_model(tmp_path / "model", VARIANTS[name])
    for number in range(3):
        make_video(tmp_path / "data" / f"{number}.mp4", 9 + 4 * number, "A clip.", (64, 96))
    image = make_image(tmp_path / "first.png", 0, "An image.")
    images = [f"preview.images=[{image}]"]
    config = compose(
        [
            "name=mira", f"model={name}", f"model.path={tmp_path}/model",
            f"data.path={tmp_path}/data", f"data.cache={tmp_path}/cache", "data.workers=0",
            "data.height=64", "data.width=96", f"output_dir={tmp_path}/out", "dry_run=true",
            "preview.prompts=['A clip.']", "lora.rank=2", *images,
        ]
    )  # fmt: skip
    with rehearsed(config) as toy:
        lora.train(toy)
    said = capsys.readouterr().out
    parts = ["schedule   ", "latents: 0 reused, 4 encoded", "held-out   sigma", "saved      "]
    for part in [*parts, "sheet.png", "reloaded by diffusers", "dry run    done"]:
        assert part in said, part
    assert not (tmp_path / "out").exists()
    assert not Path(toy.output_dir).parent.exists()


def test_the_schedule_is_that_of_the_run(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, tmp_path, "steps=250", "turn_steps=100", "high.steps=150", "eval.every=0"
    )
    lines = schedule(config).splitlines()
    assert lines[0] == "schedule   400 steps: high 100, low 100, high 50, low 150"
    assert lines[1].split(maxsplit=1) == ["measured", "at the end"]
    assert lines[2].split() == ["samples", "none"]


def test_a_rehearsal_is_on_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = config_of(tmp_path, tmp_path, "dry_run=true")
    with pytest.raises(ConfigError, match="one process"), rehearsed(config):
        pass
