"""The end of a run: the files to upload, proved, and what is said of them."""

from collections.abc import Sequence
from pathlib import Path

from accelerate.utils.operations import broadcast_object_list

from train import report
from train.apart import hand_over
from train.learner import as_used
from train.rules import TrainingStopped
from train.run import Run, sheet_of
from train.run_folder import write_summary
from train.validate import HeldoutLoss
from wan.lora_format import ExportedFile
from wan.reload import TOLERANCE, reload_errors
from wan.variants import Expert


def deliver(run: Run) -> None:
    """Export the pair, prove that diffusers reads it as it was trained, and say what came out."""
    main, before, after = run.accelerator.is_main_process, run.history.before, run.history.last
    alone = run.accelerator.num_processes == 1  # else others wait for this process
    with run.tracker.phase("exporting"), as_used(run.learners), run.stop.interruptible(alone):
        files = _export(run, after) if main else {}
        errors = _reload_errors(run, files)
    if main:
        run.tracker.say(report.heldout_table(before, after))
        run.tracker.say(report.export(run.config, run.facts, files, errors))
        run.tracker.say(run.tracker.time_spent())
        figures = report.figures(before, after, errors, run.tracker.seconds, run.learners)
        write_summary(run.folder, figures)
        if max(errors.values()) > TOLERANCE:
            raise TrainingStopped(
                f"the files in {run.folder} do not do in diffusers what was trained"
            )
        run.tracker.exported(files, after)
        sheet = sheet_of(run, run.history.shown)
        run.tracker.say(
            report.what_next(run.config, run.folder, sheet if sheet.is_file() else None)
        )
    run.accelerator.wait_for_everyone()


def _export(run: Run, losses: Sequence[HeldoutLoss]) -> dict[Expert, ExportedFile]:
    """Write the files to upload."""
    try:
        best = run.history.lowest
        files = run.exporter.write(
            run.folder, run.config.name, run.experts, run.learners, losses, best
        )
        hand_over(run.config)
    except OSError as error:
        raise TrainingStopped(
            f"the adapters cannot be written to {run.folder} ({error.strerror or error}). The run "
            "is saved: make room and type the same command again."
        ) from error
    return files


def _reload_errors(run: Run, files: dict[Expert, ExportedFile]) -> dict[Expert, float]:
    """How far each of the main process's files is from the trained adapter when it is read again.

    Where the base is sharded all processes read them, as each pass takes all; else none but that.
    """
    paths: dict[Expert, Path] = {expert: file.path for expert, file in files.items()}
    if run.config.speed.placement == "shard":
        paths = broadcast_object_list([paths])[0]
    if not paths:
        return {}
    latents, text = run.dataset.heldout.first()
    return reload_errors(run.experts, paths, run.facts, latents, text)
