"""A folder of videos and images with sidecar captions becomes a list of items."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from data.items import KIND_OF_SUFFIX, DataError, Dropped, Item, Reading, Source, kind_of, printable

CAPTION_SUFFIX = ".txt"


def read_folder(source: Source) -> Reading:
    """All videos and images below a folder, sorted by name, with their sidecar files.

    Of `a.mp4`: `a.txt` is its caption (UTF-8), `a.2.txt`, `a.3.txt`, ... are further ones, and
    `a.mask.png`, or any other suffix of ours, is its mask. Hidden files and folders are ignored,
    links are followed.
    """
    media: dict[Path, list[Path]] = defaultdict(list)  # path without suffix -> files
    texts: list[Path] = []
    for path in _visible_files(source.path):
        if kind_of(path):
            media[path.with_suffix("")].append(path)
        elif path.suffix.lower() == CAPTION_SUFFIX:
            texts.append(path)
    if not media:
        raise DataError(
            f"{source.key}={source.path}: holds no video or image ({' '.join(KIND_OF_SUFFIX)})"
        )
    owned = {stem for stem in media if stem.suffix == ".mask" and stem.with_suffix("") in media}
    masks = {stem.with_suffix(""): media.pop(stem) for stem in owned}

    captions: dict[Path, list[tuple[int, Path]]] = defaultdict(list)
    dropped = []
    for path in texts:
        stem, number = _captioned(path, media.keys())
        if stem in media:
            captions[stem].append((number, path))
        else:
            reason = "no video or image of this name; add it or remove the caption"
            dropped.append(Dropped(_name(path, source.path), reason))
    items = []
    for stem, files in media.items():
        try:
            texts = [path for _, path in sorted(captions[stem])]
            items.append(_pair(source, files, texts, masks.get(stem, [])))
        except DataError as problem:
            dropped += [Dropped(_name(path, source.path), str(problem)) for path in files]
    items.sort(key=lambda item: item.name)
    return Reading(items, sorted(dropped, key=lambda lost: lost.name), [])


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


def _captioned(path: Path, media: Iterable[Path]) -> tuple[Path, int]:
    """Which file (without its suffix) a caption is of, and its number; a.2.txt may be of a.2.mp4"""
    stem = path.with_suffix("")
    if stem not in media and stem.suffix[1:].isdecimal() and stem.with_suffix("") in media:
        return stem.with_suffix(""), int(stem.suffix[1:])
    return stem, 0


def _pair(source: Source, media: list[Path], captions: list[Path], masks: list[Path]) -> Item:
    """The item of a media file and its sidecars; `DataError` that says what keeps them apart."""
    path = media[0]
    if len(media) > 1:
        names = ", ".join(_name(file, source.path) for file in sorted(media))
        raise DataError(f"{names} share one caption file; rename one of them")
    if not captions:
        caption = printable(path.with_suffix(CAPTION_SUFFIX).name)
        raise DataError(f"has no caption; write it to {caption}")
    if len(masks) > 1:
        names = ", ".join(_name(file, source.path) for file in sorted(masks))
        raise DataError(f"has {len(masks)} masks ({names}); keep one of them")
    prefix = "" if source.regularisation else source.prefix
    return Item(
        path=path,
        captions=tuple(prefix + _read_caption(caption) for caption in captions),
        kind=KIND_OF_SUFFIX[path.suffix.lower()],
        name=_name(path, source.path),
        visits=source.weight,
        loss_weight=source.loss_weight,
        mask=masks[0] if masks else None,
        regularisation=source.regularisation,
    )


def _name(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def _read_caption(path: Path) -> str:
    name = f"its caption {printable(path.name)}"
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()  # Windows editors write a BOM
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); restore it") from error
    if not caption:
        raise DataError(f"{name} is empty; write what is seen in the video")
    return caption
