"""Lists of files on disk become rows: JSONL, CSV, Parquet and saved Hugging Face datasets.

All are read through `datasets`, as streams of Arrow tables: streams, for else the library keeps a
copy of every list in ~/.cache, and Arrow, for so it decodes no media. JSONL and CSV go through its
loader of text lines: its own JSON and CSV loaders guess types (a caption "2024-01-01" becomes a
time stamp, "NA" becomes null) and name no line in an error.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow

from data.items import DataError, Source, Split, printable

LISTS = (".jsonl", ".csv", ".parquet")
SPLITS: dict[str, Split] = {
    "train": "train",
    "heldout": "heldout",
    "val": "heldout",
    "validation": "heldout",
    "test": "heldout",
}
# What `datasets` and pyarrow raise for damaged files: they check little of what they read.
OF_THE_LIBRARY = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
ROWS_AT_ONCE = 32  # a row may hold a whole video
SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Table:
    """One list of files: a file, or a folder that `save_to_disk` of `datasets` wrote.

    Its paths are relative to `folder`, unless the source has a root. `split` is what the name of
    the file or of its folder says for all rows.
    """

    path: Path
    name: str  # for messages
    folder: Path
    split: Split | None


@dataclass(frozen=True)
class Row:
    """What a row says by column; or, if it cannot be told, the `problem`."""

    place: str  # "captions.jsonl line 17"
    values: Mapping[str, object]
    problem: str | None = None


def find_tables(source: Source) -> list[Table]:
    """The lists that a source is made of, sorted; none for a folder with sidecar captions.

    A folder may be a dataset of `save_to_disk`, hold metadata.jsonl (.csv, .parquet) for its files
    or for those of its folders train, test, ..., or hold Parquet shards and no captions in .txt.
    """
    path = source.path
    if path.is_file():
        if path.suffix.lower() in LISTS:
            return [Table(path, printable(path.name), path.parent, None)]
        raise DataError(
            f"{source.key}={path}: this is a file, and none of {' '.join(LISTS)}; give such a "
            "list, or the folder that holds your videos"
        )
    if (path / "dataset_dict.json").is_file():
        return _tables([state.parent for state in path.glob("*/state.json")], path)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [Table(path, printable(path.name), path, None)]
    folders = [path, *(path / split for split in SPLITS)]
    files = [folder / f"metadata{suffix}" for folder in folders for suffix in LISTS]
    files = [file for file in files if file.is_file()]
    if not files and not any(path.rglob("*.txt")):
        shards = [file.relative_to(path) for file in path.rglob("*.parquet")]
        files = [path / shard for shard in shards if "/." not in f"/{shard.as_posix()}"]
    return _tables(files, path)


def _tables(files: list[Path], root: Path) -> list[Table]:
    """Tables in files and folders below `root`, with the split that each is named for."""
    files = sorted(files)
    names = [file.relative_to(root).as_posix() for file in files]
    words = [re.split(r"[\W\d_]+", name) for name in names]
    splits: list[Split | None] = [
        next((SPLITS[word] for word in found if word in SPLITS), None) for found in words
    ]
    if len(set(splits)) < 2:  # a dataset of one split is called "train", whatever it is for
        splits = [None] * len(splits)
    return [
        Table(file, printable(name), file.parent, split)
        for file, name, split in zip(files, names, splits, strict=True)
    ]


def read_rows(table: Table, where: str, columns: Collection[str]) -> Iterator[Row]:
    """The rows of a table in order. Of Arrow tables, other columns than `columns` are not read.

    `where` begins every error: `DataError` if the file is damaged, not UTF-8, or no such list.
    """
    suffix = table.path.suffix.lower()
    if suffix == ".jsonl":
        return _json_rows(table, where)
    if suffix == ".csv":
        return _csv_rows(table, where)
    return _arrow_rows(table, where, columns)


def _json_rows(table: Table, where: str) -> Iterator[Row]:
    expected = '{"path": "a.mp4", "caption": "..."}'
    for number, line in enumerate(_lines(table, where), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = getattr(error, "msg", error)
            raise DataError(
                f"{where} line {number} is not JSON ({found}); write one object on each line: "
                f"{expected}"
            ) from error
        place = f"{table.name} line {number}"
        if isinstance(values, dict):
            yield Row(place, values)
        else:
            yield Row(place, {}, f"is {shorten(values)}; expected an object: {expected}")


def _csv_rows(table: Table, where: str) -> Iterator[Row]:
    reader = csv.reader(_lines(table, where), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise DataError(f"{where}: two columns have the same name in line 1; rename one")
        number = reader.line_num + 1  # of the first line of a row: a text may hold line breaks
        for cells in reader:
            place = f"{table.name} line {number}"
            number = reader.line_num + 1
            if len(cells) == len(header):
                yield Row(place, dict(zip(header, cells, strict=True)))
            elif cells:
                problem = (
                    f"has {len(cells)} fields and the header has {len(header)}; put quotes around "
                    "a text that holds commas"
                )
                yield Row(place, {}, problem)
    except csv.Error as error:
        raise DataError(
            f"{where} line {reader.line_num} is not CSV ({error}); is a quote not closed?"
        ) from error


def _arrow_rows(table: Table, where: str, columns: Collection[str]) -> Iterator[Row]:
    number = 0
    for part in _parts(table.path, where):
        known = part.select([name for name in part.column_names if name in columns])
        all_columns = dict.fromkeys(part.column_names)
        for values in known.to_pylist():
            number += 1
            yield Row(f"{table.name} row {number}", all_columns | values)


def _lines(table: Table, where: str) -> Iterator[str]:
    for part in _parts(table.path, where):
        yield from part["text"].to_pylist()


def _parts(path: Path, where: str) -> Iterator[pyarrow.Table]:
    """A file, or a folder of `save_to_disk`, in tables of a few rows; a text has one of its lines.

    Not by `load_dataset`: that tells a server of the library's makers that it was called.
    """
    # Imported here because it takes a second, and a folder of captions needs none of it.
    from datasets import Dataset, load_from_disk, logging

    logging.set_verbosity(logging.CRITICAL)  # our own error says it once, and in words
    try:
        with TemporaryDirectory() as locks:  # all that it writes of a stream
            file = glob.escape(os.path.abspath(path))
            if path.is_dir():
                rows = load_from_disk(path)
            elif path.suffix.lower() == ".parquet":
                rows = Dataset.from_parquet(file, cache_dir=locks, streaming=True)
            else:
                rows = Dataset.from_text(
                    file,
                    cache_dir=locks,
                    streaming=True,
                    encoding="utf-8-sig",  # Windows editors write a BOM
                    keep_linebreaks=True,  # for CSV, where a text may go over several lines
                )
            assert not isinstance(rows, dict), path  # as a DatasetDict would be
            yield from rows.with_format("arrow").iter(ROWS_AT_ONCE)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8; save it as UTF-8") from error
    except (*OF_THE_LIBRARY, pyarrow.ArrowException) as error:
        reason = printable(str(error).partition("\n")[0])
        raise DataError(f"{where}: cannot be read ({reason}); make or copy it anew") from error


def shorten(value: object) -> str:
    """A value for a message: printable, and cut if it is long."""
    text = printable(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
