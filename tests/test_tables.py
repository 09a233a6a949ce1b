"""Every list on disk becomes rows, whatever its encoding, and a broken one is one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from manifest_files import error_of, read, touch, write_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.jsonl", b"", ": holds no rows"),
        ("l.jsonl", b"\n \r\n", ": holds no rows"),
        ("l.csv", b"", ": holds no rows"),
        ("l.csv", b"path,caption\n", ": holds no rows"),
        ("l.csv", b"path,path\na,b\n", ": two columns have the same name"),
        ("l.csv", b'path,caption\na.mp4,"a\n', " line 2 is not CSV (unexpected end of data)"),
        ("l.csv", b'path,caption\na.mp4,"' + b"a" * 200_000, " line 2 is not CSV (field"),
        ("l.jsonl", b'{"path": "a"}\n' * 16 + b'{"path"\n', " line 17 is not JSON"),
        ("l.jsonl", b"{}\n" + b"[" * 100_000, " line 2 is not JSON"),
        ("l.jsonl", '{"path": "é"}'.encode("latin-1"), ": is not UTF-8; save it as UTF-8"),
        ("l.csv", "path,caption\n".encode("utf-16"), ": is not UTF-8; save it as UTF-8"),
        ("l.parquet", b"", ": cannot be read ("),
        ("l.parquet", b"PAR1 or not", ": cannot be read ("),
        ("l.json", b"[]", ": this is a file, and none of .jsonl .csv .parquet"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = error_of(tmp_path / name)
    assert error.startswith(f"data.path={tmp_path / name}{message}")
    assert len(error) < 500


def test_encoding_marks_line_ends_and_missing_quotes(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    row = {"path": "a.mp4", "caption": "a\u2028b\x85c"}
    text = f"\ufeff{json.dumps(row, ensure_ascii=False)}\r\n\r\n[]\r\n"
    (tmp_path / "l.jsonl").write_text(text, encoding="utf-8", newline="")
    reading = read(tmp_path / "l.jsonl")
    assert reading.items[0].captions == ("a\u2028b\x85c",)
    assert reading.dropped[0].name == "l.jsonl line 3"
    text = '\ufeffpath, caption\r\na.mp4,"a\r\nb"\r\n\r\na.mp4,a dog, running\r\na.mp4\r\n'
    (tmp_path / "l.csv").write_text(text, encoding="utf-8", newline="")
    reading = read(tmp_path / "l.csv")
    assert reading.items[0].captions == ("a\nb",)
    assert [(lost.name, lost.reason.partition(";")[0]) for lost in reading.dropped] == [
        ("l.csv line 5", "has 3 fields and the header has 2"),
        ("l.csv line 6", "has 1 fields and the header has 2"),
    ]


def test_any_folder_name_will_do(tmp_path: Path) -> None:
    for folder in ("[a-z] *?", ".hidden", "ü🎈 %41#", "{x,y}"):
        touch(tmp_path / folder, "a.mp4")
        row = {"path": "a.mp4", "caption": folder}
        (item,) = read(write_rows(tmp_path / folder / "l[1].jsonl", [row])).items
        assert item.captions == (folder,)


def test_thousands_of_rows_and_a_huge_line_keep_their_order(tmp_path: Path) -> None:
    names = [f"{i % 7}/{i}.mp4" for i in range(0, 3000, 3)]
    touch(tmp_path, *names)
    rows = [{"path": f"{i % 7}/{i}.mp4", "caption": f"clip {i}"} for i in range(3000)]
    rows[30]["caption"] = "x" * 12_000_000  # longer than what is read at once
    reading = read(write_rows(tmp_path / "l.jsonl", rows))
    assert [item.name for item in reading.items] == names
    assert [len(item.captions[0]) > 99 for item in reading.items].index(True) == 10
    assert [lost.name for lost in reading.dropped] == [
        f"l.jsonl line {i + 1}" for i in range(3000) if i % 3
    ]


def test_a_folder_with_metadata_is_read_by_it(tmp_path: Path) -> None:
    touch(tmp_path, "one/sub/a.mp4", "two/train/a.mp4", "two/test/a.mp4")
    write_rows(tmp_path / "one/metadata.csv", [{"file_name": "sub/a.mp4", "text": "listed"}])
    (tmp_path / "one/sub/a.txt").write_text("beside")
    reading = read(tmp_path / "one")
    assert [(item.name, item.captions) for item in reading.items] == [("sub/a.mp4", ("listed",))]
    assert reading.notes == ["metadata.csv: used in place of the captions in .txt files beside it"]
    for split in ("train", "test"):
        write_rows(tmp_path / f"two/{split}/metadata.jsonl", [{"file_name": "a.mp4", "text": "a"}])
    reading = read(tmp_path / "two")
    assert [(item.path.parent.name, item.split) for item in reading.items] == [
        ("test", "heldout"),
        ("train", "train"),
    ]


def test_saved_datasets_and_shards_say_their_split(tmp_path: Path) -> None:
    rows = [{"path": str(touch(tmp_path, "a.mp4") / "a.mp4"), "prompt": "a"}]
    part = Dataset.from_list(rows)
    part.save_to_disk(tmp_path / "single")
    DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "dict")
    DatasetDict(train=part).save_to_disk(tmp_path / "train_alone")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_rows(tmp_path / "shards/data" / f"{name}.parquet", rows)
    write_rows(tmp_path / "shards/.cache/old.parquet", rows)
    splits = {
        folder: [item.split for item in read(tmp_path / folder, root=tmp_path).items]
        for folder in ("single", "dict", "train_alone", "shards")
    }
    assert splits == {
        "single": [None],
        "dict": ["train", "heldout"],
        "train_alone": [None],
        "shards": ["heldout", "train", "train"],
    }
    next((tmp_path / "single").glob("*.arrow")).write_bytes(b"cut")
    assert "single: cannot be read (" in error_of(tmp_path / "single", root=tmp_path)


def test_reading_uses_no_network_and_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    touch(tmp_path / "set", "a.mp4")
    rows = [{"path": "a.mp4", "caption": "first"}]
    for suffix in (".jsonl", ".csv", ".parquet"):
        write_rows(tmp_path / f"set/l{suffix}", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "set/saved")
    program = (
        "import sys\n"
        "calls = []\n"  # an exception in their place could be caught
        "sys.addaudithook(lambda *call: call[0].startswith('socket.') and calls.append(call))\n"
        "from pathlib import Path\n"
        "from data.sources import Source, read_source\n"
        "for name in ('l.jsonl', 'l.csv', 'l.parquet', 'saved'):\n"
        "    source = Source(Path(name), 'data.path', root=Path.cwd())\n"
        "    assert [item.name for item in read_source(source).items] == ['a.mp4'], name\n"
        "    assert not calls, calls\n"
    )
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))
    }
    environment |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "set",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_changed_list_is_read_anew(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    for caption in ("first", "second"):
        manifest = write_rows(tmp_path / "l.jsonl", [{"path": "a.mp4", "caption": caption}])
        os.utime(manifest, (0, 0))  # the same time and, but for one letter, size
        assert read(manifest).items[0].captions == (caption,)
