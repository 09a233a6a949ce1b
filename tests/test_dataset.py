"""Real datasets become clips: what is used, what is held out, what is left out and why."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data.buckets import Bucket, Clip
from data.items import DataError
from tests.toy_runs import config_of, make_image, make_video, planned
from train.dataset import Clips, check_sides, overview
from train.rules import ConfigError

MODEL = Path("embedded")  # planning reads no weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, of which one is too short for the configured length, and two images."""
    path = tmp_path / "data"
    make_video(path / "long.mp4", 24, "a long video")
    make_video(path / "short.mp4", 9, "a short video")
    make_image(path / "a.png", 1, "an image")
    make_image(path / "b.png", 2, "another image")
    return path


def plan(data: Path, *overrides: str) -> Clips:
    return planned(config_of(data, MODEL, "data.frames=13", *overrides))


def images(folder: Path, *names: str) -> Path:
    """Images of different noise, named so."""
    for seed, name in enumerate(names):
        make_image(folder / name, 100 + seed, f"caption of {name}")
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def names(clips: list[Clip]) -> set[str]:
    return {clip.item.name for clip in clips}


def test_clips_are_cut_to_what_the_files_hold(folder: Path) -> None:
    clips = plan(folder)
    buckets = {clip.item.name: clip.bucket for clip in [*clips.train, *clips.heldout]}
    assert buckets == {
        "long.mp4": Bucket(13, 32, 48),
        "short.mp4": Bucket(9, 32, 48),
        "a.png": Bucket(1, 32, 48),
        "b.png": Bucket(1, 32, 48),
    }


def test_a_share_is_held_out_and_nothing_is_on_both_sides(folder: Path) -> None:
    clips = plan(folder, "data.heldout_fraction=0.25")
    assert len(clips.heldout) >= 1
    assert not names(clips.train) & names(clips.heldout)
    assert len(clips.train) + len(clips.heldout) == 4
    assert plan(folder, "data.heldout_fraction=0.25") == clips


def test_all_windows_of_a_file_are_on_one_side(tmp_path: Path) -> None:
    for number in range(4):
        make_video(tmp_path / "data" / f"{number}.mp4", 20 + number, "a video")
    clips = plan(
        tmp_path / "data", "data.frames=5", "data.extraction=sliding", "data.stride=5",
        "data.heldout_fraction=0.5",
    )  # fmt: skip
    assert len(clips.train) + len(clips.heldout) == 16  # four windows of each
    assert len(clips.heldout) >= 4
    assert not names(clips.train) & names(clips.heldout)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_copies_of_a_file_stay_together(tmp_path: Path, fraction: float) -> None:
    data = images(tmp_path / "data", *(f"{number}.png" for number in range(6)))
    for number in range(6):
        (data / "again").mkdir(exist_ok=True)
        shutil.copy(data / f"{number}.png", data / "again" / f"copy_{5 - number}.png")
        (data / "again" / f"copy_{5 - number}.txt").write_text("another caption")
    clips = plan(data, f"data.heldout_fraction={fraction}")
    sides = [
        {clip.item.path.read_bytes() for clip in side} for side in (clips.train, clips.heldout)
    ]
    assert not sides[0] & sides[1]
    assert len(clips.heldout) % 2 == 0


def test_a_folder_of_its_own_is_held_out_whole(folder: Path) -> None:
    other = images(folder.parent / "heldout", "c.png", "d.png")
    clips = plan(folder, f"data.heldout_path={other}")
    assert len(clips.train) == 4
    assert names(clips.heldout) == {"c.png", "d.png"}
    assert not [note for note in clips.notes if "heldout" in note]


def test_copies_of_what_is_held_out_are_not_trained_on(folder: Path) -> None:
    """By content: another name and another caption make no other file of it."""
    heldout = folder.parent / "heldout"
    make_image(heldout / "other_name.png", 1, "held out")  # the noise of a.png
    clips = plan(folder, f"data.heldout_path={heldout}")
    assert names(clips.train) == {"long.mp4", "short.mp4", "b.png"}
    assert names(clips.heldout) == {"other_name.png"}
    assert [note for note in clips.notes if "1 of the files to train on" in note]


@pytest.mark.parametrize("inner", ["heldout", "train"])
def test_no_file_is_on_both_sides_when_one_folder_lies_in_the_other(
    folder: Path, inner: str
) -> None:
    make_image(folder / "inner" / "c.png", 3, "in the inner folder")
    paths = [folder, folder / "inner"]
    train, heldout = paths if inner == "heldout" else paths[::-1]
    config = config_of(train, MODEL, f"data.heldout_path={heldout}")
    clips = planned(config)
    if inner == "train":  # all that could be trained on is held out
        assert len(clips.heldout) == 5
        with pytest.raises(DataError, match="nothing is left to train on"):
            check_sides(clips, config.data)
    else:
        assert names(clips.train) == {"long.mp4", "short.mp4", "a.png", "b.png"}
        assert names(clips.heldout) == {"c.png"}


def test_the_folder_that_is_trained_on_cannot_be_held_out(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.heldout_path.*what is trained on"):
        plan(folder, f"data.heldout_path={folder}")


def test_a_list_names_what_is_held_out(folder: Path) -> None:
    chosen = folder.parent / "heldout.txt"
    chosen.write_text("# what to measure on\nlong.mp4\n\nb\n")  # with or without its suffix
    clips = plan(folder, f"data.heldout_path={chosen}")
    assert names(clips.heldout) == {"long.mp4", "b.png"}
    assert names(clips.train) == {"short.mp4", "a.png"}
    chosen.write_text("long.mp4\nlnog.mp4\n")
    with pytest.raises(DataError, match=r"(?s)data\.heldout_path=.*'lnog\.mp4': no item.*long"):
        plan(folder, f"data.heldout_path={chosen}")


def test_a_listed_file_takes_its_copies_with_it(tmp_path: Path) -> None:
    data = images(tmp_path / "data", "a.png", "b.png")
    shutil.copy(data / "a.png", data / "copy.png")
    (data / "copy.txt").write_text("a copy")
    chosen = tmp_path / "heldout.txt"
    chosen.write_text("a.png\ncopy.png\n")
    assert names(plan(data, f"data.heldout_path={chosen}").heldout) == {"a.png", "copy.png"}
    chosen.write_text("a.png\n")  # the list says that the copy is trained on: the same file
    with pytest.raises(DataError, match=r"copy\.png.*a\.png.*the same file"):
        plan(data, f"data.heldout_path={chosen}")


def test_a_column_says_what_is_held_out(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    splits = {"a.png": "train", "b.png": "heldout", "c.png": None, "d.png": "test"}
    rows: list[dict[str, object]] = [
        {"path": name, "caption": "noise", "split": split} for name, split in splits.items()
    ]
    clips = plan(write_rows(tmp_path / "list.jsonl", rows))
    assert names(clips.heldout) == {"b.png", "d.png"}
    assert names(clips.train) == {"a.png", "c.png"}


def test_a_column_has_its_say_beside_a_folder_of_its_own(tmp_path: Path) -> None:
    """What a column holds out is never trained on, whatever else is held out."""
    images(tmp_path, "a.png", "b.png")
    rows: list[dict[str, object]] = [
        {"path": "a.png", "caption": "noise"},
        {"path": "b.png", "caption": "noise", "split": "heldout"},
    ]
    other = make_image(tmp_path / "heldout" / "c.png", 3, "held out").parent
    clips = plan(write_rows(tmp_path / "list.jsonl", rows), f"data.heldout_path={other}")
    assert names(clips.train) == {"a.png"}
    assert names(clips.heldout) == {"b.png", "c.png"}


def test_one_item_leaves_none_to_measure_on(tmp_path: Path) -> None:
    make_image(tmp_path / "data" / "a.png", 1, "alone")
    config = config_of(tmp_path / "data", MODEL)
    with pytest.raises(DataError, match=r"nothing is left to measure on.*data\.heldout_path"):
        check_sides(planned(config), config.data)


@pytest.mark.parametrize("key", ["height", "width"])
def test_a_size_that_does_not_fit_the_model_is_told(folder: Path, key: str) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}=40.*multiples of 16"):
        plan(folder, f"data.{key}=40")


def test_what_cannot_be_used_is_named_before_anything_is_encoded(folder: Path) -> None:
    (folder / "long.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"long\.mp4: is empty"):
        plan(folder)
    with pytest.raises(DataError, match=r"data\.heldout_path=.*no such folder"):
        plan(folder, f"data.heldout_path={folder.parent / 'no'}")
    assert {path.name for path in (folder.parent / "cache").iterdir()} <= {"files.json"}


def test_all_that_cannot_be_used_is_told_at_once_with_the_mend(folder: Path) -> None:
    (folder / "long.mp4").write_bytes(b"")
    (folder / "a.txt").unlink()
    (folder / "text.mp4").write_text("a text")
    (folder / "text.txt").write_text("a caption")
    with pytest.raises(DataError) as caught:
        plan(folder, "data.skip_bad=false")
    message = str(caught.value)
    assert "3 problems" in message
    assert "data.skip_bad=true" in message
    for words in ("long.mp4: is empty", "a.png: has no caption; write it to a.txt"):
        assert words in message
    assert "text.mp4: holds text" in message


def test_skip_bad_leaves_out_what_cannot_be_used_and_says_so(folder: Path) -> None:
    (folder / "long.mp4").write_bytes(b"")
    make_image(folder / "c.png", 3, "an image")
    make_image(folder / "masked.png", 4, "an image")
    (folder / "masked.mask.png").write_bytes(b"no picture")
    (folder / "a.txt").unlink()
    clips = plan(folder, "data.skip_bad=true")
    used = names(clips.train) | names(clips.heldout)
    assert used == {"short.mp4", "b.png", "c.png"}
    reasons = {entry.name: entry.reason for entry in clips.dropped}
    assert set(reasons) == {"long.mp4", "a.png", "masked.png"}
    assert "its mask masked.mask.png" in reasons["masked.png"]
    assert "write it to a.txt" in reasons["a.png"]


def test_images_teach_i2v_a14b_nothing(folder: Path, tmp_path: Path) -> None:
    overrides = ["model=i2v_a14b", f"model.path={tmp_path}"]
    with pytest.raises(DataError, match=r"a\.png: is a single frame, and Wan 2\.2 I2V-A14B"):
        plan(folder, *overrides)
    clips = plan(folder, *overrides, "data.skip_bad=true", "data.heldout_fraction=0.5")
    assert names(clips.train) | names(clips.heldout) == {"long.mp4", "short.mp4"}
    assert {entry.name for entry in clips.dropped} == {"a.png", "b.png"}


def test_several_sizes_are_several_clips_of_a_file(folder: Path) -> None:
    clips = plan(folder, "data.height=64", "data.width=96", "data.upscale=true",
                 "data.scales=[1.0,0.5]", "data.heldout_fraction=0.25")  # fmt: skip
    shapes = {(c.item.name, c.bucket.height, c.bucket.width) for c in clips.train}
    kept = names(clips.train)
    assert shapes == {(name, *size) for name in kept for size in ((64, 96), (32, 48))}


def test_mixed_datasets_have_weights_and_prefixes_of_their_own(folder: Path) -> None:
    """A folder, a list and a set of ordinary things, through the files of a user."""
    home = folder.parent
    images(home / "faces", "x.png", "y.png")
    rows: list[dict[str, object]] = [
        {"path": "x.png", "caption": ["one", "two"], "repeats": 3},
        {"path": "y.png", "caption": "three", "split": "train"},
    ]
    listed = write_rows(home / "faces.jsonl", rows)
    ordinary = images(home / "ordinary", "p.png", "q.png")
    faces = f"path: {listed}, root: {home / 'faces'}, weight: 0.5, prefix: 'face, '"
    clips = plan(
        folder, "data.prefix='zorbi, '", "data.heldout_fraction=0.25",
        f"+data.mix.faces={{{faces}}}",
        f"+data.mix.rest={{path: {ordinary}, loss_weight: 0.25, regularisation: true}}",
    )  # fmt: skip
    items = {clip.item.name: clip.item for clip in [*clips.train, *clips.heldout]}
    assert items["a.png"].captions == ("zorbi, an image",)
    assert items["x.png"].captions == ("face, one", "face, two")
    assert items["p.png"].captions == ("caption of p.png",)
    found = {name: (item.visits, item.loss_weight) for name, item in items.items()}
    assert found["a.png"] == (1.0, 1.0)
    assert found["x.png"] == (1.5, 1.0)
    assert found["y.png"] == (0.5, 1.0)
    assert found["p.png"] == (1.0, 0.25)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_ordinary_things_are_never_held_out(tmp_path: Path, fraction: float) -> None:
    data = images(tmp_path / "data", "a.png", "b.png")
    for seed in range(12):
        make_image(tmp_path / "ordinary" / f"{seed}.png", seed, "ordinary")
    clips = plan(
        data, f"data.heldout_fraction={fraction}",
        f"+data.mix.rest={{path: {tmp_path / 'ordinary'}, regularisation: true}}",
    )  # fmt: skip
    assert sum(clip.item.regularisation for clip in clips.train) == 12
    assert [clip.item.regularisation for clip in clips.heldout] == [False]
    assert len(clips.train) == 13


def test_a_problem_of_a_mixed_dataset_is_told_with_its_key(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.mix\.faces\.path=nowhere"):
        plan(folder, "+data.mix.faces={path: nowhere}")


def test_the_overview_counts_shapes_and_names_what_is_left_out(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "broken.txt").write_text("a caption that is in no file")
    clips = plan(folder, "data.skip_bad=true", "data.heldout_fraction=0.3")
    found = json.loads(json.dumps(overview(clips)))
    shapes = found["train"]["shapes"].keys() | found["heldout"]["shapes"].keys()
    assert found["train"]["clips"] == len(clips.train) == sum(found["train"]["shapes"].values())
    assert found["heldout"]["clips"] == len(clips.heldout) > 0
    assert shapes == {"13x32x48", "9x32x48", "1x32x48"}
    assert [entry["name"] for entry in found["dropped"]] == ["broken.png"]
    assert found["dropped"][0]["reason"]
    assert found["notes"] == clips.notes


def test_files_that_did_not_change_are_not_opened_again(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))  # what was written just now may be written again unseen
    before = plan(folder)
    index = folder.parent / "cache" / "files.json"
    written = index.stat().st_mtime_ns
    assert plan(folder) == before
    assert index.stat().st_mtime_ns == written
    make_image(folder / "a.png", 77, "an image")
    was, now = (clips.files[folder / "a.png"] for clips in (before, plan(folder)))
    assert now.previous == was.digest != now.digest
