"""What of a run W&B has on the disk: its own files, read back.

A .wandb file is a log of LevelDB: blocks of 32 KiB, in them pieces of records, each with a header
of checksum, length and kind; a record is a protobuf message. The last one may be cut off.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] (made when imported)

FILE_HEADER, PIECE_HEADER = 7, struct.Struct("<IHB")  # bytes; checksum, length, kind
BLOCK = 32768  # bytes
WHOLE, FIRST, LAST = 1, 2, 4  # kinds of pieces; 3 = between


def records(path: Path) -> Iterator[Record]:
    """Every whole record of a .wandb file, in the order in which they were written."""
    content, place, parts = path.read_bytes(), FILE_HEADER, b""
    while place + PIECE_HEADER.size <= len(content):
        if BLOCK - place % BLOCK < PIECE_HEADER.size:
            place += BLOCK - place % BLOCK  # padding
            continue
        _, length, kind = PIECE_HEADER.unpack_from(content, place)
        place += PIECE_HEADER.size
        if kind == 0 or place + length > len(content):
            return
        piece = content[place : place + length]
        place += length
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)


@dataclass(frozen=True)
class Logged:
    """What W&B has of a run: nothing yet, or all of it up to a step."""

    step: int = -1
    names: frozenset[str] = frozenset()  # of the values of that step
    artifacts: frozenset[str] = frozenset()  # their digests


def history(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Every step that was logged to a .wandb file: its number, and its values by name."""
    for record in records(path):
        if not record.HasField("history"):
            continue
        values: dict[str, object] = {}
        for item in record.history.item:
            *outer, name = item.nested_key or [item.key]
            inner = values
            for key in outer:  # a value of several parts, such as a video
                inner = cast("dict[str, object]", inner.setdefault(key, {}))
            inner[name] = json.loads(item.value_json)
        yield record.history.step.num, values


def logged(folder: Path, run_id: str) -> Logged:
    """What W&B's files in a run's folder hold of a run.

    What was in the memory of a process that was killed is not in them.
    """
    step, names, artifacts = -1, frozenset(), set()
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")):
        artifacts |= {r.artifact.digest for r in records(path) if r.HasField("artifact")}
        for here, values in history(path):
            if here >= step:
                names = names | values.keys() if here == step else frozenset(values)
                step = here
    return Logged(step, names, frozenset(artifacts))
