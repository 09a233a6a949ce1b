"""Rows of lists become items: which columns are read, and what each of them may say."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data.items import (
    DataError,
    Dropped,
    Item,
    Reading,
    Source,
    Split,
    did_you_mean,
    kind_of,
    printable,
)
from data.tables import SPLITS, Row, Table, read_rows, shorten

# Of several names for the same thing, the first that a row fills counts.
PATH_COLUMNS = ("path", "file_name", "file", "video", "image")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")
OTHER_COLUMNS = ("repeats", "start", "end", "mask", "split")
COLUMNS = (*PATH_COLUMNS, *CAPTION_COLUMNS, *OTHER_COLUMNS)

HALF_CHARACTERS = re.compile(r"[\ud800-\udfff]")
# How a file begins -> its suffix. WebM is a kind of Matroska, and both WebP and AVI are in RIFF.
BEGINNINGS = (
    (rb"\x89PNG\r\n", ".png"),
    (rb"\xff\xd8\xff", ".jpg"),
    (rb"GIF8", ".gif"),
    (rb"BM", ".bmp"),
    (rb"RIFF....WEBP", ".webp"),
    (rb"RIFF....AVI ", ".avi"),
    (rb"\x1a\x45\xdf\xa3.{,60}webm", ".webm"),
    (rb"\x1a\x45\xdf\xa3", ".mkv"),
    (rb"....ftypqt", ".mov"),
    (rb"....ftyp", ".mp4"),
)


class _RowProblem(Exception):
    """Why one row cannot be used: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class _Place:
    """Where the files that a table names are, and where those that it holds are written."""

    root: Path
    root_key: str  # the config key of `root`, for messages
    real_root: str  # without links, ends with "/"
    real_folder: Callable[[str], str]  # a folder without links; remembers
    media: Path


def read_tables(tables: list[Table], source: Source, media: Path) -> Reading:
    """The items of all tables, in file order; a row that cannot be used is dropped.

    Columns: path (or file_name, file, video, image), caption or captions (or text, prompt; one or
    a list of them), repeats, start and end in seconds (not of images), mask, split. What is null,
    NaN or blank is not said. Videos and images that a table holds as bytes are written to `media`.
    `DataError` for a table without the first two columns or without rows.
    """
    root_key = ".".join([*source.key.split(".")[:-1], "root"])
    readings = []
    for table in tables:
        root = source.root or table.folder
        if not root.is_dir():
            raise DataError(f"{root_key}={root}: there is no such folder; paths start from it")
        real_root = os.path.join(os.path.realpath(root), "")
        real_folder = cache(lambda folder: os.path.realpath(folder))
        place = _Place(root, root_key, real_root, real_folder, media)
        readings.append(_read_table(table, source, place))
    return Reading(
        items=[item for reading in readings for item in reading.items],
        dropped=[lost for reading in readings for lost in reading.dropped],
        notes=[note for reading in readings for note in reading.notes],
    )


def _read_table(table: Table, source: Source, place: _Place) -> Reading:
    where = f"{source.key}={source.path}"
    if table.path != source.path:
        where += f": {table.name}"
    items, dropped = [], []
    columns: dict[str, None] = {}  # a set in the order of the file
    used = set(OTHER_COLUMNS)
    for row in read_rows(table, where, COLUMNS):
        columns |= dict.fromkeys(row.values)
        said = {column: value for column, value in row.values.items() if not _is_null(value)}
        used |= {_column(said, PATH_COLUMNS), _column(said, CAPTION_COLUMNS)}
        try:
            items.append(_item(row, said, table.split, source, place))
        except _RowProblem as problem:
            dropped.append(Dropped(row.place, str(problem)))
    if not items and not dropped:
        raise DataError(f"{where}: holds no rows; write one for each video")
    _check_columns(where, columns)
    idle = [_with_guess(column) for column in columns if column not in used]
    notes = [f"{table.name}: columns not used: {', '.join(idle)}"] if idle else []
    return Reading(items, dropped, notes)


def _check_columns(where: str, columns: Mapping[str, None]) -> None:
    for what, names in (("the file", PATH_COLUMNS), ("its caption", CAPTION_COLUMNS)):
        if columns and columns.keys().isdisjoint(names):
            raise DataError(
                f"{where}: no column for {what} ({', '.join(names)}); it has "
                f"{', '.join(map(_with_guess, columns))}"
            )


def _with_guess(column: str) -> str:
    return shorten(column) + did_you_mean(column.strip().lower(), COLUMNS)


def _is_null(value: object) -> bool:
    """Whether a cell says nothing: null, the NaN that pandas writes for it, or blank."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _column(said: Mapping[str, object], names: tuple[str, ...]) -> str:
    """The column that counts: one that holds a file itself, or the first of `names`."""
    filled = [name for name in names if name in said]
    return min(filled or names, key=lambda name: not isinstance(said.get(name), dict))


def _item(
    row: Row, said: Mapping[str, object], split: Split | None, source: Source, place: _Place
) -> Item:
    if row.problem:
        raise _RowProblem(row.problem)
    path, name = _file(said, _column(said, PATH_COLUMNS), place)
    kind = kind_of(path)
    assert kind is not None, path
    start, end = _number(said, "start"), _number(said, "end")
    if end is not None and end <= (start or 0):
        raise _RowProblem(f"start is {start or 0:g} s and end is {end:g} s; end must be later")
    prefix = "" if source.regularisation else source.prefix
    return Item(
        path=path,
        captions=tuple(prefix + caption for caption in _captions(said)),
        kind=kind,
        name=name,
        visits=source.weight * _repeats(said),
        loss_weight=source.loss_weight,
        start=start if kind == "video" else None,
        end=end if kind == "video" else None,
        mask=_file(said, "mask", place)[0] if "mask" in said else None,
        split=_split(said["split"]) if "split" in said else split,
        regularisation=source.regularisation,
    )


def _number(said: Mapping[str, object], column: str) -> float | None:
    value = said.get(column)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise _RowProblem(f"{column} is {shorten(value)}; expected a number of 0 or more")
    return number


def _repeats(said: Mapping[str, object]) -> int:
    repeats = _number(said, "repeats")
    if repeats is None:
        return 1
    if repeats < 1 or repeats % 1:
        raise _RowProblem(f"repeats is {repeats:g}; expected a whole number of 1 or more")
    return int(repeats)


def _split(value: object) -> Split:
    split = SPLITS.get(str(value).strip().lower())
    if split is None:
        raise _RowProblem(f"split is {shorten(value)}; expected one of {', '.join(SPLITS)}")
    return split


def _captions(said: Mapping[str, object]) -> Iterator[str]:
    column = _column(said, CAPTION_COLUMNS)
    if column not in said:
        raise _RowProblem(f"has no caption; write what is seen into the column {column}")
    found = said[column]
    texts = found if isinstance(found, list) else _listed(found)
    if not texts:
        raise _RowProblem(f"{column} is an empty list; write what is seen")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise _RowProblem(f"{column} holds {shorten(text)!r}; expected a text, or several")
        if HALF_CHARACTERS.search(text):
            raise _RowProblem(f"{column} holds half a character ({shorten(text)}); write it anew")
        yield text.strip()


def _listed(cell: object) -> list[object]:
    """The texts of a cell that holds a JSON list of them, as in CSV; any other cell is one text."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell]  # a caption that begins with a bracket
        return listed if isinstance(listed, list) else [cell]
    return [cell]


def _file(said: Mapping[str, object], column: str, place: _Place) -> tuple[Path, str]:
    """The video or image that a cell names or holds, and what to call it."""
    found = said.get(column)
    if isinstance(found, dict):  # an Image or Video of a Hugging Face dataset
        content, found = found.get("bytes"), found.get("path")
        if isinstance(content, bytes):  # its path is then only what it was once called
            return _write_media(content, found if isinstance(found, str) else "", place.media)
    if found is None:
        raise _RowProblem(f"names no file; write its path into the column {column}")
    if not isinstance(found, str):
        raise _RowProblem(f"{column} is {shorten(found)}; expected the path of a file")
    if kind_of(Path(found)) is None:
        raise _RowProblem(f"{column} is {shorten(found)}, by its suffix neither video nor image")
    name = _find(found, column, place)
    return place.root / name, printable(name)


def _find(text: str, column: str, place: _Place) -> str:
    """The path of a file from the root, with no ".." and no linked folder in it."""
    folder, name = os.path.split(os.path.join(place.root, text))
    try:
        path = os.path.join(place.real_folder(folder), name)
        inside = path.startswith(place.real_root)
        if inside and stat.S_ISLNK(os.lstat(path).st_mode):
            inside = os.path.realpath(path).startswith(place.real_root)
        if inside and not stat.S_ISREG(os.stat(path).st_mode):
            raise _RowProblem(f"{column} {shorten(text)} is not a file; give a video or an image")
    except (OSError, ValueError) as error:  # ValueError: a null byte, half a character
        reason = error.strerror if isinstance(error, OSError) else error
        raise _RowProblem(
            f"{column} {shorten(text)} cannot be read in {place.root} ({reason}); correct it, or "
            f"set {place.root_key} to the folder that paths start from"
        ) from error
    if not inside:
        raise _RowProblem(
            f"{column} {shorten(text)} leaves the folder {place.root}; set {place.root_key} to a "
            "folder that holds it, or move it"
        )
    return path[len(place.real_root) :]


def _write_media(content: bytes, called: str, media: Path) -> tuple[Path, str]:
    """Write a video or image to `media` once, under the hash of its bytes."""
    found = (suffix for magic, suffix in BEGINNINGS if re.match(magic, content[:80], re.DOTALL))
    suffix = next(found, Path(called).suffix.lower())
    digest = hashlib.sha256(content).hexdigest()
    path = media / f"{digest}{suffix}"
    if kind_of(path) is None:
        raise _RowProblem(f"holds {len(content)} bytes that are neither video nor image")
    if not path.exists():
        try:
            media.mkdir(parents=True, exist_ok=True)
            partial = media / f"{digest}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(path)  # whole or not at all, whoever is killed or writes it too
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); make room") from error
    return path, printable(called) or path.name
