"""The experts alternate in turns, each step of each exactly once and in its own order."""

from collections import Counter
from collections.abc import Mapping
from itertools import groupby

import pytest

from train.turns import is_due, turns
from wan.variants import Expert


def turn_lengths(steps: Mapping[Expert, int], turn_steps: int) -> list[tuple[Expert, int]]:
    """Who works for how long, in order."""
    order = [expert for expert, _ in turns(steps, turn_steps)]
    return [(expert, len(list(turn))) for expert, turn in groupby(order)]


def test_experts_take_turns_of_the_given_length() -> None:
    assert turn_lengths({"high": 6, "low": 6}, 3) == [
        ("high", 3), ("low", 3), ("high", 3), ("low", 3),
    ]  # fmt: skip
    assert turn_lengths({"low": 2, "high": 2}, 1)[0] == ("low", 1)  # in the order of `steps`


def test_the_last_turn_may_be_short() -> None:
    assert turn_lengths({"high": 5, "low": 5}, 3) == [
        ("high", 3), ("low", 3), ("high", 2), ("low", 2),
    ]  # fmt: skip


def test_an_expert_that_has_finished_is_passed_over() -> None:
    assert turn_lengths({"high": 2, "low": 7}, 2) == [("high", 2), ("low", 7)]
    assert turn_lengths({"high": 5, "low": 1}, 2) == [("high", 2), ("low", 1), ("high", 3)]


@pytest.mark.parametrize("turn_steps", [4, 1000])
def test_a_turn_as_long_as_the_run_trains_one_after_the_other(turn_steps: int) -> None:
    assert turn_lengths({"high": 4, "low": 3}, turn_steps) == [("high", 4), ("low", 3)]


def test_one_expert_alone_works_all_the_time() -> None:
    assert list(turns({"low": 3}, 2)) == [("low", 0), ("low", 1), ("low", 2)]


@pytest.mark.parametrize("turn_steps", [1, 3, 4, 50])
def test_every_step_is_done_once_and_in_order(turn_steps: int) -> None:
    steps: dict[Expert, int] = {"high": 11, "low": 4}
    done = list(turns(steps, turn_steps))
    assert Counter(expert for expert, _ in done) == steps
    for expert, count in steps.items():
        assert [step for who, step in done if who == expert] == list(range(count))


def test_is_due_every_so_many_steps_and_always_at_the_end() -> None:
    assert [done for done in range(1, 11) if is_due(4, done, 10)] == [4, 8, 10]
    assert [done for done in range(1, 11) if is_due(5, done, 10)] == [5, 10]
    assert [done for done in range(1, 11) if is_due(99, done, 10)] == [10]


def test_is_due_of_zero_is_at_the_end_alone() -> None:
    assert [done for done in range(1, 11) if is_due(0, done, 10)] == [10]
