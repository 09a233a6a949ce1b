"""Folders become items, and what of a folder cannot be used is dropped for a clear reason."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from data.items import DataError, Item, Reading, Source, kind_of, printable
from data.sources import read_name_list, read_source, split_heldout


def write_files(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(root: Path) -> Reading:
    return read_source(Source(root, "data.path"))


def names_of(root: Path) -> list[str]:
    return [item.name for item in read(root).items]


def error_of(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(root)
    return str(caught.value)


def test_items_are_sorted_by_name_with_their_captions(tmp_path: Path) -> None:
    files = {
        "b.MP4": "-", "b.txt": "a red ball\n", "a.v2.png": "-", "a.v2.txt": "\ufeffa dog",
        "sub/b.mov": "-", "sub/b.txt": "another", "🎈 ñ/日本.webp": "-", "🎈 ñ/日本.txt": "a 🎈",
    }  # fmt: skip
    reading = read(write_files(tmp_path, files))
    assert [(item.name, item.kind, item.captions) for item in reading.items] == [
        ("a.v2.png", "image", ("a dog",)),
        ("b.MP4", "video", ("a red ball",)),
        ("sub/b.mov", "video", ("another",)),
        ("🎈 ñ/日本.webp", "image", ("a 🎈",)),
    ]
    assert all(item.path == tmp_path / item.name for item in reading.items)
    assert (reading.dropped, reading.notes) == ([], [])


def test_numbered_captions_and_a_mask_belong_to_the_file_of_their_stem(tmp_path: Path) -> None:
    files = {
        "a.mp4": "-", "a.txt": "first", "a.10.txt": "last", "a.3.txt": "second",
        "a.2.mp4": "-", "a.2.txt": "its own", "a.2.2.txt": "its second",
        "a.mask.png": "-", "a.2.mask.mkv": "-", "b.mask.png": "-", "b.mask.txt": "no mask of b",
    }  # fmt: skip
    items = {item.name: item for item in read(write_files(tmp_path, files)).items}
    assert {name: item.captions for name, item in items.items()} == {
        "a.mp4": ("first", "second", "last"),
        "a.2.mp4": ("its own", "its second"),
        "b.mask.png": ("no mask of b",),  # there is no other b
    }
    assert items["a.mp4"].mask == tmp_path / "a.mask.png"
    assert items["a.2.mp4"].mask == tmp_path / "a.2.mask.mkv"
    assert items["b.mask.png"].mask is None


def test_the_source_says_prefix_and_weights_for_all_its_items(tmp_path: Path) -> None:
    root = write_files(tmp_path, {"a.png": "-", "a.txt": "a dog", "a.2.txt": "a pet"})
    source = Source(root, "data.path", prefix="ohwx, ", weight=0.5, loss_weight=2.0)
    (item,) = read_source(source).items
    assert item.captions == ("ohwx, a dog", "ohwx, a pet")
    assert (item.visits, item.loss_weight, item.regularisation) == (0.5, 2.0, False)
    (item,) = read_source(replace(source, regularisation=True)).items
    assert item.captions == ("a dog", "a pet")
    assert item.regularisation


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    files = {
        "a.png": "-", "a.txt": "a", ".b.png": "-", ".DS_Store": "-", "readme.md": "-",
        ".git/c.png": "-",
    }  # fmt: skip
    assert names_of(write_files(tmp_path, files)) == ["a.png"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"a.png": "-", "a.txt": "a"})
    root = write_files(tmp_path / "set", {"sub/b.png": "-", "sub/b.txt": "b"})
    (root / "sub" / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(tmp_path / "elsewhere")
    assert names_of(root) == ["linked/a.png", "sub/b.png"]


def test_a_folder_of_links_alone_is_read_as_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"a.png": "-", "a.txt": "a"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert names_of(tmp_path / "set") == ["linked/a.png"]


def test_same_names_in_two_folders_and_very_long_names_are_items_of_their_own(
    tmp_path: Path,
) -> None:
    deep = "/".join(["d" * 200] * 6)
    files = {f"{folder}/a{suffix}": "x" for folder in ("one", "two") for suffix in (".mp4", ".txt")}
    files |= {f"{deep}/{'n' * 250}{suffix}": "x" for suffix in (".mp4", ".txt")}
    assert names_of(write_files(tmp_path, files)) == [
        f"{deep}/{'n' * 250}.mp4",
        "one/a.mp4",
        "two/a.mp4",
    ]


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    for suffix, content in ((b".png", b"-"), (b".txt", b"a dog")):
        with open(os.fsencode(tmp_path) + b"/caf\xe9" + suffix, "wb") as file:
            file.write(content)
    (item,) = read(tmp_path).items
    assert item.name == "caf\\udce9.png"
    assert item.path.read_bytes() == b"-"
    assert split_heldout([item], 0.5, ["a"]) == ([item], [])


def test_folder_must_exist_and_hold_media(tmp_path: Path) -> None:
    missing = error_of(tmp_path / "nowhere")
    assert missing.startswith(f"data.path={tmp_path / 'nowhere'}")
    assert "no such folder" in missing
    assert "holds no video or image" in error_of(tmp_path)
    write_files(tmp_path, {"a.txt": "a", "file": "-", "a.mp4": "-"})
    assert "this is a file, and none of .jsonl .csv .parquet" in error_of(tmp_path / "file")
    assert "the folder that holds your videos" in error_of(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("files", "dropped", "reason"),
    [
        ({"b.txt": "b"}, ["b.txt"], "no video or image of this name"),
        ({"b.png": "-"}, ["b.png"], "has no caption; write it to b.txt"),
        ({"b.png": "-", "b.txt": " \n"}, ["b.png"], "its caption b.txt is empty"),
        ({"b.png": "-", "b.txt": "b", "b.2.txt": ""}, ["b.png"], "its caption b.2.txt is empty"),
        (
            {"b.png": "-", "b.mp4": "-", "b.txt": "b"},
            ["b.mp4", "b.png"],
            "b.mp4, b.png share one caption file",
        ),
        (
            {"b.png": "-", "b.txt": b"caf\xe9"},
            ["b.png"],
            "its caption b.txt is not UTF-8 (byte 3); save it as UTF-8",
        ),
        (
            {"b.mp4": "-", "b.txt": "b", "b.mask.png": "-", "b.mask.mp4": "-"},
            ["b.mp4"],
            "has 2 masks (b.mask.mp4, b.mask.png)",
        ),
    ],
)
def test_what_cannot_be_used_is_dropped_and_the_rest_is_read(
    tmp_path: Path, files: dict[str, str | bytes], dropped: list[str], reason: str
) -> None:
    reading = read(write_files(tmp_path, {"a.png": "-", "a.txt": "a", **files}))
    assert [item.name for item in reading.items] == ["a.png"]
    assert [lost.name for lost in reading.dropped] == dropped
    assert all(reason in lost.reason for lost in reading.dropped)


def test_a_folder_of_which_nothing_can_be_used_is_one_error_of_five_lines_and_a_count(
    tmp_path: Path,
) -> None:
    files = {f"{i}.png": "-" for i in range(7)} | {"x.txt": "x"}
    error = error_of(write_files(tmp_path, files))
    assert "8 problems" in error
    assert error.count("has no caption") == 5
    assert error.endswith("... and 3 more")


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", {"a.png": "-", "a.txt": "a", "sub/b.gif": "-"})
    (root / "a.jsonl").write_text('{"path": "a.png", "caption": "a"}\n')

    def listing() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in [root, *root.rglob("*")])

    before = listing()
    assert read(root).items
    assert read(root / "a.jsonl").items
    assert listing() == before


def test_kind_goes_by_suffix() -> None:
    assert kind_of(Path("a.MKV")) == "video"
    assert kind_of(Path("a.gif")) == "video"
    assert kind_of(Path("a.b.jpeg")) == "image"
    assert kind_of(Path("mp4")) is None


@pytest.mark.parametrize("text", ["a ñ 🎈", "half \ud83d", os.fsdecode(b"\xff")])
def test_printable_text_can_be_encoded(text: str) -> None:
    assert printable(text).encode()
    assert (printable(text) == text) == (text == "a ñ 🎈")


def items_of(count: int) -> list[Item]:
    return [Item(Path(f"{i}.mp4"), ("a",), "video", f"{i}.mp4") for i in range(count)]


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def split(items: list[Item], fraction: float) -> tuple[list[str], list[str]]:
    training, heldout = split_heldout(items, fraction, names(items))
    return names(training), names(heldout)


def test_heldout_is_a_stable_share() -> None:
    training, heldout = split(items_of(1000), 0.1)
    assert sorted(training + heldout) == sorted(names(items_of(1000)))
    assert 70 < len(heldout) < 130
    more = split(items_of(2000), 0.1)[1]
    assert [name for name in more if int(name[:-4]) < 1000] == heldout


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.001), (2, 0.999), (9, 1.0), (3, 0.3)])
def test_heldout_is_never_none_and_never_all(count: int, fraction: float) -> None:
    training, heldout = split(items_of(count), fraction)
    assert training
    assert heldout
    assert len(training) + len(heldout) == count


def test_nothing_is_held_out_of_one_item_or_at_fraction_zero() -> None:
    assert split(items_of(1), 0.5) == (["0.mp4"], [])
    assert split(items_of(9), 0.0) == (names(items_of(9)), [])
    assert split([], 0.5) == ([], [])


def test_items_of_one_file_stay_together() -> None:
    items = items_of(300)
    groups = [str(i // 3) for i in range(300)]
    training, heldout = split_heldout(items, 0.2, groups)
    sides = [{groups[items.index(item)] for item in side} for side in (training, heldout)]
    assert not sides[0] & sides[1]
    assert len(heldout) == 3 * len(sides[1]) > 30
    assert split_heldout(items_of(3), 0.5, ["a"] * 3) == (items_of(3), [])


def test_a_column_wins_over_the_draw_and_regularisation_is_never_held_out() -> None:
    first, second, third, fourth = items_of(4)
    marked = [replace(first, split="heldout"), second, replace(third, split="train"), fourth]
    assert split(marked, 0.9) == (["1.mp4", "2.mp4", "3.mp4"], ["0.mp4"])
    assert split(marked, 0.0)[1] == ["0.mp4"]
    trained = [replace(item, split="train") for item in (first, second)]
    assert split([*trained, third], 0.001) == (["0.mp4", "1.mp4"], ["2.mp4"])
    ordinary = [replace(item, regularisation=True, split="heldout") for item in (first, second)]
    assert split([*ordinary, third, fourth], 1.0)[0][:2] == ["0.mp4", "1.mp4"]
    assert split([*ordinary, third], 1.0) == (["0.mp4", "1.mp4", "2.mp4"], [])


def test_two_windows_of_a_file_go_where_one_says_and_may_not_disagree() -> None:
    first, second, third = items_of(3)
    held = replace(first, split="heldout")
    assert names(split_heldout([held, second, third], 0.5, ["a", "a", "b"])[1]) == names(
        [first, second]
    )
    for other in (replace(second, split="train"), replace(second, regularisation=True)):
        with pytest.raises(DataError, match=r"1\.mp4 .* and 0\.mp4 \(split=heldout\) are the same"):
            split_heldout([held, other, third], 0.5, ["a", "a", "b"])


def test_a_list_of_names_finds_items_by_name_or_stem(tmp_path: Path) -> None:
    known = ("a.mp4", "sub/é 1.mov", "c.v2.gif")
    items = [Item(Path(name), ("a",), "video", name) for name in known]
    path = tmp_path / "heldout.txt"
    path.write_text("\ufeff# mine\n\n  a.mp4 \nsub/é 1\nc.v2\na\n", encoding="utf-8")
    assert read_name_list(path, "data.heldout_list", items) == set(known)
    path.write_text("a.mp4\nc.v3.gif\nnothing\n")
    with pytest.raises(DataError) as caught:
        read_name_list(path, "data.heldout_list", items)
    assert str(caught.value) == (
        f"data.heldout_list={path}: 2 problems\n"
        "  'c.v3.gif': no item has this name (did you mean c.v2.gif?)\n"
        "  'nothing': no item has this name"
    )
    path.write_text("nothing\0" * 1000)
    with pytest.raises(DataError, match="no item has this name") as caught:
        read_name_list(path, "data.heldout_list", items)
    assert len(str(caught.value)) < 500
    with pytest.raises(DataError, match="cannot be read"):
        read_name_list(tmp_path / "none.txt", "data.heldout_list", items)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        read_name_list(path, "data.heldout_list", items)
