"""A folder of videos and images with sidecar captions becomes a list of items."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["video", "image"]

KIND_OF_SUFFIX: dict[str, Kind] = {
    **dict.fromkeys((".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi"), "video"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image"),
}
CAPTION_SUFFIX = ".txt"
LISTED_PROBLEMS = 5  # an error that lists more than a screen is not read


class DataError(ValueError):
    """The user's data cannot be used as it is: one message that names the files and the mend."""


@dataclass(frozen=True)
class Item:
    """One captioned file of a dataset; `name` is its path from the dataset's root, with "/"."""

    path: Path
    caption: str
    kind: Kind
    name: str


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, as it is seen: rotation applied, frames / fps = its seconds.

    An image is one frame at 0 fps.
    """

    frames: int
    fps: float
    height: int
    width: int


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raise one `DataError` that counts the problems, if any, and lists the first of them."""
    if not problems:
        return
    lines = [f"{where}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"]
    lines += [f"  {problem}" for problem in problems[:LISTED_PROBLEMS]]
    if len(problems) > LISTED_PROBLEMS:
        lines.append(f"  ... and {len(problems) - LISTED_PROBLEMS} more")
    raise DataError("\n".join(lines))


def read_folder(root: Path, key: str) -> list[Item]:
    """All videos and images under `root`, sorted by name, captioned by `<stem>.txt` (UTF-8) each.

    `key` is the config key that named the folder. Hidden files and folders are ignored, and links
    are followed. `DataError` unless every media file has exactly one caption and every caption
    exactly one media file.
    """
    where = f"{key}={root}"
    if not root.exists():
        raise DataError(f"{where}: there is no such folder; give the folder that holds your videos")
    if not root.is_dir():
        raise DataError(f"{where}: this is a file; give the folder that holds your videos")

    media: dict[Path, list[Path]] = defaultdict(list)  # path without suffix -> files
    captions: dict[Path, Path] = {}
    for path in _visible_files(root):
        suffix = path.suffix.lower()
        if suffix in KIND_OF_SUFFIX:
            media[path.with_suffix("")].append(path)
        elif suffix == CAPTION_SUFFIX:
            captions[path.with_suffix("")] = path
    if not media:
        raise DataError(f"{where}: holds no video or image ({' '.join(KIND_OF_SUFFIX)})")

    items, problems = [], []
    for stem in sorted(media.keys() | captions.keys()):
        try:
            items.append(_pair(root, media.get(stem, []), captions.get(stem)))
        except DataError as problem:
            problems.append(str(problem))
    raise_problems(where, problems)
    return sorted(items, key=lambda item: item.name)


def _visible_files(root: Path) -> list[Path]:
    """Every file below `root` that is not hidden; a folder linked to several times is read once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    files, seen = [], {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        files += [Path(folder, name) for name in names if not name.startswith(".")]
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders.clear()  # os.walk descends into what is left in this list
        for name in visible:
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                subfolders.append(name)
    return files


def _pair(root: Path, media: list[Path], caption: Path | None) -> Item:
    """The item of one media file and its caption; `DataError` that says what keeps them apart."""
    names = [path.relative_to(root).as_posix() for path in sorted(media)]
    if caption and not media:
        name = caption.relative_to(root).as_posix()
        raise DataError(f"{name}: no video or image of this name; add it or remove the caption")
    if len(media) > 1:
        raise DataError(f"{', '.join(names)}: share one caption file; rename one of them")
    (path,), (name,) = media, names
    if not caption:
        raise DataError(f"{name}: has no caption; write it to {path.with_suffix('.txt').name}")
    return Item(path, _read_caption(caption, root), KIND_OF_SUFFIX[path.suffix.lower()], name)


def _read_caption(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()  # Windows editors write a BOM
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error
    if not caption:
        raise DataError(f"{name}: is empty; write what is seen in the video")
    return caption


def split_heldout(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """(training, held out): about `fraction` of the items, drawn by their names, is held out.

    An item keeps its side when others are added, but for the small sets where the draw must be
    mended: of two or more items at least one is held out (unless `fraction` is 0), and never all.
    """
    if fraction <= 0 or len(items) < 2:
        return list(items), []
    by_draw = sorted(items, key=_draw)
    count = sum(_draw(item) < fraction for item in items)
    count = min(max(count, 1), len(items) - 1)
    heldout = {item.name for item in by_draw[:count]}
    return (
        [item for item in items if item.name not in heldout],
        [item for item in items if item.name in heldout],
    )


def _draw(item: Item) -> float:
    """A number in [0, 1) that depends on the item's name alone."""
    digest = hashlib.sha256(os.fsencode(item.name)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
