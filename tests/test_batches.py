"""The order of batches and the dropping of captions are functions of (seed, place)."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.batches import BatchOrder, caption_dropped, load_batch
from data.buckets import Bucket

BUCKETS = [Bucket(13, 64, 64)] * 7 + [Bucket(1, 64, 64)] * 3 + [Bucket(13, 48, 80)]


def epoch_of(order: BatchOrder, epoch: int) -> list[list[int]]:
    first = epoch * order.batches_per_epoch
    return [order.indices(first + position) for position in range(order.batches_per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_clip_is_in_every_epoch_and_batches_are_full(batch_size: int) -> None:
    order = BatchOrder(BUCKETS, batch_size, seed=0)
    for epoch in range(4):
        batches = epoch_of(order, epoch)
        assert {index for batch in batches for index in batch} == set(range(len(BUCKETS)))
        for batch in batches:
            assert len(batch) == batch_size
            assert len({BUCKETS[index] for index in batch}) == 1


def test_no_clip_is_repeated_more_than_completion_needs() -> None:
    counts = Counter(index for batch in epoch_of(BatchOrder(BUCKETS, 4, 0), 0) for index in batch)
    assert sorted(counts[index] for index in range(7)) == [1] * 6 + [2]  # 7 clips in 2 batches
    assert sorted(counts[index] for index in range(7, 10)) == [1, 1, 2]
    assert counts[10] == 4


def test_order_is_a_function_of_seed_and_place() -> None:
    order = BatchOrder(BUCKETS, 2, seed=5)
    forwards = [order.indices(place) for place in range(30)]
    backwards = [BatchOrder(BUCKETS, 2, seed=5).indices(place) for place in reversed(range(30))]
    assert forwards == backwards[::-1]


def test_order_is_the_same_on_every_machine_and_version() -> None:
    golden = [[9, 8], [2, 6], [8, 7], [5, 3], [0, 4], [4, 1], [10, 10]]
    assert epoch_of(BatchOrder(BUCKETS, 2, seed=0), 0) == golden


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder([Bucket(1, 64, 64)] * 20, 2, seed=0)
    other = BatchOrder([Bucket(1, 64, 64)] * 20, 2, seed=1)
    epochs = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(other, 0), epoch_of(other, 1)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


def test_pairs_and_positions_are_mixed_across_epochs() -> None:
    order = BatchOrder([Bucket(1, 64, 64)] * 6 + [Bucket(5, 64, 64)] * 6, 2, seed=0)
    first = Counter(epoch_of(order, epoch)[0][0] for epoch in range(600))
    assert set(first) == set(range(12))
    assert all(20 < count < 90 for count in first.values())  # 50 each on average


def test_captions_drop_at_the_given_rate_in_every_slot() -> None:
    for slot in range(3):
        drops = [caption_dropped(0, place, slot, 0.1) for place in range(3000)]
        assert 0.08 < sum(drops) / len(drops) < 0.12
    slots = [[caption_dropped(0, place, slot, 0.5) for place in range(50)] for slot in range(2)]
    assert slots[0] != slots[1]
    assert slots[0] == [caption_dropped(0, place, 0, 0.5) for place in range(50)]
    assert not any(caption_dropped(0, place, 0, 0.0) for place in range(99))
    assert all(caption_dropped(0, place, 0, 1.0) for place in range(99))


def test_batch_holds_the_clips_and_their_texts(tmp_path: Path) -> None:
    latents = [tmp_path / f"latents{i}" for i in range(3)]
    texts = [tmp_path / f"text{i}" for i in range(3)]
    for i in range(3):
        save_file({"latents": torch.full((4, 2, 3, 5), float(i))}, latents[i])
        save_file({"text": torch.full((i + 1, 6), float(i))}, texts[i])
    save_file({"text": torch.full((1, 6), -1.0)}, tmp_path / "empty")

    def load(dropout: float) -> list[float]:
        batch = load_batch([2, 0], latents, texts, tmp_path / "empty", 0, 7, dropout)
        assert batch.indices == [2, 0]
        assert batch.latents.shape == (2, 4, 2, 3, 5)
        assert batch.latents[:, 0, 0, 0, 0].tolist() == [2, 0]
        return [text[0, 0].item() for text in batch.text]

    assert load(0.0) == [2, 0]
    assert load(1.0) == [-1, -1]
