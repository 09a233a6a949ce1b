"""What is missing in a cache folder is made: each entry once, by whichever process comes first.

The work may be killed at any moment, and any number of processes may do it at once: an entry is
claimed before it is made (`data/claims.py`) and appears whole. What is read is checked
(`data/entries.py`), and made again if it does not pass.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from data.claims import Claim, try_claim, wait_for_release
from data.entries import (
    DIMENSIONS,
    DamagedEntry,
    Entry,
    EntryKind,
    existing_recipes,
    is_sound,
    read_entry,
    remove_partial_files,
    why_missing,
    write_entry,
)
from data.items import DataError
from data.workers import map_in_workers

Encode = Callable[[int, Tensor], Tensor]  # the index of an entry, and what was decoded for it
Progress = Callable[[Iterable[int], str], Iterable[int]]

WRITERS = 4  # threads that write to the disk while the next entries are encoded
MAKE_FIRST = "make them first: python -m tools.cache, with the settings of this run"


@dataclass(frozen=True)
class Store:
    """A cache folder, and how to fill it."""

    root: Path
    workers: int  # processes that decode; 0: this one does
    encode: bool  # False: `DataError` when anything is missing
    progress: Progress
    say: Callable[[str], None]  # tells what had to be made again, while reading


@dataclass(frozen=True)
class CacheReport:
    """What was done for `total` clips or prompts, and why."""

    what: EntryKind
    total: int
    reused: int
    reasons: dict[str, int] = field(default_factory=dict)  # of those that were missing
    elsewhere: int = 0  # of them, encoded by other processes at the same time

    def lines(self) -> list[str]:
        """Such as "latents: 24 reused, 3 encoded", "  2 new", "  1 whose file changed"."""
        missing = sum(self.reasons.values())
        line = f"{self.what}: {self.reused} reused, {missing} encoded"
        if self.elsewhere:
            line += f" ({missing - self.elsewhere} here, {self.elsewhere} by other processes)"
        return [line, *(f"  {count} {reason}" for reason, count in self.reasons.items())]


@dataclass(frozen=True)
class Work:
    """How what is missing is made."""

    decode: Callable[[int], Tensor]  # the index of an entry to what is encoded; in any process
    load_encoder: Callable[[], Encode]
    previous: Sequence[str | None]  # the digest that the file of each entry had before


@dataclass(frozen=True)
class Entries:
    """Cache entries of one kind, one for each clip or prompt."""

    _entries: list[Entry]
    _work: Work
    _store: Store

    @property
    def paths(self) -> list[Path]:
        """Of the file of each; their names change with what is in them."""
        return [entry.path for entry in self._entries]

    def read(self, index: int) -> Tensor:
        """The content of one entry, as it was encoded.

        An entry that is missing, damaged or not finite is made again, and told by `Store.say`;
        `DataError` if that fails too, or if nothing may be encoded.
        """
        entry = self._entries[index]
        try:
            return read_entry(entry)
        except DamagedEntry as damage:
            found = f"{entry.name}: its {entry.kind} in the cache {damage} ({entry.path})"
        if not self._store.encode:
            raise DataError(f"{found}; {MAKE_FIRST}")
        self._store.say(f"{found}; encoding it again")
        decoded = self._work.decode(index)
        write_entry(entry, _encode(entry, index, decoded, self._work.load_encoder()))
        try:
            return read_entry(entry)
        except DamagedEntry as damage:
            raise DataError(
                f"{found}, and again {damage} after it was encoded anew; check the disk, or set "
                "another cache folder"
            ) from damage


def fill(
    kind: EntryKind, entries: list[Entry], work: Work, store: Store
) -> tuple[Entries, CacheReport]:
    """Make what is missing or damaged among `entries`, each once."""
    order = sorted(range(len(entries)), key=lambda index: (entries[index].frames, -index))
    makers = {entries[index].path: index for index in order}  # the longest; of equals, the first
    missing = sorted(index for index in makers.values() if not is_sound(entries[index]))
    reasons: Counter[str] = Counter()
    elsewhere = 0
    if missing:
        existing = existing_recipes(store.root, kind)
        reasons.update(why_missing(entries[i], existing, work.previous[i]) for i in missing)
        if not store.encode:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            raise DataError(
                f"{store.root}: {len(missing)} of {len(makers)} entries of {kind} are missing "
                f"({why}), such as that of {entries[missing[0]].name}; {MAKE_FIRST}"
            )
        remove_partial_files(store.root, kind)
        elsewhere = len(missing) - _encode_missing(entries, missing, work, store)
    report = CacheReport(kind, len(entries), len(entries) - len(missing), dict(reasons), elsewhere)
    return Entries(entries, work, store), report


def _encode_missing(entries: list[Entry], missing: list[int], work: Work, store: Store) -> int:
    """Make what no other process makes, wait for the rest; how many were made here."""
    encoder = cache(work.load_encoder)  # loaded when there is something for it to do
    made, claimed = _encode_unclaimed(entries, missing, work, encoder, store)
    while claimed:
        for index in store.progress(claimed, "waiting for another process"):
            wait_for_release(_lock_path(entries[index], store))
        # What is still not there was claimed by a process that died: a handful, no job for workers.
        alone = replace(store, workers=0)
        more, claimed = _encode_unclaimed(entries, claimed, work, encoder, alone)
        made += more
    return made


def _encode_unclaimed(
    entries: list[Entry],
    indices: list[int],
    work: Work,
    encoder: Callable[[], Encode],
    store: Store,
) -> tuple[int, list[int]]:
    """Make those of `indices` that nobody else makes: how many, and which others have claimed."""
    claims: dict[int, Claim] = {}
    claimed: list[int] = []

    def unclaimed() -> Iterator[int]:  # the workers ask for a few more than are encoded
        for index in indices:
            claim = try_claim(_lock_path(entries[index], store))
            if claim is None:
                claimed.append(index)
            elif is_sound(entries[index]):  # written since it was found missing
                claim.release()
            else:
                claims[index] = claim
                yield index

    made = 0
    writes: deque[Future[None]] = deque()
    progress = store.progress(indices, f"encoding {entries[0].kind}")
    try:
        results = map_in_workers(
            work.decode, unclaimed(), store.workers, lambda index: entries[index].name
        )
        with (
            ThreadPoolExecutor(WRITERS) as writers,
            closing(results) as decoded,  # pyright: ignore[reportArgumentType] (a generator)
        ):
            for (index, tensor), _ in zip(decoded, progress, strict=False):
                content = _encode(entries[index], index, tensor, encoder())
                writes.append(writers.submit(_write, entries[index], content, claims.pop(index)))
                made += 1
                if len(writes) > WRITERS:
                    writes.popleft().result()
        for write in writes:
            write.result()
    finally:
        for claim in claims.values():
            claim.release()
    return made, claimed


def _encode(entry: Entry, index: int, decoded: Tensor, encode: Encode) -> Tensor:
    tensor = encode(index, decoded).detach().cpu().contiguous()
    assert tensor.ndim == DIMENSIONS[entry.kind], f"{entry.kind} of shape {tuple(tensor.shape)}"
    if not torch.isfinite(tensor).all():
        raise DataError(
            f"{entry.name}: the encoder returned NaN or infinity and nothing was stored; run it in "
            "fp32 or bf16, or remove this item"
        )
    return tensor


def _write(entry: Entry, tensor: Tensor, claim: Claim) -> None:
    try:
        write_entry(entry, tensor)
    finally:
        claim.release()


def _lock_path(entry: Entry, store: Store) -> Path:
    return store.root / "locks" / entry.path.stem
