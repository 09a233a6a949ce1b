"""Batches as a function of (seed, place): nothing to save, and any step can be made again alone.

A `place` counts the batches of a run, over all processes. Random numbers come from `random.Random`,
whose `random()` gives the same sequence for a seed on every platform and version of Python.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from data.buckets import Bucket
from data.cache import load_latents, load_text

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Clips of one shape."""

    latents: Tensor  # (B, C, F, h, w)
    text: list[Tensor]  # B times (L_i, D)
    indices: list[int]  # of the clips


class BatchOrder:
    """Which clips make the batch of each place.

    In an epoch every clip is seen at least once. A batch holds clips of one bucket; the last of a
    bucket is completed with clips of the same bucket, from the start of the epoch's order.
    """

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, seed: int) -> None:
        """`buckets` holds the bucket of each clip."""
        assert buckets, "no clips"
        assert batch_size > 0
        groups: dict[Bucket, list[int]] = defaultdict(list)
        for index, bucket in enumerate(buckets):
            groups[bucket].append(index)
        self._groups = [groups[bucket] for bucket in sorted(groups)]
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)

    def indices(self, place: int) -> list[int]:
        """The clips of the batch at `place`, always `batch_size` of them."""
        epoch, position = divmod(place, self.batches_per_epoch)
        random = Random(f"order {self._seed} {epoch}")
        batches = []
        for group in self._groups:
            order = _shuffled(group, random)
            for start in range(0, len(order), self._batch_size):
                slots = range(start, start + self._batch_size)
                batches.append([order[slot % len(order)] for slot in slots])
        return _shuffled(batches, random)[position]


def _shuffled(things: Sequence[T], random: Random) -> list[T]:
    return sorted(things, key=lambda _: random.random())


def caption_dropped(seed: int, place: int, slot: int, probability: float) -> bool:
    """Whether the caption in `slot` of the batch at `place` is replaced by ""."""
    return Random(f"dropout {seed} {place} {slot}").random() < probability


def load_batch(
    indices: list[int],
    latents_paths: Sequence[Path],
    text_paths: Sequence[Path],
    dropped: Path,
    seed: int,
    place: int,
    dropout: float,
) -> Batch:
    """The batch of the clips `indices`, with captions dropped with probability `dropout`.

    `latents_paths` and `text_paths` are the cache entries of each clip, `dropped` that of "".
    `DataError` names an entry that is damaged.
    """
    texts = [
        dropped if caption_dropped(seed, place, slot, dropout) else text_paths[index]
        for slot, index in enumerate(indices)
    ]
    return Batch(
        latents=torch.stack([load_latents(latents_paths[index]) for index in indices]),
        text=[load_text(path) for path in texts],
        indices=indices,
    )
