"""Latents and text embeddings on disk: one safetensors file per entry, named by what is in it.

The name of an entry is the hash of its recipe: everything that its content depends on, and nothing
else (no path, no time), so an entry is either right or missing, and the folder can be copied.

    root/latents/ab/abcdef….safetensors    "latents" (C, F, h, w)
    root/text/ab/abcdef….safetensors       "text" (L, D)
    root/files.json                        sha256 of each source file, by path, size and time

Files appear under their final name only when complete, so a killed run leaves nothing half written.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data.buckets import Clip
from data.media import read_clip
from data.sources import DataError

EntryKind = Literal["latents", "text"]
Progress = Callable[[Iterable[int], str], Iterable[int]]
FileIndex = dict[str, tuple[int, int, str]]  # absolute path -> size, mtime in ns, sha256

DIMENSIONS: dict[EntryKind, int] = {"latents": 4, "text": 2}
READER = 1  # raise it when `read_clip` gives other frames for the same clip
FRESH_NS = 2_000_000_000  # a file written again so soon may keep its size and its mtime
MEND = "delete this file, if it is there, and start again: it will be encoded anew"


@dataclass(frozen=True)
class CacheReport:
    """What was done for `what`, counted in clips or prompts."""

    what: EntryKind
    reused: int
    encoded: int
    repaired: int  # encoded again: the entry was truncated or damaged

    def sentence(self) -> str:
        """Such as "latents: 24 encoded, 3 reused"."""
        text = f"{self.what}: {self.encoded} encoded, {self.reused} reused"
        return text + (f", {self.repaired} damaged and encoded again" if self.repaired else "")


def cache_latents(
    clips: Sequence[Clip],
    encode: Callable[[Tensor], Tensor],
    encoder_id: str,
    root: Path,
    progress: Progress,
) -> tuple[list[Path], CacheReport]:
    """The entry of each clip, encoded if it is missing.

    `encode` maps frames, uint8 (T, H, W, 3), to latents (C, F, h, w), stored in their dtype. It is
    called for missing entries only, so it may load its model when first called. `encoder_id` names
    the weights and the dtype behind it. `DataError` for a file that cannot be read and for latents
    that are not finite.
    """
    digests = file_digests([clip.item.path for clip in clips], root, progress)
    recipes = [
        _recipe(
            {
                "encoder": encoder_id,
                "file": digest,
                "window": [clip.start, clip.fps, clip.policy],
                "bucket": asdict(clip.bucket),
                "reader": READER,
            }
        )
        for clip, digest in zip(clips, digests, strict=True)
    ]

    def encode_clip(index: int) -> Tensor:
        return encode(read_clip(clips[index]))

    names = [clip.item.name for clip in clips]
    return _fill("latents", names, recipes, encode_clip, root, progress)


def cache_text(
    prompts: Sequence[str],
    encode: Callable[[list[str]], list[Tensor]],
    encoder_id: str,
    root: Path,
    progress: Progress,
) -> tuple[dict[str, Path], CacheReport]:
    """The entry of each different prompt, encoded if it is missing; "" is a prompt like others.

    `encode` maps prompts to embeddings (L, D); the rest is as in `cache_latents`.
    """
    unique = list(dict.fromkeys(prompts))
    recipes = [_recipe({"encoder": encoder_id, "prompt": prompt}) for prompt in unique]

    def encode_prompt(index: int) -> Tensor:
        # One by one: what is stored must not depend on the prompts beside it in a batch.
        (text,) = encode([unique[index]])
        return text

    names = [f"the prompt {prompt!r}" for prompt in unique]
    paths, report = _fill("text", names, recipes, encode_prompt, root, progress)
    return dict(zip(unique, paths, strict=True)), report


def load_latents(path: Path) -> Tensor:
    """The latents (C, F, h, w) of an entry; `DataError` if it is missing, damaged or not finite."""
    return _load(path, "latents")


def load_text(path: Path) -> Tensor:
    """The embedding (L, D) of an entry; `DataError` if it is missing, damaged or not finite."""
    return _load(path, "text")


def _recipe(parts: dict[str, object]) -> str:
    return json.dumps(parts, sort_keys=True)


def _fill(
    kind: EntryKind,
    names: Sequence[str],
    recipes: Sequence[str],
    encode: Callable[[int], Tensor],
    root: Path,
    progress: Progress,
) -> tuple[list[Path], CacheReport]:
    """Encode what is missing or damaged among the entries of `recipes`, each once."""
    paths = [_entry_path(root, kind, recipe) for recipe in recipes]
    first = {path: index for index, path in reversed(list(enumerate(paths)))}
    missing = sorted(i for path, i in first.items() if not _is_sound(path, kind, recipes[i]))
    repaired = sum(paths[index].exists() for index in missing)
    if missing:
        for index in progress(missing, f"encoding {kind}"):
            tensor = encode(index).detach().cpu().contiguous()
            assert tensor.ndim == DIMENSIONS[kind], f"{kind} of shape {tuple(tensor.shape)}"
            if not torch.isfinite(tensor).all():
                raise DataError(
                    f"{names[index]}: the encoder returned NaN or infinity and nothing was "
                    "stored; run it in fp32 or bf16, or remove this item"
                )
            write_file(paths[index], save({kind: tensor}, metadata={"recipe": recipes[index]}))
    encoded = len(missing) - repaired
    return paths, CacheReport(kind, len(paths) - len(missing), encoded, repaired)


def _entry_path(root: Path, kind: EntryKind, recipe: str) -> Path:
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    return root / kind / digest[:2] / f"{digest}.safetensors"


def _is_sound(path: Path, kind: EntryKind, recipe: str) -> bool:
    """Whether an entry is complete and what its name says, by its header: the data is not read."""
    try:
        with safe_open(path, framework="pt") as entry:
            shape = entry.get_slice(kind).get_shape()
            return entry.metadata() == {"recipe": recipe} and len(shape) == DIMENSIONS[kind]
    except (OSError, SafetensorError):
        return False


def _load(path: Path, kind: EntryKind) -> Tensor:
    try:
        tensor = load_file(path)[kind]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"cache entry {path}: cannot be read ({error}); {MEND}") from error
    if not torch.isfinite(tensor).all():
        raise DataError(f"cache entry {path}: holds NaN or infinity; {MEND}")
    return tensor


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is seen whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
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


def file_digests(paths: Sequence[Path], root: Path, progress: Progress) -> list[str]:
    """The sha256 of each file's bytes; only files that changed in size or time are read again."""
    names = [os.path.abspath(path) for path in paths]
    stamps = {name: _stamp(name) for name in names}
    known = _read_index(root / "files.json")
    stale = [name for name, stamp in stamps.items() if known.get(name, ())[:2] != stamp]
    if stale:
        for index in progress(range(len(stale)), "hashing files"):
            known[stale[index]] = (*stamps[stale[index]], _digest(stale[index]))
        settled = time.time_ns() - FRESH_NS
        index = {name: entry for name, entry in known.items() if entry[1] < settled}
        write_file(root / "files.json", json.dumps(index, indent=0).encode())
    return [known[name][2] for name in names]


def _stamp(name: str) -> tuple[int, int]:
    try:
        status = os.stat(name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime_ns


def _digest(name: str) -> str:
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error


def _read_index(path: Path) -> FileIndex:
    """The stored digests; none if the index is missing or damaged: it is then made anew."""
    try:
        index = json.loads(path.read_bytes())
        return {name: (int(s), int(t), str(digest)) for name, (s, t, digest) in index.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
