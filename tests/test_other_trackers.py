"""Trackers that accelerate knows, beside W&B."""

import importlib.util
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from tests.trackers import config_of
from train.other_trackers import OtherTrackers, check_trackers
from train.rules import ConfigError


class InMemory(GeneralTracker):
    """A tracker of accelerate's own kind that keeps what it is told."""

    name = "in_memory"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.told: list[object] = [run_name, logging_dir]

    @property
    def tracker(self) -> list[object]:
        return self.told

    def start(self) -> None:
        self.told.append("started")

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(values)

    def log(self, values: dict, step: int | None = None) -> None:
        if step == 9:
            raise OSError("disk full")
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


def test_figures_and_flat_settings_reach_a_tracker_until_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[InMemory] = []

    def make(*places: str) -> InMemory:
        made.append(InMemory(*places))
        return made[-1]

    make.requires_logging_directory = True  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "in_memory", make)
    said: list[str] = []
    config = config_of("tracking.others=[in_memory]", "+data.mix.faces={path: faces}")
    trackers = OtherTrackers(config, tmp_path, said.append)
    for step in (3, 9, 12):
        trackers.log({"a": 1.5}, step)
    trackers.finish()
    name, folder, started, settings, *figures = made[0].told
    assert (name, folder, started) == ("toy", str(tmp_path / "trackers"), "started")
    assert isinstance(settings, dict)
    assert settings["lora.rank"] == 16
    assert settings["data.mix.faces.path"] == "faces"
    assert settings["preview.seeds"] == "[0]"
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())
    assert figures == [(3, {"a": 1.5})]
    assert said == ["in_memory  lost (disk full): figures are in the run's folder, as always"]


def test_a_tracker_that_cannot_be_used_is_told_before_training() -> None:
    check_trackers([])
    with pytest.raises(ConfigError, match=r"tracking\.others holds tensorbord: expected .*tensorb"):
        check_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match=r"W&B is set by tracking\.mode"):
        check_trackers(["wandb"])
    missing = [name for name in ("swanlab", "aim") if importlib.util.find_spec(name) is None]
    with pytest.raises(ConfigError, match=f"pip install {missing[0]}"):
        check_trackers(missing)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs pip install tensorboard"
)
def test_tensorboard_writes_into_the_runs_folder(tmp_path: Path) -> None:
    check_trackers(["tensorboard"])
    trackers = OtherTrackers(config_of("tracking.others=[tensorboard]"), tmp_path, lambda _: None)
    trackers.log({"train/low/loss": 1.5}, 3)
    trackers.finish()
    assert list(tmp_path.glob("trackers/toy/events.out.tfevents.*"))
