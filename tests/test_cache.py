"""The cache encodes what is missing and nothing else, and says why."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cache_examples import Encoder, fill, image_clip, image_clips, look, store_at, video_clip
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from data.buckets import Bucket, Clip
from data.cache import (
    CacheReport,
    Store,
    cache_conditions,
    cache_latents,
    cache_masks,
    cache_text,
)
from data.items import DataError


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    return image_clips(tmp_path / "media", 3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_at(tmp_path / "cache")


def rewrite(clip: Clip, colour: int) -> None:
    """Other bytes, and a time that says so."""
    image_clip(clip.item.path.parent, clip.item.name, colour)
    later = time.time_ns() + 10**12
    os.utime(clip.item.path, ns=(later, later))


@pytest.mark.parametrize("workers", [0, 2])
def test_second_run_encodes_nothing(clips: list[Clip], tmp_path: Path, workers: int) -> None:
    store = store_at(tmp_path / "cache", workers)
    assert fill(clips, store) == (3, CacheReport("latents", 3, 0, {"new": 3}))
    assert fill(clips, store) == (0, CacheReport("latents", 3, 3))


def test_report_says_what_was_done_and_why() -> None:
    report = CacheReport("latents", 27, 24, {"new": 2, "whose file changed": 1})
    assert report.lines() == ["latents: 24 reused, 3 encoded", "  2 new", "  1 whose file changed"]
    report = CacheReport("text", 26, 0, {"new": 26}, elsewhere=14)
    assert report.lines()[0] == "text: 0 reused, 26 encoded (12 here, 14 by other processes)"


def test_the_model_is_loaded_once_and_only_for_something(clips: list[Clip], store: Store) -> None:
    encoder = Encoder()
    facts = look(clips, store.root)
    cache_latents(clips, facts, encoder.load, "vae", store)
    assert encoder.loaded == 1
    cache_latents(clips, facts, encoder.load, "vae", store)
    assert encoder.loaded == 1


def test_frames_arrive_whole_and_latents_keep_their_dtype(clips: list[Clip], store: Store) -> None:
    seen = []

    def encode(frames: Tensor) -> Tensor:
        seen.append((frames.dtype, tuple(frames.shape)))
        # Not contiguous, as a permuted output of an encoder may be.
        return torch.rand(2, 4, 1, 3, dtype=torch.bfloat16).permute(3, 2, 1, 0)

    entries, _ = cache_latents(
        clips[:1], look(clips, store.root), lambda: encode, "vae", replace(store, workers=1)
    )
    assert seen == [(torch.uint8, (1, 16, 32, 3))]
    assert (entries.read(0).dtype, entries.read(0).shape) == (torch.bfloat16, (3, 1, 4, 2))


def test_changed_file_is_encoded_again_alone(clips: list[Clip], store: Store) -> None:
    fill(clips, store)
    rewrite(clips[1], 123)
    assert fill(clips, store) == (1, CacheReport("latents", 3, 2, {"whose file changed": 1}))


def test_changed_file_that_was_never_encoded_is_new(clips: list[Clip], store: Store) -> None:
    look(clips, store.root)
    rewrite(clips[1], 123)
    assert fill(clips, store)[1].reasons == {"new": 3}


def test_content_counts_not_name_place_or_time(clips: list[Clip], store: Store) -> None:
    fill(clips, store)
    moved = clips[0].item.path.rename(store.root.parent / "moved.png")
    os.utime(moved, (1, 1))
    clips[0] = replace(clips[0], item=replace(clips[0].item, path=moved))
    assert fill(clips, store)[0] == 0


def test_copied_folder_is_read_without_encoding(clips: list[Clip], store: Store) -> None:
    fill(clips, store)
    copied = store_at(store.root.rename(store.root.parent / "copied"), encode=False)
    assert fill(clips, copied)[0] == 0
    (copied.root / "files.json").unlink()
    assert fill(clips, copied)[0] == 0


def test_same_file_twice_is_encoded_once(clips: list[Clip], store: Store) -> None:
    assert fill([clips[0]] * 2, store) == (1, CacheReport("latents", 2, 1, {"new": 1}))


@pytest.mark.parametrize(
    "changes",
    [{"bucket": Bucket(1, 16, 16)}, {"start": 0.5}, {"fps": 8}, {"policy": "resample", "fps": 8}],
)
def test_another_window_or_shape_makes_another_entry(
    clips: list[Clip], store: Store, changes: dict
) -> None:
    fill(clips, store)
    other = replace(clips[0], **changes)
    assert fill([other], store)[1].reasons == {"with other frames or size": 1}
    assert fill([*clips, other], store)[0] == 0


def test_another_encoder_makes_other_entries(clips: list[Clip], store: Store) -> None:
    fill(clips, store)
    assert fill(clips, store, "bf16")[1].reasons == {"made by another VAE or dtype": 3}
    assert fill(clips, store)[0] == 0


def test_the_nearest_entry_gives_the_reason(clips: list[Clip], store: Store) -> None:
    fill([replace(clips[0], bucket=Bucket(1, 16, 16))], store, "bf16")
    fill([clips[0]], store, "bf16")
    assert fill([clips[0]], store)[1].reasons == {"made by another VAE or dtype": 1}
    rewrite(clips[0], 200)
    assert fill([clips[0]], store, "third")[1].reasons == {"whose file changed": 1}


def test_entries_of_the_first_format_are_made_again(clips: list[Clip], store: Store) -> None:
    digest = look(clips, store.root)[clips[0].item.path].digest
    recipe = {
        "encoder": "vae",
        "file": digest,
        "window": [0.0, 0.0, "keep"],
        "bucket": asdict(clips[0].bucket),
        "reader": 1,
    }
    (store.root / "latents" / "ab").mkdir(parents=True)
    save_file(
        {"latents": torch.zeros(1, 1, 16, 32)},
        store.root / "latents" / "ab" / "old.safetensors",
        {"recipe": json.dumps(recipe)},
    )
    expected = {"in an older cache format": 1, "new": 2}
    assert fill(clips, store) == (3, CacheReport("latents", 3, 0, expected))


def test_nothing_is_encoded_when_that_is_not_wanted(clips: list[Clip], store: Store) -> None:
    fill(clips[:2], store)
    rewrite(clips[0], 200)
    with pytest.raises(
        DataError, match=r"2 of 3 .*latents.* \(1 whose file changed, 1 new\).*0\.png.*tools\.cache"
    ):
        fill(clips, replace(store, encode=False))


def test_nan_is_refused_and_what_was_made_before_is_kept(clips: list[Clip], store: Store) -> None:
    def encode(frames: Tensor) -> Tensor:
        return torch.full((1, 1, 2, 2), float("nan") if frames.max() == 20 else 0.0)

    facts = look(clips, store.root)
    with pytest.raises(DataError, match=r"2\.png: the encoder returned NaN"):
        cache_latents(clips, facts, lambda: encode, "vae", store)
    report = cache_latents(clips[:2], facts, lambda: encode, "vae", store)[1]
    assert report.reused == 2


def test_file_that_changes_after_it_was_looked_at_is_refused(
    clips: list[Clip], store: Store
) -> None:
    facts = look(clips, store.root)

    def load() -> Callable[[Tensor], Tensor]:
        os.utime(clips[1].item.path, (1, 1))  # only touched
        rewrite(clips[2], 200)
        return Encoder().load()

    with pytest.raises(DataError, match=r"2\.png has changed since this run began; start again"):
        cache_latents(clips, facts, load, "vae", store)
    assert fill(clips, store)[0] == 1


def test_nothing_is_left_beside_the_entries(clips: list[Clip], store: Store) -> None:
    fill(clips, replace(store, workers=2))
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", *[".safetensors"] * 3]


def test_partial_files_of_the_dead_are_removed(clips: list[Clip], store: Store) -> None:
    folder = store.root / "latents" / "ab"
    folder.mkdir(parents=True)
    old, young = folder / ".a.safetensors.123", folder / ".b.safetensors.124"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    fill(clips, store)
    assert (old.exists(), young.exists()) == (False, True)


def test_edited_caption_encodes_only_that_text(store: Store) -> None:
    encoder = Encoder()
    prompts = ["a red ball", "", "a 🎈", "a red ball"]
    first, report = cache_text(prompts, encoder.load_text, "umt5", store)
    assert report == CacheReport("text", 3, 0, {"new": 3})
    assert encoder.prompts == ["a red ball", "", "a 🎈"]
    assert [first.read(index).shape for index in range(3)] == [(11, 2), (1, 2), (4, 2)]

    prompts[2] = "a balloon"
    again, report = cache_text(prompts, encoder.load_text, "umt5", store)
    assert encoder.prompts[3:] == ["a balloon"]
    assert report == CacheReport("text", 3, 2, {"new": 1})
    assert again.paths[:2] == first.paths[:2]
    report = cache_text([""], encoder.load_text, "another", store)[1]
    assert report.reasons == {"made by another text encoder": 1}


class ConditionEncoder:
    """Y (1, F, 1, 2): the brightness of the first and of the last given frame, plus the place."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # given frames, T

    def load(self) -> "ConditionEncoder":
        return self

    def __call__(self, given: Tensor, frames: int) -> Tensor:
        self.calls.append((len(given), frames))
        ends = given[[0, -1], 0, 0, 0].float()
        places = torch.arange((frames - 1) // 4 + 1).float()
        return (ends[None] + places[:, None])[None, :, None]


def test_condition_is_encoded_at_the_longest_length(tmp_path: Path, store: Store) -> None:
    long = video_clip(tmp_path / "a.gif", 9, range(100, 109))
    short = replace(long, bucket=Bucket(5, 16, 32))
    clips, encoder = [short, long, short], ConditionEncoder()
    facts = look(clips, store.root)
    entries, report = cache_conditions(clips, facts, encoder.load, "vae", store)
    assert encoder.calls == [(1, 9)]
    assert report == CacheReport("condition", 3, 2, {"new": 1})
    assert entries.read(1).tolist() == [[[[100, 100]], [[101, 101]], [[102, 102]]]]
    assert torch.equal(entries.read(0), entries.read(1)[:, :2])


def test_condition_is_encoded_again_only_for_a_longer_clip(tmp_path: Path, store: Store) -> None:
    clips = [video_clip(tmp_path / "a.gif", frames, range(100, 109)) for frames in (5, 9, 5, 1)]
    facts, encoder = look(clips, store.root), ConditionEncoder()
    reasons = []
    for clip in clips:
        entries, report = cache_conditions([clip], facts, encoder.load, "vae", store)
        assert entries.read(0).shape[1] == (clip.bucket.frames - 1) // 4 + 1
        reasons.append(report.reasons)
    assert encoder.calls == [(1, 5), (1, 9)]
    assert reasons == [{"new": 1}, {"with other frames or size": 1}, {}, {}]


def test_condition_of_a_later_window_has_an_entry_for_each_length(
    tmp_path: Path, store: Store
) -> None:
    long = video_clip(tmp_path / "a.gif", 9, range(100, 111))
    clips = [replace(long, bucket=Bucket(n, 16, 32), start=0.2) for n in (5, 9)]
    encoder = ConditionEncoder()
    cache_conditions(clips, look(clips, store.root), encoder.load, "vae", store)
    assert encoder.calls == [(1, 5), (1, 9)]


def test_condition_with_the_last_frame_has_an_entry_for_each_length(
    tmp_path: Path, store: Store
) -> None:
    long = video_clip(tmp_path / "a.gif", 9, range(100, 109))
    clips = [replace(long, bucket=Bucket(5, 16, 32)), long]
    encoder = ConditionEncoder()
    entries, _ = cache_conditions(
        clips, look(clips, store.root), encoder.load, "vae", store, last=True
    )
    assert encoder.calls == [(2, 5), (2, 9)]
    assert entries.read(0)[0, 0].tolist() == [[100, 104]]
    assert entries.read(1)[0, 0].tolist() == [[100, 108]]


def test_mask_is_that_of_the_clips_that_have_one(
    clips: list[Clip], store: Store, tmp_path: Path
) -> None:
    mask = Image.new("L", (32, 16), 0)
    mask.paste(255, (16, 0, 32, 16))
    mask.save(tmp_path / "mask.png")
    clips[1] = replace(clips[1], item=replace(clips[1].item, mask=tmp_path / "mask.png"))
    entries, report = cache_masks(clips, look(clips, store.root), (4, 8), store)
    assert report == CacheReport("mask", 1, 0, {"new": 1})
    assert entries.read(0).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]]]

    mask.paste(255, (0, 0, 32, 16))
    mask.save(tmp_path / "mask.png")
    entries, report = cache_masks(clips, look(clips, store.root), (4, 8), store)
    assert report.reasons == {"whose mask changed": 1}
    assert entries.read(0).unique().tolist() == [1]
    assert cache_masks(clips[:1], look(clips, store.root), (4, 8), store)[1].total == 0
