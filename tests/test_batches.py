"""The order of batches is a function of (seed, place), and shares them out as visits say."""

import json
from collections import Counter
from math import floor
from typing import cast

import pytest

from data.batches import GOLDEN, BatchOrder
from data.buckets import Bucket
from data.items import DataError

BUCKETS = [Bucket(13, 64, 64)] * 7 + [Bucket(1, 64, 64)] * 3 + [Bucket(13, 48, 80)]
IMAGE = Bucket(1, 64, 64)


def plain(buckets: list[Bucket], batch_size: int, seed: int) -> BatchOrder:
    return BatchOrder(buckets, [1.0] * len(buckets), batch_size, seed)


def epochs_of(order: BatchOrder, count: int) -> list[list[list[int]]]:
    """The batches of the first epochs."""
    epochs, place = [], 0
    for epoch in range(count):
        size = order.batches_in_epoch(epoch)
        epochs.append([order.indices(place + position) for position in range(size)])
        place += size
    return epochs


def waiting_at(order: BatchOrder, place: int) -> list[int]:
    """The draws that were passed over before a place."""
    return cast("list[int]", order.state(place)["waiting"])


def counts_of(epoch: list[list[int]]) -> Counter[int]:
    return Counter(clip for batch in epoch for clip in batch)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_clip_is_in_every_epoch_and_batches_are_full(batch_size: int) -> None:
    for batches in epochs_of(plain(BUCKETS, batch_size, seed=0), 4):
        assert {index for batch in batches for index in batch} == set(range(len(BUCKETS)))
        for batch in batches:
            assert len(batch) == batch_size
            assert len({BUCKETS[index] for index in batch}) == 1


def test_no_clip_is_repeated_more_than_completion_needs() -> None:
    (epoch,) = epochs_of(plain(BUCKETS, 4, 0), 1)
    counts = counts_of(epoch)
    assert sorted(counts[index] for index in range(7)) == [1] * 6 + [2]  # 7 clips in 2 batches
    assert sorted(counts[index] for index in range(7, 10)) == [1, 1, 2]
    assert counts[10] == 4


def test_order_is_a_function_of_seed_and_place() -> None:
    order = plain(BUCKETS, 2, seed=5)
    forwards = [order.indices(place) for place in range(30)]
    backwards = [plain(BUCKETS, 2, seed=5).indices(place) for place in reversed(range(30))]
    assert forwards == backwards[::-1]


def test_order_is_the_same_on_every_machine_and_version() -> None:
    golden = [[9, 8], [2, 6], [8, 7], [5, 3], [0, 4], [4, 1], [10, 10]]
    assert epochs_of(plain(BUCKETS, 2, seed=0), 1) == [golden]


def test_epochs_and_seeds_differ() -> None:
    epochs = [epoch for seed in (0, 1) for epoch in epochs_of(plain([IMAGE] * 20, 2, seed=seed), 2)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


def test_pairs_and_positions_are_mixed_across_epochs() -> None:
    order = plain([IMAGE] * 6 + [Bucket(5, 64, 64)] * 6, 2, seed=0)
    first = Counter(epoch[0][0] for epoch in epochs_of(order, 600))
    assert set(first) == set(range(12))
    assert all(20 < count < 90 for count in first.values())  # 50 each on average


@pytest.mark.parametrize("visits", [2.0, 0.5, 1 / 3, 2.5, 0.3])
def test_a_clip_is_seen_as_often_as_its_visits_add_up_to(visits: float) -> None:
    order = BatchOrder([IMAGE] * 9, [visits] * 9, 1, seed=3)  # no batch needs completion
    seen: Counter[int] = Counter()
    for epoch, batches in enumerate(epochs_of(order, 24), start=1):
        seen += counts_of(batches)
        for clip in range(9):
            phase = clip * GOLDEN % 1
            assert seen[clip] == floor(epoch * visits + phase)
            assert abs(seen[clip] - epoch * visits) < 1


@pytest.mark.parametrize("rest", [2, 3])
def test_a_fraction_comes_once_in_so_many_epochs_and_not_all_at_once(rest: int) -> None:
    epochs = epochs_of(BatchOrder([IMAGE] * 12, [1 / rest] * 12, 1, seed=0), 12)
    for start in range(12 - rest + 1):
        window = sum((counts_of(epoch) for epoch in epochs[start : start + rest]), Counter())
        assert window == Counter(range(12))  # each once, wherever one begins to count
    sizes = [len(epoch) for epoch in epochs]
    assert max(sizes) - min(sizes) <= 2  # different clips rest in different epochs


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_mixed_visits_drop_nothing_and_fill_every_batch(batch_size: int) -> None:
    visits = [2.0, 1.0, 0.5, 1 / 3] * 3
    buckets = [Bucket(1 + 4 * (clip % 3), 64, 64) for clip in range(12)]
    epochs = epochs_of(BatchOrder(buckets, visits, batch_size, seed=1), 6)
    seen = sum((counts_of(epoch) for epoch in epochs), Counter())
    assert all(seen[clip] >= 6 * visits[clip] - 1e-9 for clip in range(12))
    for batch in (batch for epoch in epochs for batch in epoch):
        assert len(batch) == batch_size
        assert len({buckets[clip] for clip in batch}) == 1
    least = sum(6 * times for times in visits)
    groups = sum(len({buckets[clip] for clip in counts_of(epoch)}) for epoch in epochs)
    assert sum(seen.values()) <= least + groups * (batch_size - 1)  # completion, and no more


def test_an_epoch_in_which_all_rest_is_passed_over() -> None:
    order = BatchOrder([IMAGE], [0.25], 2, seed=0)
    assert [order.batches_in_epoch(epoch) for epoch in range(8)] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert [order.indices(place) for place in range(5)] == [[0, 0]] * 5


def test_sources_share_the_batches_as_their_weights_say() -> None:
    weights = [1.0] * 20 + [0.25] * 20 + [3.0] * 4
    order = BatchOrder([IMAGE] * 44, weights, 4, seed=2)
    seen = Counter(clip for place in range(2000) for clip in order.indices(place))
    shares = [
        sum(seen[clip] for clip in part) for part in (range(20), range(20, 40), range(40, 44))
    ]
    expected = [20 / 37, 5 / 37, 12 / 37]
    assert [share / 8000 for share in shares] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_together_what_one_sees(processes: int) -> None:
    visits = [2.0, 0.5, 1.0, 1.0, 1 / 3, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    one = BatchOrder(BUCKETS, visits, 2, seed=4)
    several = [BatchOrder(BUCKETS, visits, 2, seed=4) for _ in range(processes)]
    seen = [
        several[process].indices(turn * processes + process)
        for turn in range(20)
        for process in range(processes)
    ]
    assert seen == [one.indices(place) for place in range(20 * processes)]


@pytest.mark.parametrize("together", [2, 3, 8])
def test_the_batches_of_a_step_are_of_one_shape(together: int) -> None:
    visits = [2.0, 0.5, 1.0, 1.0, 1 / 3, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    order = BatchOrder(BUCKETS, visits, 2, seed=4, together=together)
    batches = [order.indices(place) for place in range(300 * together)]
    for start in range(0, len(batches), together):
        step = batches[start : start + together]
        assert len({BUCKETS[clip] for batch in step for clip in batch}) == 1
    # Nothing is repeated or left out for it, but for the few that wait at the end.
    plain = BatchOrder(BUCKETS, visits, 2, seed=4)
    waiting = [plain.indices(draw) for draw in waiting_at(order, len(batches))]
    drawn = [plain.indices(draw) for draw in range(len(batches) + len(waiting))]
    assert sorted(batches + waiting) == sorted(drawn)
    assert len(waiting) <= 3 * (together - 1)


def test_batches_of_one_shape_or_one_alone_wait_for_nothing() -> None:
    for buckets, together in ((BUCKETS, 1), ([IMAGE] * 11, 4)):
        order = BatchOrder(buckets, [1.0] * 11, 2, seed=4, together=together)
        plain = BatchOrder(buckets, [1.0] * 11, 2, seed=4)
        assert [order.indices(p) for p in range(60)] == [plain.indices(p) for p in range(60)]
        assert order.state(20)["waiting"] == []


@pytest.mark.parametrize("other", [1, 2, 3, 4])
def test_steps_of_another_size_go_on_with_what_was_not_seen(other: int) -> None:
    """Also twice, and with the batches that waited: each is seen once."""
    orders = [BatchOrder(BUCKETS, [1.0] * 11, 2, 4, together=n) for n in (4, other, 3)]
    seen, end, state = [], 0, orders[0].state(0)
    for order, steps, size in zip(orders, (5, 7, 40), (4, other, 3), strict=True):
        place = order.go_on(json.loads(json.dumps(state)))
        end = place + steps * size
        seen += [order.indices(p) for p in range(place, end)]
        state = order.state(end)
    plain = BatchOrder(BUCKETS, [1.0] * 11, 2, 4)
    rest = [plain.indices(draw) for draw in waiting_at(orders[-1], end)]
    assert sorted(seen + rest) == sorted(plain.indices(d) for d in range(len(seen) + len(rest)))


def test_steps_go_on_as_if_they_had_never_stopped() -> None:
    whole = BatchOrder(BUCKETS, [0.5] * 11, 2, seed=0, together=3)
    expected = [whole.indices(place) for place in range(90)]
    for stop in range(0, 90, 3):
        again = BatchOrder(BUCKETS, [0.5] * 11, 2, seed=0, together=3)
        assert again.go_on(whole.state(stop)) == stop
        assert [again.indices(place) for place in range(stop, 90)] == expected[stop:]
        assert again.state(90) == whole.state(90)


def test_a_saved_place_is_found_again() -> None:
    order = BatchOrder(BUCKETS, [0.5] * 11, 2, seed=0)
    expected = [order.indices(place) for place in range(17, 30)]
    state = json.loads(json.dumps(order.state(17)))
    again = BatchOrder(BUCKETS, [0.5] * 11, 2, seed=0)
    place = again.go_on(state)
    assert place == 17
    assert [again.indices(place + step) for step in range(13)] == expected


@pytest.mark.parametrize(
    "other",
    [
        BatchOrder(BUCKETS[1:], [1.0] * 10, 2, 0),
        BatchOrder(BUCKETS[::-1], [1.0] * 11, 2, 0),
        BatchOrder(BUCKETS, [1.0] * 10 + [2.0], 2, 0),
        BatchOrder(BUCKETS, [1.0] * 11, 3, 0),
        BatchOrder(BUCKETS, [1.0] * 11, 2, 1),
        BatchOrder(BUCKETS, [1.0] * 11, 2, 0, "other clips"),
    ],
    ids=["clips", "shapes", "visits", "batch size", "seed", "clips"],
)
def test_a_place_of_another_order_is_refused(other: BatchOrder) -> None:
    with pytest.raises(DataError, match=r"place 17 .*another order.*restore them, or start anew"):
        other.go_on(plain(BUCKETS, 2, 0).state(17))
