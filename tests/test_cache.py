"""The cache encodes what is missing, nothing else, and never trusts a damaged entry."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from data.buckets import Bucket, Clip
from data.cache import (
    CacheReport,
    cache_latents,
    cache_text,
    file_digests,
    load_latents,
    load_text,
)
from data.sources import DataError, Item


def silent(indices: Iterable[int], _label: str) -> Iterable[int]:
    return indices


class Encoder:
    """Counts what it is asked for; latents (1, T, H, W) are the brightness of the frames."""

    def __init__(self) -> None:
        self.frames: list[Tensor] = []
        self.prompts: list[str] = []

    def latents(self, frames: Tensor) -> Tensor:
        self.frames.append(frames)
        return frames.float().mean(dim=-1)[None]

    def text(self, prompts: list[str]) -> list[Tensor]:
        self.prompts += prompts
        return [torch.full((len(prompt) + 1, 2), 1.0) for prompt in prompts]


def write_image(folder: Path, name: str, colour: int) -> Clip:
    Image.new("RGB", (32, 16), (colour,) * 3).save(folder / name)
    item = Item(folder / name, "a caption", "image", name)
    return Clip(item, Bucket(1, 16, 32), 0, 0, "keep")


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    (tmp_path / "media").mkdir()
    return [write_image(tmp_path / "media", f"{i}.png", 40 * i) for i in range(3)]


def fill(clips: Sequence[Clip], root: Path, encoder_id: str = "vae") -> tuple[int, CacheReport]:
    """How many clips were encoded, by the encoder's own count, and the report."""
    encoder = Encoder()
    paths, report = cache_latents(clips, encoder.latents, encoder_id, root, silent)
    for clip, path in zip(clips, paths, strict=True):
        brightness = float(np.asarray(Image.open(clip.item.path)).mean())
        assert torch.equal(load_latents(path), torch.full((1, 1, 16, 32), brightness))
    return len(encoder.frames), report


def test_second_run_encodes_nothing(clips: list[Clip], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert fill(clips, root) == (3, CacheReport("latents", reused=0, encoded=3, repaired=0))
    assert fill(clips, root) == (0, CacheReport("latents", reused=3, encoded=0, repaired=0))


def test_report_is_a_sentence() -> None:
    assert CacheReport("latents", 3, 24, 0).sentence() == "latents: 24 encoded, 3 reused"
    assert CacheReport("text", 3, 0, 2).sentence() == (
        "text: 0 encoded, 3 reused, 2 damaged and encoded again"
    )


def test_frames_arrive_whole_and_latents_keep_their_dtype(
    clips: list[Clip], tmp_path: Path
) -> None:
    def encode(frames: Tensor) -> Tensor:
        assert frames.dtype == torch.uint8
        assert frames.shape == (1, 16, 32, 3)
        # Not contiguous, as a permuted output of an encoder may be.
        return torch.rand(2, 4, 1, 3, dtype=torch.bfloat16).permute(3, 2, 1, 0)

    paths, _ = cache_latents(clips[:1], encode, "vae", tmp_path / "cache", silent)
    latents = load_latents(paths[0])
    assert (latents.dtype, latents.shape) == (torch.bfloat16, (3, 1, 4, 2))


def test_changed_bytes_are_encoded_again_and_only_they(clips: list[Clip], tmp_path: Path) -> None:
    changed, now = clips[1].item.path, time.time_ns() + 10**12
    os.utime(changed, ns=(now, now))
    fill(clips, tmp_path / "cache")
    size = changed.stat().st_size
    write_image(changed.parent, changed.name, 41)
    os.utime(changed, ns=(now, now))
    # Size and time tell nothing, as when a file is written twice within a tick of the clock.
    assert changed.stat().st_size == size
    assert fill(clips, tmp_path / "cache")[0] == 1


def test_content_counts_not_name_place_or_time(clips: list[Clip], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(clips, root)
    clips[0].item.path.rename(tmp_path / "moved.png")
    os.utime(tmp_path / "moved.png", (1, 1))
    moved = replace(clips[0], item=replace(clips[0].item, path=tmp_path / "moved.png"))
    assert fill([moved], root)[0] == 0
    root.rename(tmp_path / "copied")
    (tmp_path / "copied" / "files.json").unlink()
    assert fill([moved, *clips[1:]], tmp_path / "copied")[0] == 0


def test_same_file_twice_is_encoded_once(clips: list[Clip], tmp_path: Path) -> None:
    assert fill([clips[0], clips[0]], tmp_path / "cache") == (
        1,
        CacheReport("latents", reused=1, encoded=1, repaired=0),
    )


def test_everything_in_the_recipe_makes_another_entry(clips: list[Clip], tmp_path: Path) -> None:
    root, clip = tmp_path / "cache", clips[0]
    others = [
        replace(clip, bucket=Bucket(1, 16, 16)),
        replace(clip, start=0.5),
        replace(clip, fps=8),
        replace(clip, policy="resample", fps=8),
    ]
    encoder = Encoder()
    paths, _ = cache_latents([clip, *others], encoder.latents, "vae", root, silent)
    assert len(set(paths)) == len(encoder.frames) == 5
    assert fill([clip], root, "another vae")[0] == 1
    assert fill([clip], root, "vae")[0] == 0


@pytest.mark.parametrize("size", [0, 5, 60, 500])
def test_truncated_entry_is_repaired(clips: list[Clip], tmp_path: Path, size: int) -> None:
    paths, _ = cache_latents(clips, Encoder().latents, "vae", tmp_path / "cache", silent)
    paths[1].write_bytes(paths[1].read_bytes()[:size])
    with pytest.raises(DataError, match=f"{paths[1].name}: cannot be read.*delete this file"):
        load_latents(paths[1])
    assert fill(clips, tmp_path / "cache") == (1, CacheReport("latents", 2, 0, repaired=1))


def test_entry_under_a_wrong_name_is_repaired(clips: list[Clip], tmp_path: Path) -> None:
    paths, _ = cache_latents(clips, Encoder().latents, "vae", tmp_path / "cache", silent)
    paths[1].write_bytes(paths[0].read_bytes())
    assert fill(clips, tmp_path / "cache")[1].repaired == 1


def test_nan_is_refused_when_encoded_and_when_read(clips: list[Clip], tmp_path: Path) -> None:
    def encode(frames: Tensor) -> Tensor:
        return torch.full((1, 1, 2, 2), float("nan") if frames.max() == 80 else 0.0)

    with pytest.raises(DataError, match=r"2\.png: the encoder returned NaN"):
        cache_latents(clips, encode, "vae", tmp_path / "cache", silent)
    paths, report = cache_latents(clips[:2], encode, "vae", tmp_path / "cache", silent)
    assert report.reused == 2, "what was encoded before the failure is kept"
    save_file({"latents": torch.full((1, 1, 2, 2), float("inf"))}, paths[0])
    with pytest.raises(DataError, match=f"{paths[0].name}: holds NaN or infinity; delete"):
        load_latents(paths[0])


def test_missing_entry_and_missing_file_are_named(clips: list[Clip], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.safetensors: cannot be read"):
        load_text(tmp_path / "none.safetensors")
    clips[1].item.path.unlink()
    with pytest.raises(DataError, match=r"1\.png: cannot be read"):
        fill(clips, tmp_path / "cache")


def test_nothing_is_left_beside_the_entries(clips: list[Clip], tmp_path: Path) -> None:
    fill(clips, tmp_path / "cache")
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert len(names) == 4
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}


def test_folder_that_cannot_be_written_is_named(clips: list[Clip], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(DataError, match=r"cannot write .*set another cache folder"):
        fill(clips, tmp_path / "cache")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2]}', '{"a": [1, null, 3]}']
)
def test_damaged_file_index_is_made_anew(clips: list[Clip], tmp_path: Path, content: str) -> None:
    root = tmp_path / "cache"
    for clip in clips:
        os.utime(clip.item.path, (1, 1))
    fill(clips, root)
    good = (root / "files.json").read_bytes()
    (root / "files.json").write_text(content)
    assert fill(clips, root)[0] == 0
    assert (root / "files.json").read_bytes() == good


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    old = tmp_path / "old.mp4"
    old.write_bytes(b"one")
    os.utime(old, ns=(10**18, 10**18))
    hashed: list[int] = []

    def count(indices: Iterable[int], _label: str) -> Iterable[int]:
        hashed.extend(indices)
        return indices

    first = file_digests([old], tmp_path / "cache", count)
    assert file_digests([old], tmp_path / "cache", count) == first
    assert len(hashed) == 1
    old.write_bytes(b"two")  # the same size, but a time of its own
    assert file_digests([old], tmp_path / "cache", count) != first
    assert len(hashed) == 2


def test_edited_caption_encodes_only_that_text(tmp_path: Path) -> None:
    encoder = Encoder()
    prompts = ["a red ball", "", "a 🎈", "a red ball"]
    paths, report = cache_text(prompts, encoder.text, "umt5", tmp_path, silent)
    assert report == CacheReport("text", reused=0, encoded=3, repaired=0)
    assert list(paths) == encoder.prompts == ["a red ball", "", "a 🎈"]
    assert load_text(paths[""]).shape == (1, 2)
    assert load_text(paths["a red ball"]).shape == (11, 2)

    prompts[2] = "a balloon"
    again, report = cache_text(prompts, encoder.text, "umt5", tmp_path, silent)
    assert encoder.prompts[3:] == ["a balloon"]
    assert report == CacheReport("text", reused=2, encoded=1, repaired=0)
    assert again[""] == paths[""]
    assert cache_text([""], encoder.text, "another", tmp_path, silent)[1].encoded == 1
