"""Small lists of files for tests, in every format, and how a test reads them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars

from data.items import DataError, Reading, Source
from data.sources import read_source

disable_progress_bars()


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"-")
    return root


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    """The same rows as .jsonl, .csv or .parquet, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".csv":
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(list(rows)).to_parquet(path)
    return path


def read(path: Path, root: Path | None = None) -> Reading:
    return read_source(Source(path, "data.path", root=root), media=path.parent / "media")


def error_of(path: Path, root: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, root)
    return str(caught.value)
