"""Batches as a function of (seed, place): any step can be made again alone, on any machine.

A `place` counts the batches of a run, over all processes: with the few batches that wait for others
of their shape, and the order's fingerprint, it is all that must be saved. Random numbers come from
`random.Random`, whose `random()` gives the same sequence for a seed on every platform and version
of Python.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from random import Random
from typing import TypeVar, cast

import torch
from torch import Tensor

from data.buckets import Bucket
from data.cache import Entries
from data.items import DataError

T = TypeVar("T")
GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly


class BatchOrder:
    """Which clips make the batch of each place.

    In an epoch, clip i is seen `visits[i]` times; of a fraction, such as 0.5, the rest comes in
    later epochs (every second one), and different clips rest in different epochs. A batch holds
    clips of one bucket; the last of a bucket is completed with clips of the same bucket, from the
    start of the epoch's order, so no clip is ever dropped.

    The batches of one step, `together`, are of one bucket, so that no process waits for another's
    longer clips: a batch waits, into later epochs if need be, until so many of its shape were
    drawn. Nothing is repeated or left out for that; with one batch a step nothing waits.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        visits: Sequence[float],
        batch_size: int,
        seed: int,
        clips: str = "",
        together: int = 1,
    ) -> None:
        """`buckets` and `visits` hold one value for each clip; `clips` identifies them all."""
        assert buckets, "no clips"
        assert batch_size > 0
        assert min(visits) > 0
        groups: dict[Bucket, list[int]] = defaultdict(list)
        for index, bucket in enumerate(buckets):
            groups[bucket].append(index)
        self._groups = [groups[bucket] for bucket in sorted(groups)]
        self._buckets = list(buckets)
        self._visits = list(visits)
        self._batch_size = batch_size
        self._seed = seed
        self._together = together
        self._starts = [0]  # the first draw of each epoch, as far as it was asked for
        self._last: tuple[int, list[list[int]]] = (-1, [])  # an epoch and its batches
        facts = repr((list(buckets), self._visits, batch_size, seed, clips))
        self._fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.start_at(0, [])

    def start_at(self, place: int, waiting: Sequence[int]) -> None:
        """Begin with a step at `place`; the draws `waiting` were passed over before it."""
        self._first, self._passed = place, list(waiting)
        self._taken: list[tuple[int, list[int]]] = []  # (draw, clips) of the places from there on
        self._next = place + len(waiting)  # the draw that comes next
        self._queues: dict[Bucket, list[tuple[int, list[int]]]] = defaultdict(list)
        for draw in waiting:
            self._queue(draw)

    def indices(self, place: int) -> list[int]:
        """The clips of the batch at `place`, always `batch_size` of them."""
        assert place >= self._first, f"place {place} lies before {self._first}, the first"
        while len(self._taken) <= place - self._first:
            full = next((q for q in self._queues.values() if len(q) >= self._together), None)
            if full is None:
                self._queue(self._next)
                self._next += 1
            else:
                self._taken += full[: self._together]
                del full[: self._together]
        return self._taken[place - self._first][1]

    def _queue(self, draw: int) -> None:
        """Let a batch wait for others of its shape."""
        clips = self._drawn(draw)
        self._queues[self._buckets[clips[0]]].append((draw, clips))

    def _drawn(self, draw: int) -> list[int]:
        """The clips of a batch by its number in the order in which batches are drawn."""
        while self._starts[-1] <= draw:
            epoch = len(self._starts) - 1
            self._starts.append(self._starts[-1] + self.batches_in_epoch(epoch))
        epoch = bisect_right(self._starts, draw) - 1
        if self._last[0] != epoch:
            self._last = (epoch, self._batches(epoch))
        return self._last[1][draw - self._starts[epoch]]

    def batches_in_epoch(self, epoch: int) -> int:
        """How many batches an epoch has; all have as many if no visits are fractions."""
        counts = (sum(self._count(clip, epoch) for clip in group) for group in self._groups)
        return sum(-(-count // self._batch_size) for count in counts)

    def state(self, place: int) -> dict[str, object]:
        """What to save in order to go on with a step at `place`, the end of one before."""
        if place > self._first:
            self.indices(place - 1)
        taken = {draw for draw, _ in self._taken[: place - self._first]}
        end = max([*taken, *self._passed, place - 1]) + 1  # of what was drawn until then
        drawn = [*self._passed, *range(self._first + len(self._passed), end)]
        waiting = [draw for draw in drawn if draw not in taken]
        return {"place": place, "order": self._fingerprint, "waiting": waiting}

    def go_on(self, state: Mapping[str, object]) -> int:
        """Start at the place that was saved, with steps of any size, and return it.

        `DataError` if it was of other clips, weights or settings.
        """
        if state["order"] != self._fingerprint:
            raise DataError(
                f"the saved place {state['place']} belongs to another order of batches: the clips, "
                "their weights, batch_size or seed have changed since; restore them, or start anew"
            )
        place = cast("int", state["place"])
        self.start_at(place, cast("list[int]", state.get("waiting", [])))
        return place

    def _count(self, clip: int, epoch: int) -> int:
        """How often a clip is seen in an epoch."""
        visits, phase = self._visits[clip], clip * GOLDEN % 1
        return floor((epoch + 1) * visits + phase) - floor(epoch * visits + phase)

    def _batches(self, epoch: int) -> list[list[int]]:
        random = Random(f"order {self._seed} {epoch}")
        batches = []
        for group in self._groups:
            visited = [clip for clip in group for _ in range(self._count(clip, epoch))]
            order = _shuffled(visited, random)
            for start in range(0, len(order), self._batch_size):
                slots = range(start, start + self._batch_size)
                batches.append([order[slot % len(order)] for slot in slots])
        return _shuffled(batches, random)


def _shuffled(things: Sequence[T], random: Random) -> list[T]:
    return sorted(things, key=lambda _: random.random())


@dataclass(frozen=True)
class EncodedClip:
    """Where a clip's parts lie in the cache, and how it is used."""

    name: str
    bucket: Bucket
    latents: int  # an index into the entries of each kind
    captions: tuple[int, ...]
    mask: int | None
    visits: float
    loss_weight: float


@dataclass(frozen=True)
class Pictures:
    """The cache entries that are made of frames; None where no clip of a run has any."""

    latents: Entries
    masks: Entries | None
    first_given: Entries | None  # I2V-A14B: the VAE's view of the first frame and nothing else
    last_given: Entries | None  # the same, with the last frame too


@dataclass(frozen=True)
class EncodedClips:
    """Clips with the cache entries that they share with others."""

    clips: list[EncodedClip]
    pictures: Pictures
    text: Entries
    no_caption: int  # the entry of ""

    def __len__(self) -> int:
        return len(self.clips)

    def first(self) -> tuple[Tensor, Tensor]:
        """Latents (C, F, h, w) and text (L, D) of the first clip."""
        clip = self.clips[0]
        return self.pictures.latents.read(clip.latents), self.text.read(clip.captions[0])


@dataclass(frozen=True)
class Batch:
    """Clips of one shape; what no clip of a run has is None."""

    clips: list[int]
    latents: Tensor  # (B, C, F, h, w)
    text: list[Tensor]  # B times (L_i, D)
    mask: Tensor | None  # (B, F, h, w): the weight of each place in the loss
    loss_weight: Tensor  # (B,)
    condition: Tensor | None  # (B, C, F, h, w): the VAE's view of the given frames
    first_given: Tensor  # (B,) bool: whether the model is given the first frame
    last_given: Tensor  # (B,) bool


@dataclass(frozen=True)
class Draws:
    """Shares of samples that differ in what the model is given; all are drawn by (seed, place)."""

    seed: int
    caption_dropout: float = 0.0
    first_frame: float = 0.0
    last_frame: float = 0.0


def load_batch(clips: EncodedClips, indices: list[int], draws: Draws, place: int) -> Batch:
    """The batch of the clips `indices` at `place` of a run; damaged entries are made anew."""
    chosen = [clips.clips[index] for index in indices]
    captions = [caption_of(clips, clip, draws, place, slot) for slot, clip in enumerate(chosen)]
    first, last = (
        [happens(draws.seed, name, place, slot, share) for slot in range(len(chosen))]
        for name, share in (("first", draws.first_frame), ("last", draws.last_frame))
    )
    latents = torch.stack([clips.pictures.latents.read(clip.latents) for clip in chosen])
    return Batch(
        clips=indices,
        latents=latents,
        text=[clips.text.read(caption) for caption in captions],
        mask=_masks(clips.pictures, chosen, latents),
        loss_weight=torch.tensor([clip.loss_weight for clip in chosen]),
        condition=_conditions(clips.pictures, chosen, last),
        first_given=torch.tensor(first),
        last_given=torch.tensor(last),
    )


def caption_of(clips: EncodedClips, clip: EncodedClip, draws: Draws, place: int, slot: int) -> int:
    """The text entry of a sample: one of the clip's captions, or that of ""."""
    if happens(draws.seed, "dropout", place, slot, draws.caption_dropout):
        return clips.no_caption
    if len(clip.captions) == 1:
        return clip.captions[0]
    return Random(f"caption {draws.seed} {place} {slot}").choice(clip.captions)


def happens(seed: int, what: str, place: int, slot: int, share: float) -> bool:
    """Whether something that is done to a share of samples is done to this one."""
    return Random(f"{what} {seed} {place} {slot}").random() < share


def _masks(pictures: Pictures, chosen: Sequence[EncodedClip], latents: Tensor) -> Tensor | None:
    if pictures.masks is None or all(clip.mask is None for clip in chosen):
        return None
    everything = torch.ones(latents.shape[2:])  # (F, h, w)
    return torch.stack(
        [everything if clip.mask is None else pictures.masks.read(clip.mask) for clip in chosen]
    )


def _conditions(
    pictures: Pictures, chosen: Sequence[EncodedClip], last: Sequence[bool]
) -> Tensor | None:
    if pictures.first_given is None:
        return None
    rows = []
    for clip, with_last in zip(chosen, last, strict=True):
        entries = pictures.last_given if with_last else pictures.first_given
        assert entries is not None, "a last frame is given, but was not encoded"
        rows.append(entries.read(clip.latents))
    return torch.stack(rows)
