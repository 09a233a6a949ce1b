"""One file of the cache: named by its recipe, and checked whenever it is read.

The recipe says everything that the content depends on, and nothing else (no path, no time). The
name is its hash, so an entry is either right or missing, and the folder can be copied.

    root/latents/ab/abcdef….safetensors     "latents" (C, F, h, w)
    root/text/ab/abcdef….safetensors        "text" (L, D)
    root/mask/ab/abcdef….safetensors        "mask" (F, h, w)
    root/condition/ab/abcdef….safetensors   "condition" (C, F, h, w)

The metadata of each holds its recipe, the pixel frames that it covers, and a checksum of it all.
"""

import hashlib
import json
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import write_file

EntryKind = Literal["latents", "text", "mask", "condition"]
Recipe = dict[str, object]

DIMENSIONS: dict[EntryKind, int] = {"latents": 4, "text": 2, "mask": 3, "condition": 4}
FORMAT = 2  # raise it when the metadata changes
PARTIAL_SECONDS = 86_400.0  # no write takes a day: the process that left a partial file is dead
# Why an entry is made again, by the first part of its recipe that differs, in this order.
REASONS = {
    "format": "in an older cache format",
    "reader": "read by an older version",
    "encoder": "made by another VAE or dtype",
    "mask": "whose mask changed",
}
NEW = "new"
CHANGED = "whose file changed"
DAMAGED = "damaged"
OTHER_TEXT_ENCODER = "made by another text encoder"
OTHER_SHAPE = "with other frames or size"


class DamagedEntry(Exception):
    """A file that is missing, or not what was written there; the message says which."""


@dataclass(frozen=True)
class Entry:
    """Where something is stored, and how to tell whether it is there."""

    kind: EntryKind
    path: Path
    recipe: str  # JSON
    name: str  # of the clip or the prompt, for messages
    frames: int = 0  # of pixels that a condition must cover: its recipe leaves them open


def make_entry(root: Path, kind: EntryKind, name: str, recipe: Recipe, frames: int = 0) -> Entry:
    """The entry of a recipe in the cache folder `root`; nothing is read or written."""
    text = json.dumps({"format": FORMAT, **recipe}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Entry(kind, root / kind / digest[:2] / f"{digest}.safetensors", text, name, frames)


def is_sound(entry: Entry) -> bool:
    """Whether an entry is complete and what its name says, by its header: the data is not read."""
    try:
        with safe_open(entry.path, framework="pt") as file:
            _read_metadata(file, entry)
    except (OSError, SafetensorError, DamagedEntry):
        return False
    return True


def read_entry(entry: Entry) -> Tensor:
    """What an entry holds, every byte checked; `DamagedEntry` unless it is what was written.

    Of a condition the first latent frames, as many as make `entry.frames` of pixels.
    """
    try:
        with safe_open(entry.path, framework="pt") as file:
            metadata = _read_metadata(file, entry)
            # A copy: the file is mapped to memory, and could change after the check.
            tensor = file.get_tensor(entry.kind).clone()
    except FileNotFoundError as error:
        raise DamagedEntry("is missing") from error
    except (OSError, SafetensorError) as error:
        raise DamagedEntry(f"cannot be read ({error})") from error
    if metadata["crc32"] != _checksum(tensor, entry.recipe, metadata["frames"]):
        raise DamagedEntry("holds other bytes than were written")
    if not torch.isfinite(tensor).all():
        raise DamagedEntry("holds NaN or infinity")
    return _first_frames(tensor, int(metadata["frames"]), entry.frames)


def write_entry(entry: Entry, tensor: Tensor) -> None:
    """Store an entry, seen whole or not at all; `DataError` if that cannot be written."""
    frames = str(entry.frames)
    metadata = {
        "recipe": entry.recipe,
        "frames": frames,
        "crc32": _checksum(tensor, entry.recipe, frames),
    }
    write_file(entry.path, save({entry.kind: tensor}, metadata))


def why_missing(
    entry: Entry, existing: Mapping[object, Sequence[Recipe]], previous: str | None
) -> str:
    """Why an entry has to be made, by the entries that exist; see `existing_recipes`.

    `previous` is the digest that its file had before, if it had another.
    """
    recipe = json.loads(entry.recipe)
    subject = _subject(recipe)
    alike = existing.get(subject, [])
    if entry.path.exists() and not is_sound(entry):
        return OTHER_SHAPE if entry.frames and recipe in alike else DAMAGED
    # Another process may have written this one in the meantime.
    differences = [_differences(recipe, other) for other in alike if other != recipe]
    if not differences:
        return CHANGED if previous in existing else NEW
    key = next((key for key in REASONS if key in min(differences, key=len)), None)
    if key == "encoder" and entry.kind == "text":
        return OTHER_TEXT_ENCODER
    return REASONS[key] if key else OTHER_SHAPE


def existing_recipes(root: Path, kind: EntryKind) -> dict[object, list[Recipe]]:
    """The recipes of all entries of a kind that can be read, by the file or prompt they are of."""
    recipes: dict[object, list[Recipe]] = defaultdict(list)
    for path in (root / kind).glob("*/*.safetensors"):
        # Other files than ours, and damaged ones, are no reason for anything.
        with suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
            with safe_open(path, framework="pt") as file:
                recipe = json.loads(file.metadata()["recipe"])
            recipes[_subject(recipe)].append(recipe)
    return recipes


def remove_partial_files(root: Path, kind: EntryKind) -> None:
    """Remove what processes left that were killed while writing, a day ago or more."""
    for path in (root / kind).glob("*/.*.safetensors.*"):
        with suppress(OSError):  # another process removes it as well
            if path.stat().st_mtime < time.time() - PARTIAL_SECONDS:
                path.unlink()


def _read_metadata(file: safe_open, entry: Entry) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("recipe") != entry.recipe or metadata.keys() != {"recipe", "frames", "crc32"}:
        raise DamagedEntry("is that of something else")
    if list(file.keys()) != [entry.kind]:
        raise DamagedEntry(f"holds no {entry.kind}")
    shape = file.get_slice(entry.kind).get_shape()
    if len(shape) != DIMENSIONS[entry.kind]:
        raise DamagedEntry(f"holds {entry.kind} of shape {tuple(shape)}")
    if not metadata["frames"].isdecimal() or int(metadata["frames"]) < entry.frames:
        raise DamagedEntry(f"covers {metadata['frames']} frames, not {entry.frames}")
    return metadata


def _first_frames(tensor: Tensor, covered: int, frames: int) -> Tensor:
    """What makes `frames` of the covered pixel frames: all, or the start of a condition."""
    if frames == covered:
        return tensor
    stride = (covered - 1) // (tensor.shape[1] - 1)
    return tensor[:, : (frames - 1) // stride + 1]


def _checksum(tensor: Tensor, recipe: str, frames: str) -> str:
    head = f"{recipe} {frames} {tensor.dtype} {tuple(tensor.shape)}"
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{zlib.crc32(data, zlib.crc32(head.encode())):08x}"


def _subject(recipe: Recipe) -> object:
    """The digest of the file that an entry is of, or its prompt."""
    return recipe["prompt"] if "prompt" in recipe else recipe["file"]


def _differences(recipe: Recipe, other: Recipe) -> set[str]:
    return {key for key in recipe.keys() | other.keys() if recipe.get(key) != other.get(key)}
