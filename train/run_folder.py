"""The folder of a run: always of the same name, and never over an earlier run's results.

The same command goes on with the run that it finds there, from the newest checkpoint that is sound.
"""

import itertools
import json
import logging
import os
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from train.checkpoint import PARTIAL, Checkpoint, checkpoints_in, read_checkpoint
from train.compose import resolved_yaml, trained_experts
from train.config import Config
from train.dataset import Clips, overview
from train.resume import check_settings
from train.rules import ConfigError

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
DATASET = "dataset.json"
BASE_SAMPLES = "base.safetensors"  # in samples/
# What a run writes before its first checkpoint, and writes again if it is started once more.
WRITTEN_AGAIN = {
    "config.yaml", DATASET, "metrics.jsonl", "report.html", "wandb", "trackers", "samples",
    "checkpoints",
}  # fmt: skip
HALF_WRITTEN = {f".{name}{PARTIAL}" for name in ("config.yaml", DATASET)}


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and from where it goes on."""

    path: Path
    checkpoint: Checkpoint | None  # None: from the start
    finished: bool  # nothing is left to do


def open_run_folder(config: Config, accelerator: Accelerator) -> RunFolder:
    """The run's folder with its resolved settings: one to go on with, or a new one.

    An earlier run that this one does not go on with is moved aside. `ConfigError` if the folder
    cannot be used, or the run in it cannot go on with these settings.
    """
    folder = Path(config.output_dir)
    chosen: list[str | None] = [None]
    try:
        if accelerator.is_main_process:
            checkpoint = _checkpoint_to_go_on_from(folder, config)
            chosen = [None if checkpoint is None else str(checkpoint.path)]
            _make_ready(folder, checkpoint, config)
    except OSError as error:
        raise ConfigError(
            f"output_dir is {config.output_dir}, which cannot be written ({error.strerror}). "
            "Set output_dir=… to a folder that can."
        ) from error
    (path,) = broadcast_object_list(chosen)
    if path is None:
        return RunFolder(folder, None, finished=False)
    checkpoint = read_checkpoint(Path(path))
    assert isinstance(checkpoint, Checkpoint), checkpoint
    return RunFolder(folder, checkpoint, _is_finished(folder, checkpoint, config))


def write_summary(folder: Path, summary: dict[str, object]) -> None:
    """The figures of a finished run, as JSON for programs."""
    _write(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def write_dataset(folder: Path, clips: Clips) -> None:
    """What a run is trained and measured on, as JSON for programs."""
    _write(folder / DATASET, json.dumps(overview(clips), indent=2) + "\n")


def _checkpoint_to_go_on_from(folder: Path, config: Config) -> Checkpoint | None:
    """The one that `resume` names, or the newest sound one of this folder."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = _newest_sound(folder / "checkpoints")
    else:
        found = read_checkpoint(Path(config.resume))
        if isinstance(found, str):
            raise ConfigError(
                f"resume is {config.resume}, which is no sound checkpoint: {found}. Set it to a "
                "folder such as outputs/NAME/checkpoints/step_000000500, or to auto."
            )
    if found is not None:
        check_settings(found, config)
    return found


def _newest_sound(checkpoints: Path) -> Checkpoint | None:
    for path in reversed(checkpoints_in(checkpoints)):
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return found
        log.warning("damaged    %s: %s; the one before it is used", path, found)
    return None


def _make_ready(folder: Path, checkpoint: Checkpoint | None, config: Config) -> None:
    """Put aside what is not gone on with, and write the settings."""
    checkpoints = folder / "checkpoints"
    if checkpoint is not None and _is_in(checkpoint.path, checkpoints):
        if _is_finished(folder, checkpoint, config):
            return
        _set_later_aside(checkpoints, checkpoint.path)
        (folder / SUMMARY).unlink(missing_ok=True)
    elif not _can_begin_in(folder):
        _refuse_to_move(folder, config)
        if any(folder.iterdir()):  # else a run was killed before it wrote its settings
            _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.yaml", resolved_yaml(config))


def _is_finished(folder: Path, checkpoint: Checkpoint, config: Config) -> bool:
    """Whether the run has all its steps, and its files were exported after them."""
    if not (folder / SUMMARY).is_file() or not _is_in(checkpoint.path, folder / "checkpoints"):
        return False
    done = cast("dict", checkpoint.state["learners"])
    early = cast("dict", checkpoint.state.get("stopped", {})) if config.eval.early_stop else {}
    return all(
        expert in early
        or done.get(expert, {"steps_done": 0})["steps_done"]
        >= attrgetter(f"{expert}.steps")(config)
        for expert in trained_experts(config)
    )


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def _can_begin_in(folder: Path) -> bool:
    """Whether there is nothing, or a run that ended before its first checkpoint."""
    if not folder.exists():
        return True
    names = {path.name for path in folder.iterdir()}
    if not names & {"config.yaml", f".config.yaml{PARTIAL}"}:
        return False
    made = names - WRITTEN_AGAIN - HALF_WRITTEN
    shown = {path.name for path in folder.glob("samples/[!.]*")} - {BASE_SAMPLES}
    return not made and not shown and not any(folder.glob("checkpoints/[!.]*"))


def _refuse_to_move(folder: Path, config: Config) -> None:
    """A folder that exists is set aside only if it is a run's, and holds nothing of the user's."""
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
    free = _free_name(folder)
    folder.rename(free)
    log.warning("earlier    %s was moved to %s", folder, free)


def _set_later_aside(checkpoints: Path, last: Path) -> None:
    """Move what comes after the checkpoint `last` to checkpoints-1: those steps are done again."""
    later = [path for path in checkpoints_in(checkpoints) if path.name > last.name]
    if later:
        free = _free_name(checkpoints)
        free.mkdir()
        for path in later:
            path.rename(free / path.name)
        log.warning("later      %d checkpoints were moved to %s", len(later), free)


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _write(path: Path, text: str) -> None:
    """Write a small file, seen whole or not at all."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
