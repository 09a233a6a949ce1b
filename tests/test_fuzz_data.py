"""Hostile captions and lists of files: items, or a `DataError`, and nothing written but media."""

import json
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet as parquet_file
from fuzzing import answer_or, cases, damaged, files_below
from hypothesis import given
from hypothesis import strategies as st
from manifest_files import touch, write_rows

from data.items import DataError, Reading, Source
from data.sources import read_name_list, read_source, split_heldout

PNG = b"\x89PNG\r\n\x1a\n rest"
PATHS = (
    *("a.mp4", "b.png", "sub/c.mp4", "missing.mp4", "../outside.mp4", "/etc/passwd", "/etc/x.png"),
    *(
        "sub/../a.mp4",
        "sub/../../outside.mp4",
        "link.mp4",
        "folder.mp4",
        "a.txt",
        "",
        ".",
        "..",
        "/",
    ),
    *(
        "\x00.mp4",
        "\ud800.mp4",
        "é.mp4",
        "a" * 5000 + ".mp4",
        "~/a.mp4",
        "file:///a.mp4",
        "C:\\a.mp4",
    ),
)
CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from([*PATHS, "1", "-1", "nan", "1e999", "9" * 400, "[", '["a", "b"]', "[" * 3000]),
    st.sampled_from(["train", "test", "heldout", "\x1b[2J", "\u202e", "\ud83d", "a caption"]),
    st.lists(st.text(max_size=5) | st.none() | st.integers(), max_size=3),
)
COLUMNS = ("path", "file_name", "video", "caption", "text", "repeats", "start", "end", "mask")
ROWS = st.lists(
    st.fixed_dictionaries(
        {"path": st.one_of(st.sampled_from(PATHS), CELLS)},
        optional=dict.fromkeys([*COLUMNS[1:], "split", "capton", ""], CELLS),
    ),
    max_size=4,
)


def dataset(folder: Path) -> Path:
    """A folder of two videos and an image, one outside of it, and a link to that."""
    data = touch(folder / "data", "a.mp4", "b.png", "sub/c.mp4")
    touch(folder, "outside.mp4")
    (data / "folder.mp4").mkdir()
    (data / "link.mp4").symlink_to(folder / "outside.mp4")
    return data


def read_all(path: Path, media: Path) -> Reading:
    """The items of a source, split, and named in a list."""
    reading = read_source(Source(path, "data.path"), media=media)
    groups = [str(item.path) for item in reading.items]
    train, heldout = split_heldout(reading.items, 0.5, groups)
    assert len(train) + len(heldout) == len(reading.items)
    for item in reading.items:
        assert item.captions
        assert item.name.encode()
        assert 0 <= item.visits < float("inf")
    return reading


def check(name: str, content: bytes) -> None:
    """Whatever a file holds: items inside of the dataset, and nothing changes but the media."""
    with TemporaryDirectory() as place:
        folder = Path(place).resolve()
        data = dataset(folder)
        (data / name).write_bytes(content)
        before = files_below(folder)
        path = data if name.endswith(".txt") else data / name
        reading = answer_or(DataError, lambda: read_all(path, folder / "media"))
        media = files_below(folder / "media")
        assert files_below(folder) == before | media
        for item in [] if reading is None else reading.items:
            assert data in item.path.resolve().parents or item.path in media
        for file in media:
            assert file.parent == folder / "media"


@cases()
@given(st.one_of(st.binary(max_size=200), damaged("\ufeffa fox, é\r\n".encode(), b"one\ntwo")))
def test_captions(content: bytes) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        touch(folder, "a.mp4", "b.mp4")
        (folder / "a.txt").write_bytes(content)
        (folder / "b.txt").write_bytes(b"fine")
        before = files_below(folder)
        reading = answer_or(DataError, lambda: read_all(folder, folder / "media"))
        assert files_below(folder) == before
        assert reading is not None
        assert len(reading.items) + len(reading.dropped) == 2
        answer_or(DataError, lambda: read_name_list(folder / "a.txt", "key", reading.items))


@cases(0.3)
@given(ROWS)
def test_hostile_rows_of_json(rows: list[dict[str, object]]) -> None:
    check("list.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


@cases(0.3)
@given(damaged(b'{"path": "a.mp4", "caption": "a"}\n{"file": "b.png", "text": ["x"]}\n'))
def test_damaged_json(content: bytes) -> None:
    check("list.jsonl", content)


@cases(0.2)
@given(damaged(b'path,caption,repeats\na.mp4,"a, b",2\nb.png,"two\nlines",\n'))
def test_damaged_csv(content: bytes) -> None:
    check("list.csv", content)


@cache
def parquet() -> bytes:
    """A list with a picture inside whose name would leave every folder."""
    with TemporaryDirectory() as folder:
        inside = {"bytes": PNG, "path": "../../../evil.png"}
        rows = [
            {"path": "a.mp4", "image": None, "caption": "a", "start": 0.5},
            {"path": None, "image": inside, "caption": "b", "start": None},
        ]
        return write_rows(Path(folder, "a.parquet"), rows).read_bytes()


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    """Damaged anywhere, or in the footer alone, its length being right."""
    content = parquet()
    if draw(st.booleans()):
        return draw(damaged(content))
    length = struct.unpack("<I", content[-8:-4])[0]
    footer = draw(damaged(content[-8 - length : -8]))
    return content[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


@cases(0.2)
@given(parquet_files())
def test_damaged_parquet(content: bytes) -> None:
    check("list.parquet", content)


def test_a_schema_that_is_no_schema_is_told(tmp_path: Path) -> None:
    """Parquet's metadata hold what types the columns have for `datasets`, as JSON of any kind."""
    features = {"info": {"features": {"path": {"_type": "Value", "dtype": "string"}, "a": "text"}}}
    table = pyarrow.table({"path": ["a.mp4"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet_file.write_table(table, tmp_path / "a.parquet")
    assert answer_or(DataError, lambda: read_all(tmp_path / "a.parquet", tmp_path / "m")) is None


def test_the_undamaged_list_is_read(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    (data / "list.parquet").write_bytes(parquet())
    reading = read_all(data / "list.parquet", tmp_path / "media")
    assert [item.captions[0] for item in reading.items] == ["a", "b"]
    assert reading.items[1].path.parent == tmp_path / "media"
