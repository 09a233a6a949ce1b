"""Trackers beside W&B, such as TensorBoard: those that accelerate knows, with figures alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from train.compose import leaves
from train.config import Config
from train.rules import ConfigError

FOLDER = "trackers"  # in the run's, for those that write files


def check_trackers(names: Sequence[str]) -> None:
    """`ConfigError` for a name that accelerate does not know, or whose package is missing."""
    known = sorted(set(LOGGER_TYPE_TO_CLASS) - {"wandb"})
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"tracking.others holds {name}: expected some of {', '.join(known)}. W&B is set "
                "by tracking.mode."
            )
        if name not in installed:
            package = name.replace("_", "-")
            raise ConfigError(
                f"tracking.others holds {name}, but its package is not installed. Install it "
                f"(pip install {package}), or leave it out: metrics.jsonl has every figure."
            )


class OtherTrackers:
    """The configured trackers; one that fails is told, and left out from then on."""

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None]) -> None:
        """Begin a run of each, with the settings by their dotted names."""
        self._say = say
        self._open: dict[str, GeneralTracker] = {}
        settings = {path: _plain(value) for path, value in leaves(asdict(config)).items()}
        for name in config.tracking.others:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if kind.requires_logging_directory:
                tracker = kind(config.name, str(folder / FOLDER))
            else:
                tracker = kind(config.tracking.project)
            tracker.start()
            tracker.store_init_configuration(settings)
            self._open[name] = tracker

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send the figures of a step."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(dict(figures), step=step)
            except OSError as error:
                del self._open[name]
                self._say(f"{name:<10} lost ({error}): figures are in the run's folder, as always")

    def finish(self) -> None:
        """Send what is left."""
        for tracker in self._open.values():
            tracker.finish()


def _plain(value: object) -> bool | int | float | str:
    """A setting as trackers take it: lists are text."""
    return value if isinstance(value, bool | int | float | str) else str(value)
