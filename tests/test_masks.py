"""Masks follow their clip: the same crop, the same instants, averaged over each latent's pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import Bucket, Clip, ClipSettings, plan_clips
from data.items import DataError, Item, MediaInfo
from data.media import read_clip, read_mask
from tests.media_files import encode, make_item, make_video, probe_item


def image_item(folder: Path, height: int, width: int, mask: np.ndarray) -> Item:
    Image.new("RGB", (width, height)).save(folder / "a.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return replace(make_item(folder / "a.png"), mask=folder / "mask.png")


def test_mask_of_an_image_is_averaged_over_each_latent(tmp_path: Path) -> None:
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:8, :8] = 255
    pixels[8:16, 8:12] = 255
    pixels[16:24, 40:] = 51
    item = image_item(tmp_path, 32, 48, pixels)
    weights = read_mask(Clip(item, Bucket(1, 32, 48), 0, 0, "keep"), 4, 8)
    expected = torch.zeros(1, 4, 6)
    expected[0, 0, 0], expected[0, 1, 1], expected[0, 2, 5] = 1, 0.5, 0.2
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, expected)
    assert torch.allclose(
        read_mask(Clip(item, Bucket(1, 32, 48), 0, 0, "keep"), 4, 16)[0, 0, 0], torch.tensor(0.375)
    )


def test_mask_is_resized_and_cropped_as_its_picture(tmp_path: Path) -> None:
    pixels = np.zeros((120, 330), np.uint8)
    pixels[30:90, 120:210] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for factor in (1, 2, 3):  # the mask may be smaller, or larger
        size = (330 * factor // 2, 120 * factor // 2)
        Image.fromarray(pixels).resize(size, Image.Resampling.BOX).save(tmp_path / "mask.png")
        item = replace(make_item(tmp_path / "a.png"), mask=tmp_path / "mask.png")
        clip = Clip(item, Bucket(1, 64, 96), 0, 0, "keep")
        shown = read_clip(clip)[0, :, :, 0].float() / 255  # (H, W)
        expected = torch.nn.functional.avg_pool2d(shown[None, None], 8)[0]
        weights = read_mask(clip, 4, 8)
        assert (weights - expected).abs().max() < 0.08
        assert weights.min() == 0
        assert weights.max() == 1  # no ringing beyond


def moving_mask(path: Path, frames: int, white: int) -> None:
    """White where a frame's number is `white` or more."""
    pixels = np.zeros((frames, 32, 48, 3), np.uint8)
    pixels[white:] = 255
    encode(path, pixels)


def test_mask_video_is_averaged_over_the_frames_of_each_latent(tmp_path: Path) -> None:
    moving_mask(tmp_path / "mask.mp4", 24, 6)
    video = make_video(tmp_path / "a.mp4", 24, 8, (32, 48))
    item = replace(video, mask=tmp_path / "mask.mp4")
    settings = ClipSettings((32, 48), 9, 8, "resample", 16, 4, "full")
    clips = plan_clips([item], [probe_item(item)], settings).clips
    assert [(clip.start, clip.bucket.frames) for clip in clips] == [(0, 9), (9 / 8, 9), (18 / 8, 5)]
    weights = read_mask(clips[0], 4, 8)
    assert weights.shape == (3, 4, 6)
    # Latent frames: pixel frame 0, then 1 to 4, then 5 to 8.
    assert torch.allclose(weights.mean(dim=(1, 2)), torch.tensor([0, 0, 0.75]), atol=0.01)
    assert read_mask(clips[1], 4, 8).min() > 0.99
    slower = ClipSettings((32, 48), 5, 4, "resample", 16, 4, "head")  # frames 0, 2, 4, 6, 8
    (clip,) = plan_clips([item], [probe_item(item)], slower).clips
    assert torch.allclose(read_mask(clip, 4, 8).mean(dim=(1, 2)), torch.tensor([0, 0.5]), atol=0.01)
    (kept,) = plan_clips([item], [probe_item(item)], replace(slower, policy="keep")).clips
    assert kept.bucket.frames == 5
    with pytest.raises(DataError, match="masks everything"):
        read_mask(kept, 4, 8)  # frames 0 to 4


def test_mask_image_holds_for_all_frames(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", 9, 8, (32, 48))
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 48:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.jpg")
    item = replace(video, mask=tmp_path / "mask.jpg")
    weights = read_mask(Clip(item, Bucket(9, 32, 48), 0, 8, "resample"), 4, 8)
    assert weights.shape == (3, 4, 6)
    assert weights[:, :, :3].max() < 0.05
    assert weights[:, :, 3:].min() > 0.95


def error_of(item: Item, frames: int = 1) -> str:
    with pytest.raises(DataError) as caught:
        read_mask(Clip(item, Bucket(frames, 32, 48), 0, 8, "resample"), 4, 8)
    return str(caught.value)


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    square = image_item(tmp_path, 32, 48, np.full((48, 48), 255, np.uint8))
    assert error_of(square).startswith(
        "a.png: its mask mask.png is 48x48 (height x width) and what it covers is 32x48"
    )
    black = image_item(tmp_path, 32, 48, np.full((32, 48), 3, np.uint8))
    assert error_of(black).startswith("a.png: its mask mask.png masks everything: it is black")
    gone = replace(black, mask=tmp_path / "no.png")
    assert error_of(gone).startswith("a.png: its mask no.png: cannot be opened (No such file")
    moving_mask(tmp_path / "short.mp4", 4, 0)
    video = replace(make_video(tmp_path / "a.mp4", 9, 8, (32, 48)), mask=tmp_path / "short.mp4")
    assert error_of(video, 9).startswith("a.mp4: its mask short.mp4 ends after 0.50 s, and a frame")
    assert read_mask(Clip(video, Bucket(5, 32, 48), 0, 8, "resample"), 4, 8).min() > 0.98


def test_almost_the_same_shape_is_accepted(tmp_path: Path) -> None:
    item = image_item(tmp_path, 320, 480, np.full((317, 479), 255, np.uint8))
    assert probe_item(item) == MediaInfo(1, 0, 320, 480)
    assert (read_mask(Clip(item, Bucket(1, 32, 48), 0, 0, "keep"), 4, 8) == 1).all()
