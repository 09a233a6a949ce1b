"""Which files of a folder belong together, and what they hold: any layout, never the network.

Official repositories, diffusers folders, a `models` folder of ComfyUI, a flat folder of files, and
the Hugging Face cache of any of them. Source: `spec/wan22.md` sections 7.1, 7.2, 7.6 and 7.7.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wan.headers import PICKLES, ModelError
from wan.recognise import Found, recognise

INCOMPLETE = "the download is incomplete: download the model again"
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pth")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
COMFY_TRANSFORMERS = ("diffusion_models", "unet")
COMFY_FOLDERS = (*COMFY_TRANSFORMERS, "text_encoders", "clip", "vae")
DEEPEST = 3  # folders below the one given: deeper ones are another model's
TOKENIZER = "tokenizer.json"
TOKENIZER_FOLDERS = (".", "tokenizer", "google/umt5-xxl", "umt5-xxl")


@dataclass(frozen=True)
class Scan:
    """What a folder holds, as far as headers tell."""

    found: list[Found]
    problems: list[str]  # of weight files that are of no use, one sentence each


def hub_snapshot(path: Path) -> Path:
    """The folder of files in a `models--owner--name` folder of the Hugging Face cache, or `path`.

    `ModelError` if several snapshots are there and none is marked as the latest.
    """
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text().strip()).is_dir():
        return named
    revisions = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    if len(revisions) != 1:
        found = ", ".join(folder.name for folder in revisions) or "none"
        raise ModelError(
            f"{path} holds several snapshots or none ({found}) and refs/main names no one of them; "
            "give the folder of one snapshot"
        )
    return revisions[0]


def scan(folder: Path) -> Scan:
    """Every part of a model in `folder` and a few levels below it."""
    found: list[Found] = []
    problems: list[str] = []
    for inner in _folders(folder):
        try:
            sets = weight_sets(inner)
        except ModelError as error:
            problems.append(str(error))
            continue
        for files in sets:
            try:
                found.append(recognise(files))
            except ModelError as error:
                problems.append(str(error))
    return Scan(found, problems)


def weight_sets(folder: Path) -> list[tuple[Path, ...]]:
    """The weight files of a folder, shards of one part together, in the order of their names.

    `ModelError` if a shard is missing.
    """
    sets: list[tuple[Path, ...]] = []
    for index in sorted(folder.glob("*.safetensors.index.json")):
        sets.append(_indexed(index))
    taken = {file for files in sets for file in files}
    names = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    for file in names:
        if file in taken:
            continue
        shards = _numbered(file)
        sets.append(shards)
        taken.update(shards)
    return sets


def set_of(file: Path) -> tuple[Path, ...]:
    """A weight file, with its other shards if it is one of several."""
    if SHARD.fullmatch(file.name):
        return next((files for files in weight_sets(file.parent) if file in files), (file,))
    return (file,)


def pickles(folder: Path) -> list[str]:
    """Names of the files in a folder that are not read, as they may run code."""
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)


def tokenizer_in(folder: Path) -> Path | None:
    """The folder with tokenizer.json where the known layouts have it; None if there is none."""
    places = (folder / place for place in TOKENIZER_FOLDERS)
    return next((place for place in places if (place / TOKENIZER).is_file()), None)


def read_json(file: Path) -> dict[str, object]:
    """The settings in a JSON file; `ModelError` if there are none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{file} is missing; {INCOMPLETE}") from None
    except ValueError as error:  # not JSON or not text
        raise ModelError(f"{file} is not valid JSON ({error}); {INCOMPLETE}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings, but {type(content).__name__}; {INCOMPLETE}")
    return content


def _folders(folder: Path) -> Iterator[Path]:
    """The folder and those below it; of ComfyUI's `models` only those of parts of such a model."""
    if not any((folder / name).is_dir() for name in COMFY_TRANSFORMERS):
        yield from _below(folder, DEEPEST)
        return
    for name in COMFY_FOLDERS:
        if (folder / name).is_dir():
            yield from _below(folder / name, DEEPEST)


def _below(folder: Path, levels: int) -> Iterator[Path]:
    yield folder
    for inner in sorted(folder.iterdir()) if levels else ():
        if inner.is_dir() and not inner.name.startswith("."):
            yield from _below(inner, levels - 1)


def _indexed(index: Path) -> tuple[Path, ...]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index} names no weight files; {INCOMPLETE}")
    files = sorted({index.parent / Path(str(name)).name for name in shards.values()})
    return _all_there(files)


def _numbered(file: Path) -> tuple[Path, ...]:
    """The shards that a name such as x-00001-of-00002.safetensors tells of; or the file alone."""
    found = SHARD.fullmatch(file.name)
    if not found:
        return (file,)
    stem, count = found[1], found[2]
    names = [f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))]
    return _all_there([file.with_name(name) for name in names])


def _all_there(files: list[Path]) -> tuple[Path, ...]:
    missing = [file.name for file in files if not file.exists()]
    if missing:
        some = ", ".join(missing[:3])
        raise ModelError(
            f"{files[0].parent} has no {some} ({len(missing)} of {len(files)} shards are "
            f"missing); {INCOMPLETE}"
        )
    return tuple(files)
