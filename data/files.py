"""What is known of each source file: its sha256 and what it holds, read again only if it changed.

    root/files.json    by path: size, time and what was found

The index only saves time: whatever is missing of it, or damaged, is read again from the files.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from data.items import DataError, MediaInfo, kind_of
from data.media import probe
from data.workers import map_in_workers

Progress = Callable[[Iterable[int], str], Iterable[int]]
Stamp = tuple[int, int]  # size, mtime in ns

INDEX = "files.json"
PROBE = 1  # raise it when `probe` finds something else in the same file
FRESH_NS = 2_000_000_000  # a file written again so soon may keep its size and its mtime
UNSETTLED: Stamp = (-1, -1)  # no file has it: the file is read again next time
SAVE_SECONDS = 30  # a killed run loses so much of reading at most


@dataclass(frozen=True)
class FileFacts:
    """What was found in a file: `info`, or the `problem` that keeps it from being used."""

    digest: str  # sha256 of the bytes; "" if it cannot be read at all
    info: MediaInfo | None
    problem: str | None  # what was found and what to do, without the file's name
    previous: str | None  # the digest that this path had before, if it ever had another


@dataclass(frozen=True)
class _Entry:
    stamp: Stamp
    facts: FileFacts


def read_files(
    paths: Sequence[Path], root: Path, workers: int, progress: Progress
) -> list[FileFacts]:
    """The facts of each file; those whose size and time are as the index in `root` says, from it.

    `DataError` if the index cannot be written; nothing is written if nothing has changed.
    """
    begun = time.time_ns()
    names = [os.path.abspath(path) for path in paths]
    stamps = {name: _stamp(name) for name in names}
    known = _read_index(root / INDEX)
    stale = [n for n, stamp in stamps.items() if n not in known or known[n].stamp != stamp]
    found: dict[str, _Entry] = {}
    saved = -float("inf")  # an index that cannot be written is found by the first file
    if stale:
        order = progress(range(len(stale)), "reading files")
        for index, facts in map_in_workers(
            lambda index: _read(Path(stale[index])), order, workers, stale.__getitem__
        ):
            name = stale[index]
            facts = replace(facts, previous=_previous(facts, known.get(name)))
            found[name] = _Entry(_settled(stamps[name], begun), facts)
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(root / INDEX, found)
                saved = time.monotonic()
        _save(root / INDEX, found)
    known |= found
    return [known[name].facts for name in names]


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is seen whole or not at all; `DataError` if it cannot be written."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # other machines write, too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(
            f"cannot write {path} ({error.strerror}); free some space, or set another cache folder"
        ) from error


def _stamp(name: str) -> Stamp | None:
    try:
        status = os.stat(name)
    except OSError:
        return None  # reading it says why
    return status.st_size, status.st_mtime_ns


def _settled(stamp: Stamp | None, begun: int) -> Stamp:
    """The stamp, if a later change of the file would show in it."""
    return UNSETTLED if stamp is None or abs(begun - stamp[1]) < FRESH_NS else stamp


def _read(path: Path) -> FileFacts:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); restore it, or remove it and its caption"
        return FileFacts("", None, problem, None)
    kind = kind_of(path)
    if kind is None:
        problem = f"is no video or image by its name ({path.suffix or 'no suffix'}); rename it"
        return FileFacts(digest, None, problem, None)
    try:
        return FileFacts(digest, probe(path, kind, path.name), None, None)
    except DataError as error:
        return FileFacts(digest, None, str(error).removeprefix(f"{path.name}: "), None)


def _previous(facts: FileFacts, before: _Entry | None) -> str | None:
    if before is None:
        return None
    return before.facts.previous if before.facts.digest == facts.digest else before.facts.digest


def _read_index(path: Path) -> dict[str, _Entry]:
    """What the index holds; nothing if it is missing, damaged or of another version."""
    try:
        index = json.loads(path.read_bytes())
        if index["probe"] != PROBE:
            return {}
        return {name: _entry(*fields) for name, fields in index["files"].items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _entry(
    stamp: list[int],
    digest: str,
    info: list[float] | None,
    problem: str | None,
    previous: str | None,
) -> _Entry:
    size, mtime = stamp
    if info is None:
        return _Entry((size, mtime), FileFacts(digest, None, problem, previous))
    frames, fps, height, width = info
    media = MediaInfo(int(frames), fps, int(height), int(width))
    return _Entry((size, mtime), FileFacts(digest, media, problem, previous))


def _save(path: Path, found: dict[str, _Entry]) -> None:
    """Add entries to the index, beside what other processes have written to it meanwhile."""
    kept = {name: entry for name, entry in found.items() if entry.facts.digest}
    files = {
        name: (
            entry.stamp,
            entry.facts.digest,
            entry.facts.info and astuple(entry.facts.info),
            entry.facts.problem,
            entry.facts.previous,
        )
        for name, entry in (_read_index(path) | kept).items()
    }
    write_file(path, json.dumps({"probe": PROBE, "files": files}).encode())
