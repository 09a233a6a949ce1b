"""The experts alternate in turns, each step of each exactly once and in its own order."""

from collections import Counter
from collections.abc import Mapping
from itertools import groupby, islice

import pytest

from train.turns import Turns, is_due
from wan.variants import Expert


def turn_lengths(steps: Mapping[Expert, int], turn_steps: int) -> list[tuple[Expert, int]]:
    """Who works for how long, in order."""
    order = [expert for expert, _ in Turns(steps, turn_steps)]
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
    assert list(Turns({"low": 3}, 2)) == [("low", 0), ("low", 1), ("low", 2)]


@pytest.mark.parametrize("turn_steps", [1, 3, 4, 50])
def test_every_step_is_done_once_and_in_order(turn_steps: int) -> None:
    steps: dict[Expert, int] = {"high": 11, "low": 4}
    done = list(Turns(steps, turn_steps))
    assert Counter(expert for expert, _ in done) == steps
    for expert, count in steps.items():
        assert [step for who, step in done if who == expert] == list(range(count))


@pytest.mark.parametrize("turn_steps", [1, 3, 4, 50])
def test_who_comes_after_the_next_step_is_known_ahead(turn_steps: int) -> None:
    steps: dict[Expert, int] = {"high": 11, "low": 4}
    whole = list(Turns(dict(steps), turn_steps))
    turns = Turns(dict(steps), turn_steps)
    coming = [turns.after_next() for _ in turns]
    assert coming == [*(expert for expert, _ in whole[2:]), None, None]


def test_who_comes_is_asked_anew_when_an_expert_ends_early() -> None:
    turns = Turns({"high": 6, "low": 6}, 3)
    next(iter(turns))
    turns.end("low")
    assert [turns.after_next() for _ in turns] == ["high", "high", "high", None, None]


@pytest.mark.parametrize("turn_steps", [1, 3, 4, 50])
def test_turns_go_on_from_any_step_as_if_never_left(turn_steps: int) -> None:
    steps: dict[Expert, int] = {"high": 11, "low": 4}
    whole = list(Turns(steps, turn_steps))
    for stop in range(len(whole) + 1):
        left = Turns(steps, turn_steps)
        begun = list(islice(left, stop))
        again = Turns(steps, turn_steps, dict(left.done), left.expert, left.in_turn)
        assert begun + list(again) == whole


def test_a_longer_run_goes_on_after_a_shorter_one() -> None:
    short = Turns({"high": 4, "low": 2}, 2)
    assert len(list(short)) == 6
    longer = Turns({"high": 5, "low": 4}, 2, dict(short.done), short.expert, short.in_turn)
    assert list(longer) == [("low", 2), ("low", 3), ("high", 4)]


def test_fewer_steps_than_done_leave_nothing_to_do() -> None:
    assert list(Turns({"high": 3}, 2, {"high": 5}, "high", 1)) == []


def test_is_due_every_so_many_steps_and_always_at_the_end() -> None:
    assert [done for done in range(1, 11) if is_due(4, done, 10)] == [4, 8, 10]
    assert [done for done in range(1, 11) if is_due(5, done, 10)] == [5, 10]
    assert [done for done in range(1, 11) if is_due(99, done, 10)] == [10]


def test_is_due_of_zero_is_at_the_end_alone() -> None:
    assert [done for done in range(1, 11) if is_due(0, done, 10)] == [10]
