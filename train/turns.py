"""Whose turn it is: the experts alternate, so that every preview sees progress of both."""

from collections.abc import Iterator, Mapping

from wan.variants import Expert


def turns(steps: Mapping[Expert, int], turn_steps: int) -> Iterator[tuple[Expert, int]]:
    """(expert, its own step from 0) for each optimizer step of the run, in the order of `steps`.

    An expert works for `turn_steps`, then the next; one that has finished is passed over. A turn as
    long as the run trains one expert after the other.
    """
    done = dict.fromkeys(steps, 0)
    while any(done[expert] < steps[expert] for expert in steps):
        for expert in steps:
            for _ in range(min(turn_steps, steps[expert] - done[expert])):
                yield expert, done[expert]
                done[expert] += 1


def is_due(every: int, done: int, total: int) -> bool:
    """Whether what happens every so many steps is due after `done` of `total`; it is at the end."""
    return done == total or (every > 0 and done % every == 0)
