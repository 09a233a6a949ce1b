"""Whose turn it is: the experts alternate, so that every preview sees progress of both."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from wan.variants import Expert


@dataclass
class Turns:
    """(expert, its own step from 0) for each optimizer step of the run, in the order of `steps`.

    An expert works for `length` steps, then the next; one that has finished is passed over. A turn
    as long as the run trains one expert after the other. Iterating goes on from `done`, `expert`
    and `in_turn`, also in the middle of a turn: they hold what has been handed out.
    """

    steps: dict[Expert, int]
    length: int
    done: dict[Expert, int] = field(default_factory=dict)
    expert: Expert | None = None  # whose turn it is; None: that of the first
    in_turn: int = 0  # steps of that turn

    def __iter__(self) -> Iterator[tuple[Expert, int]]:
        order = list(self.steps)
        while any(self._left(expert) > 0 for expert in order):
            if self.expert not in order:
                self.expert, self.in_turn = order[0], 0
            if self.in_turn >= self.length or self._left(self.expert) <= 0:
                following = (order.index(self.expert) + 1) % len(order)
                self.expert, self.in_turn = order[following], 0
                continue
            step = self.done.get(self.expert, 0)
            self.done[self.expert] = step + 1
            self.in_turn += 1
            yield self.expert, step

    def after_next(self) -> Expert | None:
        """Whose step comes after the next one; None if the run ends before."""
        ahead = replace(self, done=dict(self.done))
        return next((expert for expert, _ in islice(ahead, 1, None)), None)

    def end(self, expert: Expert) -> None:
        """It takes no more steps; the other goes on as if they had been all."""
        self.steps[expert] = self.done.get(expert, 0)

    def _left(self, expert: Expert) -> int:
        return self.steps[expert] - self.done.get(expert, 0)


def is_due(every: int, done: int, total: int) -> bool:
    """Whether what happens every so many steps is due after `done` of `total`; it is at the end."""
    return done == total or (every > 0 and done % every == 0)
