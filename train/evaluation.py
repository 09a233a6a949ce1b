"""What one measurement of an expert says beside its held-out loss, as figures and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.validate import HeldoutLoss
from wan.variants import Expert


@dataclass(frozen=True)
class Beside:
    """Measured at the same moment as an expert's held-out loss."""

    steps: int  # of this expert alone
    trained: HeldoutLoss  # the same estimator on clips that are trained on
    drift: float  # of the prior, see train/drift.py


@dataclass(frozen=True)
class Evaluated:
    """All that was measured of an expert, beside what was of its base model."""

    heldout: HeldoutLoss
    beside: Beside
    base: HeldoutLoss
    base_trained: HeldoutLoss
    health: Mapping[str, float]  # train/health.py
    other: tuple[str, HeldoutLoss] | None  # "ema" or "live": those of the two that are not used

    @property
    def gap(self) -> float:
        """The generalisation gap: how much less of the base's loss is gone on clips held out.

        Each side is taken over its own loss before training, as clips of both sides differ.
        """
        trained = self.beside.trained.mean / self.base_trained.mean
        return self.heldout.mean / self.base.mean - trained


def figures(found: Sequence[Evaluated]) -> dict[str, float]:
    """Named figures for metrics.jsonl, without the held-out losses of what is used."""
    record: dict[str, float] = {}
    for one in found:
        expert = one.heldout.expert
        record |= _loss_figures(f"trained_on/{expert}", one.beside.trained)
        record[f"gap/{expert}"] = one.gap
        record[f"drift/{expert}"] = one.beside.drift
        if one.other is not None:
            record |= _loss_figures(f"heldout_{one.other[0]}/{expert}", one.other[1])
        record |= {f"health/{expert}/{name}": value for name, value in one.health.items()}
    return record


def _loss_figures(prefix: str, loss: HeldoutLoss) -> dict[str, float]:
    bins = {f"{prefix}/bin_{index}": value for index, value in enumerate(loss.bins)}
    return {f"{prefix}/loss": loss.mean, f"{prefix}/standard_error": loss.standard_error} | bins


def table(done: int, found: Sequence[Evaluated]) -> str:
    """The same for people: a line for each expert."""
    lines = [
        f"measured   after {done} steps: held out, against the base; gap to clips trained on; "
        "drift of the prior; norm and update; rank in use"
    ]
    for one in found:
        loss, health = one.heldout, one.health
        lines.append(
            f"  {loss.expert:<8} {loss.mean:.4f} ± {loss.standard_error:.4f} "
            f"({loss.mean / one.base.mean - 1:+.1%})   gap {one.gap:+.1%}   "
            f"drift {one.beside.drift:.2%}   norm {health['norm']:.3g} "
            f"(+{health['update']:.2g})   rank {health['effective_rank']:.1f}, "
            f"{health['dead']:.0%} dead"
        )
        if one.other is not None:
            name, other = one.other
            lines.append(
                f"           {name} weights: {other.mean:.4f} ± {other.standard_error:.4f} "
                f"({other.mean / one.base.mean - 1:+.1%})"
            )
    return "\n".join(lines)


def read_beside(written: Mapping[Expert, dict]) -> dict[Expert, Beside]:
    """What was measured at a step, from JSON."""
    return {
        expert: Beside(found["steps"], HeldoutLoss(**found["trained"]), found["drift"])
        for expert, found in written.items()
    }
