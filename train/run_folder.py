"""The folder of a run: always of the same name, and never over an earlier run's results."""

import itertools
import json
import logging
from pathlib import Path

from accelerate import Accelerator

from train.compose import resolved_yaml
from train.config import Config
from train.rules import ConfigError

log = logging.getLogger(__name__)


def open_run_folder(config: Config, accelerator: Accelerator) -> Path:
    """The run's empty folder, with its resolved settings; an earlier run is moved aside first."""
    folder = Path(config.output_dir)
    _refuse_to_move(folder, config)
    try:
        if accelerator.is_main_process:
            _set_aside(folder)
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output_dir is {config.output_dir}, which cannot be written ({error.strerror}). "
            "Set output_dir=… to a folder that can."
        ) from error
    accelerator.wait_for_everyone()
    return folder


def _refuse_to_move(folder: Path, config: Config) -> None:
    """A folder that exists is set aside only if it is a run's, and holds nothing of the user's."""
    if not folder.exists():
        return
    places = [Path.cwd(), Path(config.data.path), Path(config.data.cache)]
    holds_more = any(place.resolve().is_relative_to(folder.resolve()) for place in places)
    empty = folder.is_dir() and not any(folder.iterdir())
    if holds_more or not (empty or (folder / "config.yaml").is_file()):
        raise ConfigError(
            f"output_dir is {config.output_dir}, which exists and is not the folder of an earlier "
            "run. Set output_dir=… to a folder of its own."
        )


def _set_aside(folder: Path) -> None:
    """Rename what stands in the way to the first free of folder-1, folder-2, ..."""
    if not folder.exists():
        return
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    folder.rename(free)
    log.warning("earlier    %s was moved to %s", folder, free)


def write_summary(folder: Path, summary: dict[str, object]) -> None:
    """The figures of a finished run, as JSON for programs."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
