"""The end of a run: the files to upload, proved, and what is said of them."""

from collections.abc import Sequence
from pathlib import Path

from train import report
from train.apart import hand_over
from train.learner import TrainingStopped, as_used
from train.run import Run, sheet_of
from train.run_folder import write_summary
from train.validate import HeldoutLoss
from wan.lora_format import ExportedFile
from wan.reload import TOLERANCE, reload_errors
from wan.variants import Expert


def deliver(run: Run) -> None:
    """Export the pair, prove that diffusers reads it as it was trained, and say what came out."""
    if run.accelerator.is_main_process:
        before, after = run.history.before, run.history.last
        with run.tracker.phase("exporting"), as_used(run.learners), run.stop.interruptible():
            files, errors = _export(run, after)
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


def _export(
    run: Run, losses: Sequence[HeldoutLoss]
) -> tuple[dict[Expert, ExportedFile], dict[Expert, float]]:
    """The files to upload, and how far each is from the trained adapter when it is read again."""
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
    latents, text = run.dataset.heldout.first()
    paths: dict[Expert, Path] = {expert: file.path for expert, file in files.items()}
    return files, reload_errors(run.experts, paths, run.facts, latents, text)
