"""A sweep over the strengths of adapters: videos at each, held-out loss at each, and what follows.

The rule: an adapter is recommended at the strength with the lowest held-out loss, if that is below
the loss at strength 1 by more than the standard error of the difference; else at 1, as trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.evaluation_stage import PROGRESS, Saved, Stage
from tools.finished_run import STRENGTHS
from train.few_step import at_strengths
from train.validate import HeldoutLoss, change, heldout_loss, plan_checks
from wan.safetensors_writer import file_hashes
from wan.variants import Expert

RULE = (
    "the strength with the lowest held-out loss, if that is below the loss at strength 1 by more "
    "than the standard error of the difference over clips and draws; else 1"
)
Strengths = Mapping[Expert, float]


@dataclass(frozen=True)
class Curve:
    """Held-out loss of an expert over the strength of its adapter."""

    losses: dict[float, HeldoutLoss]  # 0, the base model, and 1 are always there

    @property
    def best(self) -> float:
        """The strength with the lowest loss, the base model left out."""
        return min((s for s in self.losses if s), key=lambda s: self.losses[s].mean)

    @property
    def recommended(self) -> float:
        """By the rule."""
        difference, error = change(self.losses[1.0], self.losses[self.best])
        return self.best if difference < -error else 1.0


def combinations(
    experts: Sequence[Expert], strengths: Sequence[float]
) -> dict[str, list[dict[Expert, float]]]:
    """Rows of a sweep by their titles: each adapter with the other at 1, and both together."""
    rows: dict[str, list[dict[Expert, float]]] = {}
    for expert in experts:
        others = dict.fromkeys(experts, 1.0)
        title = f"{expert} alone" if len(experts) == 1 else f"{expert}, the other at 1"
        rows[title] = [{**others, expert: strength} for strength in strengths]
    if len(experts) > 1:
        rows["both together"] = [dict.fromkeys(experts, strength) for strength in strengths]
    return rows


def measure_curves(stage: Stage, strengths: Sequence[float], saved: Saved) -> dict[Expert, Curve]:
    """Held-out loss of each trained expert, as the run measures it, at each strength."""
    plan = plan_checks(stage.config, stage.facts, stage.dataset.heldout)
    curves: dict[Expert, Curve] = {}
    for expert in saved.files:
        losses: dict[float, HeldoutLoss] = {}
        for strength in sorted({0.0, 1.0, *strengths}):
            name = f"strength {strength:g}"
            with at_strengths(stage.experts, {expert: strength}, {}):
                transformer = stage.experts[expert]
                losses[strength] = heldout_loss(
                    transformer, expert, stage.facts, plan, PROGRESS, name
                )
        curves[expert] = Curve(losses)
    return curves


def describe(curves: Mapping[Expert, Curve]) -> str:
    """The curves as a table, and what is recommended."""
    lines = ["strength   held-out loss, against strength 1"]
    for expert, curve in curves.items():
        for strength, loss in curve.losses.items():
            difference, error = change(curve.losses[1.0], loss)
            mark = "  <- recommended" if strength == curve.recommended else ""
            against = "" if strength == 1 else f"   {difference:+.4f} ± {error:.4f}"
            lines.append(f"  {expert:<8} {strength:4g}   {loss.mean:.4f}{against}{mark}")
        if curve.best == max(curve.losses):
            lines.append(f"  {expert:<8} is best at the end of the sweep: it may need more steps")
    return "\n".join([*lines, f"rule: {RULE}"])


def write_strengths(folder: Path, curves: Mapping[Expert, Curve], saved: Saved) -> Path:
    """strengths.json in `folder`: all losses, the rule, and what it says of these very files."""
    written = {
        "rule": RULE,
        "recommended": {expert: curve.recommended for expert, curve in curves.items()},
        "adapters": {expert: _identity(path) for expert, path in saved.files.items()},
        "measured": {
            expert: [
                _row(strength, loss, curve.losses[1.0]) for strength, loss in curve.losses.items()
            ]
            for expert, curve in curves.items()
        },
    }
    path = folder / STRENGTHS
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return path


def _identity(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": file_hashes(path).sha256}


def _row(strength: float, loss: HeldoutLoss, as_trained: HeldoutLoss) -> dict[str, float | None]:
    difference, error = change(as_trained, loss)
    return {
        "strength": strength,
        "loss": loss.mean,
        "standard_error": loss.standard_error,
        "change": difference,
        "change_error": error if error < float("inf") else None,
    }
