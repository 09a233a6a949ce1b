"""Training loss of an expert by noise bin: an average over its last steps, and their mean.

Bins have equal shares of the law, but of few draws some bins get more than others, also of draws
that are spread evenly. So each bin has its own average, and all count alike: the mean is that of
the law, whatever was drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

KEPT = 0.99  # of the weight of earlier samples, at each step: about the last 100 steps count


@dataclass
class RunningLoss:
    """Sums over samples, the older the lighter, for each bin."""

    losses: list[float]
    weights: list[float]

    @classmethod
    def of(cls, bins: int) -> "RunningLoss":
        """Nothing seen yet."""
        return cls([0.0] * bins, [0.0] * bins)

    def add(self, losses: Sequence[float], bins: Sequence[int]) -> None:
        """The samples of one step and their bins."""
        self.losses = [KEPT * total for total in self.losses]
        self.weights = [KEPT * total for total in self.weights]
        for loss, place in zip(losses, bins, strict=True):
            self.losses[place] += loss
            self.weights[place] += 1

    def means(self) -> dict[int, float]:
        """Of each bin that was visited."""
        pairs = enumerate(zip(self.losses, self.weights, strict=True))
        return {index: total / weight for index, (total, weight) in pairs if weight > 0}

    def figures(self, prefix: str) -> dict[str, float]:
        """Of each bin that was visited, and of all once none is missing."""
        means = self.means()
        found = {f"{prefix}/running_bin_{index}": mean for index, mean in means.items()}
        if len(means) == len(self.losses):
            found[f"{prefix}/running_loss"] = sum(means.values()) / len(means)
        return found
