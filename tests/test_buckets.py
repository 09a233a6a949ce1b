"""Shapes of clips: least crop, no upscaling, 4n+1 frames, and the fps policies."""

from pathlib import Path

import pytest

from data.buckets import (
    Bucket,
    Clip,
    ClipSettings,
    Extraction,
    Policy,
    choose_bucket,
    choose_size,
    describe_buckets,
    plan_clips,
)
from data.sources import DataError, Item, MediaInfo

AREA = 480 * 832


def item(name: str) -> Item:
    return Item(Path(name), "a", "image" if name.endswith("png") else "video", name)


def plan_one(info: MediaInfo, policy: Policy = "resample", extraction: Extraction = "head") -> Clip:
    settings = ClipSettings((64, 64), 17, 8, policy, 16, 4, extraction)
    return plan_clips([item("a.mp4")], [info], settings)[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((480, 832), (480, 832)),  # the target itself
        ((960, 1664), (480, 832)),  # the target's aspect ratio, larger
        ((240, 416), (240, 416)),  # and smaller
        ((1080, 1920), (480, 832)),  # 16:9: 2.5 % cropped rather than 17 % fewer pixels
        ((1920, 1080), (832, 480)),
        ((1000, 1000), (624, 624)),
        ((300, 400), (288, 384)),  # smaller than the area: no upscaling
        ((101, 57), (96, 48)),  # odd, and small
        ((320, 1920), (256, 1536)),
        ((16, 16), (16, 16)),
    ],
)
def test_size_of(source: tuple[int, int], expected: tuple[int, int]) -> None:
    assert choose_size(*source, AREA, 16) == expected


@pytest.mark.parametrize("multiple", [16, 32])
def test_size_fits_the_model_and_the_source_at_any_shape(multiple: int) -> None:
    for height in range(multiple, 1400, 97):
        for width in range(multiple, 1400, 89):
            h, w = choose_size(height, width, AREA, multiple)
            assert h % multiple == 0
            assert w % multiple == 0
            assert 0 < h <= height
            assert 0 < w <= width
            assert h * w <= AREA


def test_crop_is_small_where_the_area_allows_it() -> None:
    for width in range(480, 1921, 37):
        h, w = choose_size(1080, width, AREA, 16)
        kept = min(h * width, w * 1080) / max(h * width, w * 1080)
        assert kept > 0.94, (width, h, w)


@pytest.mark.parametrize(
    ("info", "policy", "frames"),
    [
        (MediaInfo(81, 16, 480, 832), "resample", 81),
        (MediaInfo(200, 16, 480, 832), "resample", 81),
        (MediaInfo(80, 16, 480, 832), "resample", 77),
        (MediaInfo(150, 30, 480, 832), "resample", 77),  # 80 frames at 16 fps
        (MediaInfo(150, 30, 480, 832), "keep", 81),
        (MediaInfo(51, 23.976, 480, 832), "resample", 33),
        (MediaInfo(10, 8, 480, 832), "resample", 17),  # 20 frames: repeated, not slowed down
        (MediaInfo(17, 16.02, 480, 832), "resample", 17),  # a rate from rounded timestamps
        (MediaInfo(1, 24, 480, 832), "resample", 1),
        (MediaInfo(1, 0, 480, 832), "resample", 1),  # an image
        (MediaInfo(1, 0, 480, 832), "error", 1),
    ],
)
def test_frames_of(info: MediaInfo, policy: Policy, frames: int) -> None:
    bucket = choose_bucket(info, (480, 832), 81, 16, policy, 16, 4)
    assert bucket == Bucket(frames, 480, 832)


def test_head_starts_at_zero_and_middle_is_centred() -> None:
    info = MediaInfo(frames=24 * 5, fps=24, height=64, width=64)  # 40 frames at 8 fps
    assert plan_one(info).start == 0
    assert plan_one(info, extraction="middle").start == 11 / 8
    kept = plan_one(info, "keep", "middle")
    assert (kept.start, kept.fps, kept.policy) == (51 / 24, 24, "keep")


def test_error_policy_accepts_ntsc_rates_and_names_the_others() -> None:
    assert plan_one(MediaInfo(40, 8.005, 64, 64), "error").policy == "keep"
    settings = ClipSettings((64, 64), 17, 8, "error", 16, 4, "head")
    infos = [MediaInfo(40, 24, 64, 64), MediaInfo(40, 8, 64, 64), MediaInfo(1, 0, 64, 64)]
    with pytest.raises(DataError, match=r"1 problem\n  a.mp4: has 24 frames a second and 8 are"):
        plan_clips([item("a.mp4"), item("b.mp4"), item("c.png")], infos, settings)


def test_too_small_sources_are_named_together() -> None:
    settings = ClipSettings((64, 64), 17, 8, "resample", 16, 4, "head")
    infos = [MediaInfo(9, 8, 15, 64), MediaInfo(9, 8, 64, 64), MediaInfo(1, 0, 64, 8)]
    with pytest.raises(DataError) as caught:
        plan_clips([item("a.mp4"), item("b.mp4"), item("c.png")], infos, settings)
    assert "a.mp4: is 15x64" in str(caught.value)
    assert "c.png: is 64x8" in str(caught.value)
    assert "b.mp4" not in str(caught.value)


def test_buckets_are_counted_smallest_first() -> None:
    clips = [plan_one(MediaInfo(frames, 8, 64, 64)) for frames in (17, 5, 99)]
    assert describe_buckets(clips) == [(Bucket(5, 64, 64), 1), (Bucket(17, 64, 64), 2)]
