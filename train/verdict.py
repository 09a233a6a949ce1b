"""What follows from the measurements: an expert overfits, it has stopped learning, which was best.

Two measurements differ if their difference is beyond its standard error, clip by clip and draw by
draw (`train.validate.change`).
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint import step_of
from train.history import History
from train.validate import HeldoutLoss, change
from wan.variants import Expert

BEST = "best.json"


@dataclass(frozen=True)
class Point:
    """One measurement of an expert that had moved since the one before."""

    done: int  # steps of the run
    steps: int  # of the expert
    heldout: HeldoutLoss
    trained: HeldoutLoss


@dataclass(frozen=True)
class Verdict:
    """How an expert stands at its newest measurement."""

    lowest: Point  # the last at which its held-out loss fell beyond the error
    newest: Point
    stale: int  # measurements since then
    rising: int  # of these the last ones in a row: it was above, while trained clips were below

    def told(self, expert: Expert) -> str:
        """Why one should look, in words."""
        risen, error = change(self.lowest.heldout, self.newest.heldout)
        learned = change(self.lowest.trained, self.newest.trained)[0]
        return (
            f"{expert} expert: since step {self.lowest.done} its held-out loss has changed by "
            f"{risen:+.4f} ± {error:.4f} over {self.stale} measurements, that on clips trained on "
            f"by {learned:+.4f}"
        )


def judge(history: History, expert: Expert) -> Verdict:
    """Read the measurements of an expert from the base model's on, in which it is at its start."""
    points = _points(history, expert)
    lowest, stale, rising = points[0], 0, 0
    for point in points[1:]:
        difference, error = change(lowest.heldout, point.heldout)
        # Of a single estimate there is no error: it is believed when it falls, never when it rises.
        if difference < (0 if math.isinf(error) else -error):
            lowest, stale, rising = point, 0, 0
            continue
        stale += 1
        learns = change(lowest.trained, point.trained)[0] < 0
        rising = rising + 1 if difference > error and learns else 0
    return Verdict(lowest, points[-1], stale, rising)


def _points(history: History, expert: Expert) -> list[Point]:
    """Measurements in the turn of the other expert say nothing new: they are left out."""
    points: list[Point] = []
    for done in sorted(history.beside.keys() & history.heldout.keys()):
        beside = history.beside[done].get(expert)
        heldout = next((loss for loss in history.heldout[done] if loss.expert == expert), None)
        if beside is None or heldout is None or (points and points[-1].steps == beside.steps):
            continue
        points.append(Point(done, beside.steps, heldout, beside.trained))
    return points


def write_best(folder: Path, history: History, checkpoints: Sequence[Path]) -> None:
    """best.json in the run's `folder`: which of its checkpoints was best, and why.

    Nothing is written if none of them was measured.
    """
    steps = [step_of(path) for path in checkpoints]
    best = history.best(steps)
    if best is None:
        return
    path = next(path for path in checkpoints if step_of(path) == best)
    pairs = list(zip(history.before, history.heldout[best], strict=True))
    written = {
        "step": best,
        "checkpoint": str(path.relative_to(folder)),
        "files": sorted(file.name for file in path.glob(f"*_{best:09d}*.safetensors")),
        "reason": _reason(history, best, steps),
        "heldout": {
            now.expert: {
                "loss": now.mean,
                "standard_error": now.standard_error,
                "base": was.mean,
            }
            for was, now in pairs
        },
    }
    partial = folder / f".{BEST}.partial"
    partial.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / BEST)


def _reason(history: History, best: int, steps: Collection[int]) -> str:
    measured = [step for step in steps if step in history.heldout]
    pairs = zip(history.before, history.heldout[best], strict=True)
    parts = [
        f"{now.expert} {now.mean:.4f} ± {now.standard_error:.4f} (base {was.mean:.4f})"
        for was, now in pairs
    ]
    return (
        f"lowest held-out loss over that of the base, {history.score(best):.4f} as mean of the "
        f"experts, of {len(measured)} checkpoints that are kept: {', '.join(parts)}"
    )
