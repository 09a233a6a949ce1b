"""Steps that are really done, to plan with: their times stand in place of the predicted ones."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from data.shapes import Bucket
from tests.test_out_of_memory import full_memory
from tests.toy_runs import make_image, make_video
from tools import plan as program
from train import plan
from train.plan import Work, as_measured
from wan.cards import H200

SMALL, LARGE, FILM = Bucket(1, 32, 48), Bucket(1, 64, 96), Bucket(5, 32, 48)


@pytest.fixture
def settings(tmp_path: Path, toy_model: Path) -> list[str]:
    """Of a dataset of two shapes, neither of which fills a batch often."""
    for seed in range(3):
        make_image(tmp_path / "data" / f"{seed}.png", seed, f"noise {seed}")
        make_video(tmp_path / "data" / f"film_{seed}.mp4", 5 + seed, f"film {seed}")
    return [
        "name=toy", "model=tiny", f"model.path={toy_model}", f"data.path={tmp_path / 'data'}",
        f"data.cache={tmp_path / 'cache'}", "data.height=32", "data.width=48", "data.frames=5",
        "data.workers=0", "lora.rank=2", "batch_size=2", "accumulate=3", "steps=500",
        f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip


def test_steps_are_timed_on_each_shape_and_nothing_but_the_cache_is_written(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([*settings, "--measure", "--hourly-rate", "3600"])
    said = capsys.readouterr().out
    passes = dict(re.findall(r"(\dx32x48) ([\d.e-]+) s", said.partition("measured ")[2]))
    assert passes.keys() == {"1x32x48", "5x32x48"}
    assert all(float(seconds) > 0 for seconds in passes.values())
    (cost,) = re.findall(r"1,000 steps: .*\$([\d,.]+) at \$3600 an hour", said)
    least, most = (3000 * f(map(float, passes.values())) for f in (min, max))
    assert 0.9 * least < float(cost.replace(",", "")) < 1.1 * most
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]
    assert len(list(tmp_path.glob("cache/latents/*"))) <= 2  # a clip of each shape


def test_full_memory_while_timing_has_its_remedies(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with full_memory("WanRotaryPosEmbed", lambda _: True), pytest.raises(SystemExit):
        program.main([*settings, "--measure"])
    assert "is full, while training, which is predicted" in capsys.readouterr().err


def test_another_card_cannot_be_measured_here(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main([*settings, "--measure", "--gpu", "4090"])
    assert "--measure times this machine, and --gpu plans for another" in capsys.readouterr().err


def test_measured_times_stand_and_others_are_scaled_as_they_are() -> None:
    works = [Work(bucket, (), 0.0, float(i)) for i, bucket in enumerate((SMALL, LARGE, FILM), 1)]
    assert as_measured(works, {}) == works
    found = as_measured(works, {SMALL: 2.0, LARGE: 5.0})
    assert [work.seconds for work in found] == [2.0, 5.0, 2.25 * 3]


def test_hours_of_training_are_those_of_measured_passes(settings: list[str]) -> None:
    checked = plan.look_up(program.compose(settings), lambda steps, _: steps)
    setting = plan.setting_of(checked, H200)
    times = dict.fromkeys(plan.buckets_of(checked.clips.train), 7.2)
    spent = plan.hours(replace(setting, measured=times), checked)
    assert spent.training == pytest.approx(1000 * 3 * 7.2 / 3600)
    assert spent.measuring == plan.hours(setting, checked).measuring
