"""What a run has seen of itself: held-out losses by step, the previews shown, which was best."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from train.evaluation import Beside
from train.validate import HeldoutLoss
from wan.variants import Expert


@dataclass
class History:
    """Grows while the run goes on; steps are optimizer steps of all experts together."""

    heldout: dict[int, list[HeldoutLoss]] = field(default_factory=dict)  # 0: the base model's
    beside: dict[int, dict[Expert, Beside]] = field(default_factory=dict)  # at the same steps
    adapters: dict[Expert, dict[str, Tensor]] = field(default_factory=dict)  # when last measured
    stopped: dict[Expert, int] = field(default_factory=dict)  # early, after so many own steps
    shown: int = 0  # the step of the last previews
    failed_saves: int = 0  # in a row

    @property
    def before(self) -> list[HeldoutLoss]:
        """Of the base model."""
        return self.heldout[0]

    @property
    def last(self) -> list[HeldoutLoss]:
        """The newest."""
        return self.heldout[max(self.heldout)]

    @property
    def lowest(self) -> dict[Expert, float]:
        """The lowest held-out loss that each expert had with its adapter, so far."""
        measured = [loss for step, losses in self.heldout.items() if step for loss in losses]
        found: dict[Expert, float] = {}
        for loss in measured:
            found[loss.expert] = min(loss.mean, found.get(loss.expert, loss.mean))
        return found

    def score(self, step: int) -> float:
        """Mean over the experts of held-out loss over that of the base model: below 1 is better."""
        pairs = list(zip(self.before, self.heldout[step], strict=True))
        return sum(now.mean / was.mean for was, now in pairs) / len(pairs)

    def best(self, steps: Collection[int]) -> int | None:
        """Which of these steps was best; None if none of them was measured."""
        return min((s for s in steps if s in self.heldout), key=self.score, default=None)


def read_heldout(written: Sequence[dict]) -> list[HeldoutLoss]:
    """Held-out losses from JSON."""
    return [HeldoutLoss(**loss) for loss in written]
