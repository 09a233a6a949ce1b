"""Rows become items, and a row that cannot be used is dropped for a clear reason."""

import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, Value, Video
from manifest_files import error_of, read, touch, write_rows

from data.items import DataError, Source
from data.sources import read_source
from data.tables import shorten

PNG = b"\x89PNG\r\n\x1a\n-"
MP4 = b"\0\0\0\x20ftypisom-"


def reason_of(root: Path, row: object) -> str:
    """Why a row of JSONL is dropped, beside one that is used."""
    touch(root, "ok.mp4")
    lines = [{"path": "ok.mp4", "caption": "a"}, row]
    (root / "list.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    reading = read(root / "list.jsonl")
    assert [item.name for item in reading.items] == ["ok.mp4"]
    (dropped,) = reading.dropped
    assert dropped.name == "list.jsonl line 2"
    return dropped.reason


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_says_the_same(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "clips/b é.mp4", "clips/a.png", "clips/m.mask.png")
    full = {
        "path": "clips/b é.mp4", "caption": 'a "red" ball,\nrolling 🎈', "repeats": 3,
        "start": 0.5, "end": 2.25, "mask": "clips/m.mask.png", "split": "validation",
    }  # fmt: skip
    bare = {"path": "clips/a.png", "caption": "2024-01-01"} | dict.fromkeys(list(full)[2:])
    manifest = write_rows(tmp_path / f"list{suffix}", [full, bare, bare | {"caption": "NA"}])
    source = Source(manifest, "data.path", weight=0.5, loss_weight=2.0, prefix="ohwx, ")
    reading = read_source(source)
    assert (reading.dropped, reading.notes) == ([], [])
    video, image, other = reading.items
    assert (video.path, video.kind, video.name) == (
        tmp_path / "clips/b é.mp4",
        "video",
        "clips/b é.mp4",
    )
    assert video.captions == ('ohwx, a "red" ball,\nrolling 🎈',)
    assert (video.visits, video.loss_weight, video.split) == (1.5, 2.0, "heldout")
    assert (video.start, video.end) == (0.5, 2.25)
    assert video.mask == tmp_path / "clips/m.mask.png"
    assert image.captions == ("ohwx, 2024-01-01",)
    assert other.captions == ("ohwx, NA",)
    assert (image.kind, image.visits, image.split, image.mask) == ("image", 0.5, None, None)
    assert (image.start, image.end) == (None, None)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_several_captions_are_a_list_in_any_format(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.mp4")
    captions: object = ["one, two", "three"]
    captions = json.dumps(captions) if suffix == ".csv" else captions
    (item,) = read(
        write_rows(tmp_path / f"l{suffix}", [{"video": "a.mp4", "captions": captions}])
    ).items
    assert item.captions == ("one, two", "three")


def test_a_caption_may_begin_with_a_bracket(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    rows = [{"file": "a.mp4", "text": text} for text in ("[ohwx] a dog", "[" * 9999)]
    items = read(write_rows(tmp_path / "l.csv", rows)).items
    assert [item.captions for item in items] == [("[ohwx] a dog",), ("[" * 9999,)]


def test_the_same_file_in_two_rows_is_two_items(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.mp4", "other/a.mp4")
    paths = ["sub/a.mp4", "./sub/../sub/a.mp4", str(tmp_path / "sub/a.mp4"), "other/a.mp4"]
    rows = [{"path": path, "caption": "a"} for path in paths]
    items = read(write_rows(tmp_path / "l.jsonl", rows)).items
    assert [item.name for item in items] == ["sub/a.mp4"] * 3 + ["other/a.mp4"]
    assert {item.path for item in items[:3]} == {tmp_path / "sub/a.mp4"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a.mp4", "a"], "is ['a.mp4', 'a']; expected an object"),
        ({"caption": "a"}, "names no file; write its path into the column path"),
        ({"path": 3, "caption": "a"}, "path is 3; expected the path of a file"),
        ({"path": "no.mp4", "caption": "a"}, "no.mp4 cannot be read in"),
        ({"path": "a.tar", "caption": "a"}, "a.tar, by its suffix neither video nor image"),
        ({"path": "d.mp4", "caption": "a"}, "d.mp4 is not a file"),
        ({"path": "\0.mp4", "caption": "a"}, "(embedded null byte)"),
        ({"path": "n" * 9999 + ".mp4", "caption": "a"}, "(File name too long)"),
        ({"path": "🎈" * 999 + "/a.mp4", "caption": "a"}, "(File name too long)"),
        ({"path": "\ud83d.mp4", "caption": "a"}, "path \\ud83d.mp4 cannot be read"),
        ({"path": "ok.mp4"}, "has no caption; write what is seen into the column caption"),
        ({"path": "ok.mp4", "caption": " \n"}, "has no caption"),
        ({"path": "ok.mp4", "caption": 3}, "caption holds '3'; expected a text"),
        ({"path": "ok.mp4", "caption": ["a", " "]}, "caption holds ' '; expected a text"),
        ({"path": "ok.mp4", "caption": []}, "caption is an empty list"),
        ({"path": "ok.mp4", "caption": "a \ud83d"}, "half a character (a \\ud83d)"),
        ({"path": "ok.mp4", "caption": "a", "repeats": 0}, "repeats is 0; expected a whole"),
        ({"path": "ok.mp4", "caption": "a", "repeats": 1.5}, "repeats is 1.5; expected a whole"),
        ({"path": "ok.mp4", "caption": "a", "repeats": "many"}, "repeats is many; expected a nu"),
        ({"path": "ok.mp4", "caption": "a", "repeats": True}, "repeats is True; expected a num"),
        ({"path": "ok.mp4", "caption": "a", "start": -1}, "start is -1; expected a number of 0"),
        ({"path": "ok.mp4", "caption": "a", "start": math.inf}, "start is inf; expected"),
        ({"path": "ok.mp4", "caption": "a", "end": 10**400}, "expected a number of 0 or more"),
        ({"path": "ok.mp4", "caption": "a", "start": 2, "end": 2}, "start is 2 s and end is 2 s"),
        ({"path": "ok.mp4", "caption": "a", "end": 0}, "start is 0 s and end is 0 s"),
        ({"path": "ok.mp4", "caption": "a", "mask": "no.png"}, "mask no.png cannot be read"),
        ({"path": "ok.mp4", "caption": "a", "mask": "../no.png"}, "mask ../no.png leaves the"),
        ({"path": "ok.mp4", "caption": "a", "split": "dev"}, "split is dev; expected one of"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_by_its_line(
    tmp_path: Path, row: object, reason: str
) -> None:
    (tmp_path / "d.mp4").mkdir()
    found = reason_of(tmp_path, row)
    assert reason in found
    assert found.encode()
    assert len(found) < 600


@pytest.mark.parametrize(
    "values",
    [{"start": math.nan, "repeats": None, "mask": "", "split": " "}, {"repeats": "2", "end": "3"}],
)
def test_what_is_null_is_not_said_and_numbers_may_be_text(
    tmp_path: Path, values: dict[str, object]
) -> None:
    touch(tmp_path, "a.mp4")
    row = {"path": "a.mp4", "caption": "a", **values}
    (item,) = read(write_rows(tmp_path / "l.jsonl", [row])).items
    said = (item.visits, item.start, item.end, item.mask, item.split)
    assert said == ((2, None, 3, None, None) if "end" in values else (1, None, None, None, None))


def test_paths_may_not_leave_the_root(tmp_path: Path) -> None:
    touch(tmp_path, "secret.mp4", "set/in.mp4", "set/sub/c.mp4", "set2/d.mp4")
    (tmp_path / "set/out.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "set/away").symlink_to(tmp_path)
    (tmp_path / "set/fine.mp4").symlink_to("sub/c.mp4")
    paths = [
        "../secret.mp4", "sub/../../secret.mp4", str(tmp_path / "secret.mp4"), "out.mp4",
        "away/secret.mp4", "../set2/d.mp4", "../none.mp4", "fine.mp4", "away/set/in.mp4",
    ]  # fmt: skip
    rows = [{"path": path, "caption": "a"} for path in paths]
    manifest = write_rows(tmp_path / "set/l.jsonl", rows)
    reading = read(manifest)
    assert [item.name for item in reading.items] == ["fine.mp4", "in.mp4"]
    assert len(reading.dropped) == 7
    for path, dropped in zip(paths[:7], reading.dropped, strict=True):
        where = f"leaves the folder {tmp_path / 'set'}; set data.root"
        assert f"path {shorten(path)} {where}" in dropped.reason
    rows = [{"path": path, "caption": "a"} for path in ("set2/d.mp4", "set/out.mp4")]
    wider = read(write_rows(manifest, rows), root=tmp_path)
    assert [item.path for item in wider.items] == [
        tmp_path / "set2/d.mp4",
        tmp_path / "set/out.mp4",
    ]


def test_the_key_of_the_root_stands_beside_the_key_of_the_path(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "l.jsonl", [{"path": "a.mp4", "caption": "a"}])
    with pytest.raises(DataError, match=r"set data\.sources\.1\.root to the folder"):
        read_source(Source(manifest, "data.sources.1.path"))
    assert f"data.root={tmp_path / 'no'}: there is no" in error_of(manifest, root=tmp_path / "no")


def test_columns_of_other_names_are_noted_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    row = {"path": "a.mp4", "caption": "a", "text": "b", "fps": 16, "Repeat": 2, "score": 1}
    manifest = write_rows(tmp_path / "l.jsonl", [row, row])
    assert read(manifest).notes == [
        "l.jsonl: columns not used: text, fps, Repeat (did you mean repeats?), score"
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_list_without_its_columns_is_an_error(tmp_path: Path, suffix: str) -> None:
    manifest = write_rows(tmp_path / f"l{suffix}", [{"filename": "a.mp4", "caption": "a"}])
    error = error_of(manifest)
    assert error.startswith(f"data.path={manifest}: no column for the file (path, ")
    assert error.endswith("it has filename (did you mean file_name?), caption")
    touch(tmp_path, "a.mp4")
    manifest = write_rows(tmp_path / f"l{suffix}", [{"path": "a.mp4", "words": "a"}])
    assert "no column for its caption (caption, captions, text, prompt)" in error_of(manifest)


def media_dataset(root: Path) -> Dataset:
    """Of each row, a video: bytes with a name, a path, bytes that are no video, nothing."""
    videos = [
        {"bytes": MP4, "path": "x.mov"},
        {"bytes": None, "path": str(root / "there.mp4")},
        {"bytes": b"text", "path": None},
        None,
        {"bytes": MP4, "path": None},
    ]
    masks = [{"bytes": PNG, "path": "mask"}, None, None, None, None]
    features = Features({"video": Video(), "mask": Image(), "text": Value("string")})
    captions = list("abcde")
    return Dataset.from_dict({"video": videos, "mask": masks, "text": captions}, features=features)


def test_media_inside_a_dataset_is_written_once_by_its_content(tmp_path: Path) -> None:
    root = touch(tmp_path / "set", "there.mp4")
    pyarrow.parquet.write_table(media_dataset(root).data.table, root / "l.parquet")
    media = root / "media"
    for _ in range(2):
        reading = read(root / "l.parquet")
        assert [item.name for item in reading.items][:2] == ["x.mov", "there.mp4"]
        first, second, third = reading.items
        assert first.path == third.path
        assert (first.path.parent, first.path.suffix) == (media, ".mp4")
        assert first.path.read_bytes() == MP4
        assert first.mask is not None
        assert (first.mask.suffix, first.mask.read_bytes()) == (".png", PNG)
        assert second.path == root / "there.mp4"
        assert [lost.name for lost in reading.dropped] == ["l.parquet row 3", "l.parquet row 4"]
        assert "4 bytes that are neither" in reading.dropped[0].reason
        assert {path.name for path in media.iterdir()} == {first.path.name, first.mask.name}
    for path in media.iterdir():
        path.unlink()
    media.rmdir()
    media.write_bytes(b"in the way")
    assert "cannot be written" in error_of(root / "l.parquet")
