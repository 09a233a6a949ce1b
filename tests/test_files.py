"""Facts of files: what is read again and what is not, and an index that nothing can harm."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from data.files import FileFacts, read_files, write_file
from data.items import DataError, MediaInfo
from tests.media_files import make_video

OLD = 1_600_000_000  # a time long enough ago to be trusted


class Counting:
    """A progress that remembers how many files were read."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, indices: Iterable[int], _: str) -> Iterable[int]:
        for index in indices:
            self.read += 1
            yield index


def make_picture(path: Path, colour: str = "red", seconds: int = OLD, side: int = 16) -> str:
    """The digest of a picture that was written at a given time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)
    os.utime(path, (seconds, seconds))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(paths: list[Path], root: Path, workers: int = 0) -> tuple[list[FileFacts], int]:
    """The facts, and how many files were read for them."""
    counting = Counting()
    return read_files(paths, root, workers, counting), counting.read


PICTURE = MediaInfo(1, 0, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_read_once(tmp_path: Path, workers: int) -> None:
    paths = [tmp_path / "set" / f"{i}.png" for i in range(5)]
    digests = [make_picture(path, side=16 + i) for i, path in enumerate(paths)]
    video = make_video(tmp_path / "a.mp4", 9, 8, (32, 48))
    os.utime(video.path, (OLD, OLD))
    facts, count = read([*paths, video.path, paths[0]], tmp_path / "cache", workers)
    assert count == 6
    assert [fact.digest for fact in facts[:5]] == digests
    assert facts[0] == facts[6] == FileFacts(digests[0], PICTURE, None, None)
    assert facts[5].info == MediaInfo(9, 8, 32, 48)
    assert read([*paths, video.path, paths[0]], tmp_path / "cache", workers) == (facts, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files.json"]


def test_changed_files_are_read_again_and_say_what_they_were(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    before, _ = make_picture(a), make_picture(b)
    read([a, b], tmp_path)
    after = make_picture(a, "blue", OLD + 1)
    facts, count = read([a, b], tmp_path)
    assert count == 1
    assert facts[0] == FileFacts(after, PICTURE, None, before)
    assert facts[1].previous is None
    assert read([a, b], tmp_path) == (facts, 0)
    os.utime(a, (OLD + 2, OLD + 2))  # touched: read again, but the same
    assert read([a, b], tmp_path) == (facts, 1)


def test_same_size_and_new_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    make_picture(path, "red")
    size = path.stat().st_size
    read([path], tmp_path)
    digest = make_picture(path, "lime", OLD + 1)
    assert path.stat().st_size == size
    assert read([path], tmp_path)[0][0].digest == digest


def test_fresh_files_are_read_again_next_time(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.new("RGB", (16, 16), "red").save(path)
    status = path.stat()
    first, _ = read([path], tmp_path)
    Image.new("RGB", (16, 16), "lime").save(path)  # within the same tick of the clock
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    facts, count = read([path], tmp_path)
    assert count == 1
    assert facts[0].previous == first[0].digest


def test_broken_files_are_remembered_with_their_problem(tmp_path: Path) -> None:
    for name in ("zero.mp4", "notes.xyz"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (OLD, OLD))
    paths = [tmp_path / "zero.mp4", tmp_path / "notes.xyz", tmp_path / "gone.mp4"]
    facts, count = read(paths, tmp_path)
    assert count == 3
    assert [fact.info for fact in facts] == [None] * 3
    assert [fact.problem for fact in facts] == [
        "is empty (0 bytes); copy it again, or remove it and its caption",
        "is no video or image by its name (.xyz); rename it",
        "cannot be read (No such file or directory); restore it, or remove it and its caption",
    ]
    assert facts[0].digest == hashlib.sha256().hexdigest()
    assert facts[2].digest == ""
    assert read(paths, tmp_path) == (facts, 1)  # only the missing one is looked for again


def test_file_that_comes_back_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    digest = make_picture(path)
    read([path], tmp_path / "cache")
    path.rename(tmp_path / "b.png")
    assert read([path], tmp_path / "cache")[0][0].digest == ""
    (tmp_path / "b.png").rename(path)
    assert read([path], tmp_path / "cache")[0][0] == FileFacts(digest, PICTURE, None, None)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe\0",
        b"[]",
        b"5",
        b"{}",
        b'{"probe": 1}',
        b'{"probe": 1, "files": []}',
        b'{"probe": 1, "files": {"a": 3}}',
        b'{"probe": 1, "files": {"a": [[1], "", null, null, null]}}',
        b'{"probe": 1, "files": {"a": [[1, 2], "", [1, 2], null, null]}}',
        b'{"probe": 1, "files": {"a": [[1, 2], "", ["x", 2, 3, 4], null, null]}}',
    ],
)
def test_damaged_index_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.png"
    make_picture(path)
    facts, _ = read([path], tmp_path)
    (tmp_path / "files.json").write_bytes(damage)
    assert read([path], tmp_path) == (facts, 1)
    assert read([path], tmp_path) == (facts, 0)


def test_index_of_another_probe_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make_picture(path)
    facts, _ = read([path], tmp_path)
    index = json.loads((tmp_path / "files.json").read_bytes())
    (tmp_path / "files.json").write_text(json.dumps({**index, "probe": index["probe"] + 1}))
    assert read([path], tmp_path) == (facts, 1)


def test_index_keeps_what_others_wrote(tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png")
    make_picture(tmp_path / "b.png")
    facts_a, _ = read([tmp_path / "a.png"], tmp_path)
    facts_b, _ = read([tmp_path / "b.png"], tmp_path)
    assert read([tmp_path / "a.png", tmp_path / "b.png"], tmp_path) == (facts_a + facts_b, 0)


PROGRAM = """
import sys
from pathlib import Path
from data.files import read_files
root, first = Path(sys.argv[1]), int(sys.argv[2])
paths = [root / f"{i}.png" for i in range(first, first + 60)]
facts = read_files(paths, root / "cache", 0, lambda indices, what: indices)
assert all(fact.info for fact in facts)
"""


def test_processes_that_write_at_once_do_no_harm(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(100)]
    digests = [make_picture(path, side=16 + i) for i, path in enumerate(paths)]
    root = Path(__file__).parents[1]
    commands = [
        [sys.executable, "-c", PROGRAM, str(tmp_path), first] for first in ("0", "20", "40")
    ]
    running = [subprocess.Popen(command, cwd=root) for command in commands]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    facts, count = read(paths, tmp_path / "cache")
    assert [fact.digest for fact in facts] == digests
    assert count <= 40  # at least the last one's are known
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files.json"]


def test_folder_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png")
    make_picture(tmp_path / "b.png")
    (tmp_path / "cache").touch()  # a file where the folder should be: not even root can write
    counting = Counting()
    with pytest.raises(DataError, match=r"cannot write .*files\.json .*set another cache folder"):
        read_files([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "cache", 0, counting)
    assert counting.read == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_read_only_folder_serves_what_it_knows(tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png")
    make_picture(tmp_path / "b.png")
    facts, _ = read([tmp_path / "a.png"], tmp_path / "cache")
    (tmp_path / "cache").chmod(0o500)
    assert read([tmp_path / "a.png"], tmp_path / "cache") == (facts, 0)
    with pytest.raises(DataError, match=r"cannot write .*Permission denied"):
        read([tmp_path / "b.png"], tmp_path / "cache")
    (tmp_path / "cache").chmod(0o700)


def test_written_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "a", b"one")
    write_file(tmp_path / "new" / "a", b"two")
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    (tmp_path / "new" / "folder").mkdir()
    (tmp_path / "new" / "folder" / "inside").touch()
    with pytest.raises(DataError, match=r"cannot write .*folder \(Is a directory\)"):
        write_file(tmp_path / "new" / "folder", b"three")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a", "folder"]
