"""When a run is saved, and what happens if that fails."""

import shutil
import tempfile
import traceback
from pathlib import Path

import torch

from train.checkpoint import checkpoints_in, prune, step_of, write_checkpoint
from train.learner import Learner, StepFigures
from train.resume import state_of
from train.rules import TrainingStopped
from train.run import Run
from train.stopping import on_any
from train.verdict import write_best

MEND = "make room, or make the folder writable"
MOST_FAILURES = 2  # in a row, before a run stops that nobody could go on with


def save(run: Run) -> None:
    """Write the checkpoint of this moment unless there is one, and remove old ones; all call it.

    A failure is told, and the next checkpoint tries again. `TrainingStopped` if that fails as well,
    if the run is about to stop, or if the adapters hold NaN.
    """
    if not _is_finite(run):
        raise TrainingStopped(
            f"after {run.done} steps an adapter holds values that are not finite, and is not saved."
            f" {_last_good(run)} Lower optim.learning_rate."
        )
    problem = None
    if run.accelerator.is_main_process:
        try:
            _write(run)
        except OSError as error:
            problem = f"{error.strerror or error}"
    if not on_any(run.accelerator, problem is not None):
        run.history.failed_saves = 0
        return
    run.history.failed_saves += 1
    run.tracker.say(f"not saved  after {run.done} steps: {problem}. {_last_good(run)}")
    if run.stop.reason or run.history.failed_saves == MOST_FAILURES:
        raise TrainingStopped(
            f"{_folder(run)} cannot be written ({problem}). {_save_elsewhere(run)} Then type the "
            "same command again."
        )


def rescue(run: Run, error: Exception) -> None:
    """Save the steps before an error, if there are any and they are whole."""
    if run.done == 0 or isinstance(error, TrainingStopped):  # which has seen to it
        return
    traceback.clear_frames(error.__traceback__)  # they hold what has filled the memory
    if any(learner.updating for learner in run.learners.values()):
        run.tracker.say(f"not saved  the error left an update half done. {_last_good(run)}")
    elif run.accelerator.is_main_process and _is_finite(run):
        try:
            _write(run)
        except OSError as problem:
            run.tracker.say(
                f"not saved  after {run.done} steps: {problem.strerror or problem}. "
                f"{_save_elsewhere(run)}"
            )


def stop_at_bad_steps(run: Run, learner: Learner, figures: StepFigures) -> None:
    """Save the state after the last step that was good, and raise `TrainingStopped`."""
    skipped, learner.bad_in_row = learner.bad_in_row, 0  # the run may go on with other settings
    save(run)
    raise TrainingStopped(
        f"{learner.expert} expert: {skipped} steps in a row were skipped (max_bad_steps="
        f"{run.config.max_bad_steps}), the last at {figures.problem}. {_last_good(run)} Lower "
        f"{learner.expert}.learning_rate, or look at these clips, and type the command again."
    )


def _write(run: Run) -> None:
    folder = _folder(run)
    if not any(step_of(path) == run.done for path in checkpoints_in(folder)):
        with run.tracker.phase("saving"):
            config = run.folder / "config.yaml"
            if not config.is_file():  # somebody took the folder away
                config.parent.mkdir(parents=True, exist_ok=True)
                config.write_text(run.exporter.settings, encoding="utf-8")
            path = _write_checkpoint(run, folder)
        run.tracker.say(f"saved      {path}")
    best = run.history.best([step_of(path) for path in checkpoints_in(folder)])
    prune(folder, run.config.checkpoint.keep, best)
    write_best(run.folder, run.history, checkpoints_in(folder))


def _write_checkpoint(run: Run, folder: Path) -> Path:
    state, tensors = state_of(run)
    return write_checkpoint(
        folder,
        run.done,
        tensors,
        state,
        run.exporter.settings,
        lambda partial: run.exporter.write(
            partial,
            f"{run.config.name}_{run.done:09d}",
            run.experts,
            run.learners,
            run.history.last,
            run.history.lowest,
        ),
    )


def _save_elsewhere(run: Run) -> str:
    """Save among the temporary files what the run's folder did not take; what to do then."""
    place = None
    try:
        if run.accelerator.is_main_process:
            place = Path(tempfile.mkdtemp(prefix=f"{run.config.name}_"))
            path = _write_checkpoint(run, place)
            return f"These {run.done} steps are in {path}: {MEND}, and move it to {_folder(run)}."
    except OSError:  # there is no room either
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    return f"{_last_good(run)} To go on, {MEND}."


def _is_finite(run: Run) -> bool:
    parameters = [p for learner in run.learners.values() for p in learner.parameters]
    return bool(torch.stack([p.detach().isfinite().all() for p in parameters]).all())


def _folder(run: Run) -> Path:
    return run.folder / "checkpoints"


def _last_good(run: Run) -> str:
    found = checkpoints_in(_folder(run))
    return f"The last good state is {found[-1]}." if found else "There is no earlier checkpoint."
