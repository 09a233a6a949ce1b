"""Folders of real files become clips and cache entries, each encoded once, by the toy model."""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import Bucket, Clip
from data.cache import load_latents, load_text
from data.media import read_clip
from data.sources import DataError
from train.config import Config, compose
from train.dataset import Clips, EncodedDataset, encode_dataset, plan_dataset
from train.rules import ConfigError
from wan.checkpoints import ModelFolder, find_model, load_text_encoder, load_tokenizer, load_vae
from wan.latents import encode_video
from wan.text import encode_prompts
from wan.variants import variant

TINY = variant("tiny")
CPU = torch.device("cpu")


@dataclass
class Progress:
    """Counts what was announced, and goes through it."""

    done: list[str] = field(default_factory=list)

    def __call__(self, steps: Iterable[int], name: str) -> Iterable[int]:
        for step in steps:
            self.done.append(name)
            yield step


@pytest.fixture
def model(toy_model: Path) -> ModelFolder:
    return find_model(str(toy_model), "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, of which one is too short for the configured length, and two images."""
    path = tmp_path / "data"
    make_video(path / "long.mp4", 24, "a long video")
    make_video(path / "short.mp4", 9, "a short video")
    make_image(path / "a.png", 1, "an image")
    make_image(path / "b.png", 2, "another image")
    return path


def make_image(path: Path, seed: int, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(caption)


def make_video(path: Path, frames: int, caption: str) -> None:
    """At 8 frames a second, the frame rate of the tiny model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(frames).integers(0, 256, (frames, 32, 48, 3), np.uint8)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-threads", "1", "-f", "rawvideo",
        "-pix_fmt", "rgb24", "-s", "48x32", "-r", "8", "-i", "-", "-c:v", "libx264",
        "-preset", "ultrafast", str(path),
    ]  # fmt: skip
    subprocess.run(command, input=pixels.tobytes(), check=True)
    path.with_suffix(".txt").write_text(caption)


def config_of(folder: Path, model: ModelFolder, *overrides: str) -> Config:
    return compose(
        [
            "name=toy", "model=tiny", f"model.path={model.path}", f"data.path={folder}",
            f"data.cache={folder.parent / 'cache'}", "data.height=32", "data.width=48",
            "data.frames=13", "data.heldout_fraction=0.25", *overrides,
        ]
    )  # fmt: skip


def encode(
    config: Config, model: ModelFolder, progress: Progress, prompts: Iterable[str] = ()
) -> EncodedDataset:
    clips = plan_dataset(config.data, TINY)
    return encode_dataset(clips, list(prompts), config, model, CPU, progress)


def planned_or_refused(folder: Path, model: ModelFolder, *overrides: str) -> Clips | None:
    try:
        return plan_dataset(config_of(folder, model, *overrides).data, TINY)
    except (ConfigError, DataError):
        return None


def names(clips: list[Clip]) -> set[str]:
    return {clip.item.name for clip in clips}


def test_clips_are_cut_to_what_the_files_hold(folder: Path, model: ModelFolder) -> None:
    clips = plan_dataset(config_of(folder, model).data, TINY)
    buckets = {clip.item.name: clip.bucket for clip in [*clips.train, *clips.heldout]}
    assert buckets == {
        "long.mp4": Bucket(13, 32, 48),
        "short.mp4": Bucket(9, 32, 48),
        "a.png": Bucket(1, 32, 48),
        "b.png": Bucket(1, 32, 48),
    }


def test_a_share_is_held_out_and_nothing_is_on_both_sides(folder: Path, model: ModelFolder) -> None:
    clips = plan_dataset(config_of(folder, model).data, TINY)
    assert len(clips.heldout) >= 1
    assert not names(clips.train) & names(clips.heldout)
    assert len(clips.train) + len(clips.heldout) == 4
    assert plan_dataset(config_of(folder, model).data, TINY) == clips


def test_a_folder_of_its_own_is_held_out_whole(folder: Path, model: ModelFolder) -> None:
    other = folder.parent / "heldout"
    make_image(other / "c.png", 3, "held out")
    overrides = [f"data.heldout_path={other}", "data.heldout_fraction=0.1"]
    clips = plan_dataset(config_of(folder, model, *overrides).data, TINY)
    assert len(clips.train) == 4
    assert names(clips.heldout) == {"c.png"}


@pytest.mark.parametrize("inner", ["heldout", "train"])
def test_no_file_is_on_both_sides_when_one_folder_lies_in_the_other(
    folder: Path, model: ModelFolder, inner: str
) -> None:
    make_image(folder / "inner" / "c.png", 3, "in the inner folder")
    paths = [folder, folder / "inner"]
    train, heldout = paths if inner == "heldout" else paths[::-1]
    overrides = [f"data.heldout_path={heldout}", "data.heldout_fraction=0.1"]
    clips = planned_or_refused(train, model, *overrides)
    if clips is not None:  # to refuse such folders is as good
        assert not {c.item.path for c in clips.train} & {c.item.path for c in clips.heldout}


def test_one_item_leaves_none_to_measure_on(tmp_path: Path, model: ModelFolder) -> None:
    make_image(tmp_path / "data" / "a.png", 1, "alone")
    with pytest.raises(DataError, match=r"one item.*data\.heldout_path"):
        plan_dataset(config_of(tmp_path / "data", model).data, TINY)


@pytest.mark.parametrize("key", ["height", "width"])
def test_a_size_that_does_not_fit_the_model_is_told(
    folder: Path, model: ModelFolder, key: str
) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}=40.*multiples of 16"):
        plan_dataset(config_of(folder, model, f"data.{key}=40").data, TINY)


def test_what_cannot_be_used_is_named_before_anything_is_encoded(
    folder: Path, model: ModelFolder
) -> None:
    (folder / "long.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"long\.mp4: is empty"):
        plan_dataset(config_of(folder, model).data, TINY)
    overrides = [f"data.heldout_path={folder.parent / 'no'}", "data.heldout_fraction=0.1"]
    with pytest.raises(DataError, match=r"data\.heldout_path=.*no such folder"):
        plan_dataset(config_of(folder, model, *overrides).data, TINY)
    assert not (folder.parent / "cache").exists()


def test_entries_are_what_the_encoders_make_of_the_files(folder: Path, model: ModelFolder) -> None:
    config = config_of(folder, model)
    clips = plan_dataset(config.data, TINY)
    dataset = encode_dataset(clips, [], config, model, CPU, Progress())
    vae = load_vae(model, torch.float32, CPU)
    encoder, tokenizer = load_text_encoder(model, torch.float32, CPU), load_tokenizer(model)
    for side, cached in [(clips.train, dataset.train), (clips.heldout, dataset.heldout)]:
        assert cached.buckets == [clip.bucket for clip in side]
        assert len(cached.latents) == len(cached.text) == len(side)
        for clip, latents, text in zip(side, cached.latents, cached.text, strict=True):
            frames = read_clip(clip).permute(3, 0, 1, 2).float()  # (3, T, H, W) in 0..255
            expected = encode_video(vae, frames[None] / 127.5 - 1)[0]
            assert torch.equal(load_latents(latents), expected)
            bucket = clip.bucket
            shape = TINY.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
            assert load_latents(latents).shape == shape
            (embedding,) = encode_prompts([clip.item.caption], tokenizer, encoder, TINY.text_len)
            assert torch.equal(load_text(text), embedding)
    (empty,) = encode_prompts([""], tokenizer, encoder, TINY.text_len)
    assert torch.equal(load_text(dataset.empty_text), empty)
    first_latents, first_text = dataset.heldout.first()
    assert torch.equal(first_latents, load_latents(dataset.heldout.latents[0]))
    assert torch.equal(first_text, load_text(dataset.heldout.text[0]))


def test_nothing_is_encoded_twice(folder: Path, model: ModelFolder) -> None:
    first, again = Progress(), Progress()
    encoded = encode(config_of(folder, model), model, first, ["a prompt"])
    assert [(report.encoded, report.reused) for report in encoded.reports] == [(4, 0), (6, 0)]
    assert first.done.count("encoding latents") == 4
    assert first.done.count("encoding text") == 6  # four captions, "" and the prompt
    reused = encode(config_of(folder, model), model, again, ["a prompt"])
    assert [(report.encoded, report.reused) for report in reused.reports] == [(0, 4), (0, 6)]
    assert not [name for name in again.done if name.startswith("encoding")]
    assert reused.train == encoded.train


def test_another_caption_is_encoded_alone(folder: Path, model: ModelFolder) -> None:
    before = encode(config_of(folder, model), model, Progress())
    for path in folder.glob("*.txt"):
        path.write_text(path.read_text() + " of a fox")
    progress = Progress()
    after = encode(config_of(folder, model), model, progress)
    assert after.train.latents == before.train.latents
    assert progress.done.count("encoding latents") == 0
    assert progress.done.count("encoding text") == 4
    assert after.fingerprint() != before.fingerprint()


def test_the_dtype_of_the_text_encoder_belongs_to_the_entry(
    folder: Path, model: ModelFolder
) -> None:
    fine = encode(config_of(folder, model), model, Progress())
    coarse = encode(config_of(folder, model, "model.dtype=bfloat16"), model, Progress())
    assert coarse.train.latents == fine.train.latents
    assert not set(coarse.train.text) & set(fine.train.text)


def test_preview_prompts_are_found_as_they_were_written(folder: Path, model: ModelFolder) -> None:
    prompts = ["  a   red\nball ", "a red ball", ""]
    dataset = encode(config_of(folder, model), model, Progress(), prompts)
    assert list(dataset.prompts) == prompts
    assert torch.equal(dataset.prompts[prompts[0]], dataset.prompts[prompts[1]])
    assert torch.equal(dataset.prompts[""], load_text(dataset.empty_text))


def test_the_fingerprint_is_of_the_content(folder: Path, model: ModelFolder) -> None:
    before = encode(config_of(folder, model), model, Progress()).fingerprint()
    assert len(before) == 16
    moved = folder.parent / "moved" / "elsewhere"
    moved.parent.mkdir()
    folder.rename(moved)
    config = config_of(moved, model)
    config.data.cache = str(folder.parent / "cache")
    assert encode(config, model, Progress()).fingerprint() == before


def test_the_fingerprint_changes_with_a_clip(folder: Path, model: ModelFolder) -> None:
    config = config_of(folder, model)
    before = encode(config, model, Progress())
    for name in names(plan_dataset(config.data, TINY).train):
        if name.endswith(".png"):
            make_image(folder / name, 99, (folder / name).with_suffix(".txt").read_text())
    after = encode(config, model, Progress())
    assert after.train.text == before.train.text
    assert after.fingerprint() != before.fingerprint()
