"""Folders become items, and every way a folder can be wrong is one clear error."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from data.sources import DataError, Item, read_folder, split_heldout


def write_files(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def error_of(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_folder(root, "data.path")
    return str(caught.value)


def test_items_are_sorted_by_name_with_their_captions(tmp_path: Path) -> None:
    files = {
        "b.MP4": "-", "b.txt": "a red ball\n", "a.v2.png": "-", "a.v2.txt": "\ufeffa dog",
        "sub/b.mov": "-", "sub/b.txt": "another", "🎈 ñ/日本.webp": "-", "🎈 ñ/日本.txt": "a 🎈",
    }  # fmt: skip
    items = read_folder(write_files(tmp_path, files), "data.path")
    assert [(item.name, item.kind, item.caption) for item in items] == [
        ("a.v2.png", "image", "a dog"),
        ("b.MP4", "video", "a red ball"),
        ("sub/b.mov", "video", "another"),
        ("🎈 ñ/日本.webp", "image", "a 🎈"),
    ]
    assert all(item.path == tmp_path / item.name for item in items)


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    files = {
        "a.png": "-", "a.txt": "a", ".b.png": "-", ".DS_Store": "-", "readme.md": "-",
        ".git/c.png": "-",
    }  # fmt: skip
    assert [item.name for item in read_folder(write_files(tmp_path, files), "data.path")] == [
        "a.png"
    ]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"a.png": "-", "a.txt": "a"})
    root = write_files(tmp_path / "set", {"sub/b.png": "-", "sub/b.txt": "b"})
    (root / "sub" / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(tmp_path / "elsewhere")
    names = [item.name for item in read_folder(root, "data.path")]
    assert names == ["linked/a.png", "sub/b.png"]


def test_folder_must_exist_and_hold_media(tmp_path: Path) -> None:
    missing = error_of(tmp_path / "nowhere")
    assert missing.startswith(f"data.path={tmp_path / 'nowhere'}")
    assert "no such folder" in missing
    assert "holds no video or image" in error_of(tmp_path)
    write_files(tmp_path, {"a.txt": "a", "file": "-"})
    assert "holds no video or image" in error_of(tmp_path)
    assert "this is a file" in error_of(tmp_path / "file")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b.txt": "b"}, "b.txt: no video or image of this name"),
        ({"b.png": "-"}, "b.png: has no caption; write it to b.txt"),
        ({"b.png": "-", "b.txt": " \n"}, "b.txt: is empty"),
        ({"b.png": "-", "b.mp4": "-", "b.txt": "b"}, "b.mp4, b.png: share one caption file"),
        ({"b.png": "-", "b.txt": b"caf\xe9"}, "b.txt: is not UTF-8 (byte 3)"),
    ],
)
def test_each_wrong_pair_is_named(
    tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    error = error_of(write_files(tmp_path, {"a.png": "-", "a.txt": "a", **files}))
    assert message in error
    assert "1 problem\n" in error


def test_many_problems_are_one_error_of_five_lines_and_a_count(tmp_path: Path) -> None:
    files = {f"{i}.png": "-" for i in range(7)} | {"x.txt": "x"}
    error = error_of(write_files(tmp_path, files))
    assert "8 problems" in error
    assert error.count("has no caption") == 5
    assert error.endswith("... and 3 more")


def items_of(count: int) -> list[Item]:
    return [Item(Path(f"{i}.mp4"), "a", "video", f"{i}.mp4") for i in range(count)]


def test_heldout_is_a_stable_share() -> None:
    training, heldout = split_heldout(items_of(1000), 0.1)
    assert sorted(training + heldout, key=lambda item: int(item.path.stem)) == items_of(1000)
    assert 70 < len(heldout) < 130
    more = split_heldout(items_of(2000), 0.1)[1]
    assert [item for item in more if int(item.path.stem) < 1000] == heldout


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.001), (2, 0.999), (9, 1.0), (3, 0.3)])
def test_heldout_is_never_none_and_never_all(count: int, fraction: float) -> None:
    training, heldout = split_heldout(items_of(count), fraction)
    assert training
    assert heldout
    assert len(training) + len(heldout) == count


def test_nothing_is_held_out_of_one_item_or_at_fraction_zero() -> None:
    assert split_heldout(items_of(1), 0.5) == (items_of(1), [])
    assert split_heldout(items_of(9), 0.0) == (items_of(9), [])
