"""Windows of items: where they lie, how long and how large they are, and what is said of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from data.buckets import (
    Bucket,
    Clip,
    ClipPlan,
    ClipSettings,
    Extraction,
    Policy,
    describe_buckets,
    plan_clips,
)
from data.items import Dropped, Item, MediaInfo

SETTINGS = ClipSettings((64, 64), 17, 8, "resample", 16, 4, "head")


def item(name: str, start: float | None = None, end: float | None = None) -> Item:
    kind = "image" if name.endswith("png") else "video"
    return Item(Path(name), ("a",), kind, name, start=start, end=end)


def plan(infos: dict[str, MediaInfo], settings: ClipSettings = SETTINGS) -> ClipPlan:
    return plan_clips([item(name) for name in infos], list(infos.values()), settings)


def plan_one(info: MediaInfo, settings: ClipSettings = SETTINGS) -> Clip:
    (clip,) = plan({"a.mp4": info}, settings).clips
    return clip


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
    settings = ClipSettings((480, 832), 81, 16, policy, 16, 4, "head")
    assert plan_one(info, settings).bucket == Bucket(frames, 480, 832)


def test_head_starts_at_zero_and_middle_is_centred() -> None:
    info = MediaInfo(frames=24 * 5, fps=24, height=64, width=64)  # 40 frames at 8 fps
    assert plan_one(info).start == 0
    assert plan_one(info, replace(SETTINGS, extraction="middle")).start == 11 / 8
    kept = plan_one(info, replace(SETTINGS, extraction="middle", policy="keep"))
    assert (kept.start, kept.fps, kept.policy) == (51 / 24, 24, "keep")


def windows(frames: int, settings: ClipSettings) -> list[tuple[float, int]]:
    """(first frame, length) of the windows of a file at 8 frames a second."""
    info = MediaInfo(frames, 8, 64, 64)
    return [(clip.start * 8, clip.bucket.frames) for clip in plan({"a.mp4": info}, settings).clips]


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (99, 1, [(41, 17)]),
        (99, 2, [(0, 17), (82, 17)]),
        (99, 3, [(0, 17), (41, 17), (82, 17)]),
        (19, 5, [(0, 17), (1, 17), (2, 17)]),  # 2 to spare: more would coincide
        (17, 4, [(0, 17)]),
        (16, 4, [(0, 13), (1, 13), (2, 13), (3, 13)]),
        (1, 4, [(0, 1)]),
    ],
)
def test_uniform_windows(frames: int, count: int, expected: list[tuple[float, int]]) -> None:
    settings = replace(SETTINGS, extraction="uniform", windows=count)
    assert windows(frames, settings) == expected


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (48, [(0, 17), (10, 17), (20, 17), (30, 17)]),
        (47, [(0, 17), (10, 17), (20, 17), (30, 17)]),
        (46, [(0, 17), (10, 17), (20, 17)]),
        (26, [(0, 17)]),
        (9, [(0, 9)]),
    ],
)
def test_sliding_windows(frames: int, expected: list[tuple[float, int]]) -> None:
    assert windows(frames, replace(SETTINGS, extraction="sliding", stride=10)) == expected


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (51, [(0, 17), (17, 17), (34, 17)]),
        (56, [(0, 17), (17, 17), (34, 17), (51, 5)]),
        (55, [(0, 17), (17, 17), (34, 17)]),  # 4 are left: too few for a second latent frame
        (50, [(0, 17), (17, 17), (34, 13)]),
        (12, [(0, 9)]),
        (1, [(0, 1)]),
    ],
)
def test_full_covers_the_file(frames: int, expected: list[tuple[float, int]]) -> None:
    assert windows(frames, replace(SETTINGS, extraction="full")) == expected


@pytest.mark.parametrize("extraction", ["head", "middle", "uniform", "sliding", "full"])
@pytest.mark.parametrize("policy", ["resample", "keep"])
@pytest.mark.parametrize("fps", [5, 8, 23.976, 60])
def test_windows_lie_within_start_and_end(
    extraction: Extraction, policy: Policy, fps: float
) -> None:
    settings = replace(SETTINGS, extraction=extraction, policy=policy, windows=3, stride=7)
    info = MediaInfo(round(fps * 20), fps, 64, 64)
    for start, end in ((None, 9.3), (2.37, None), (2.37, 9.3), (0, 99), (3, 3.21)):
        clips = plan_clips([item("a.mp4", start, end)], [info], settings).clips
        assert clips
        for clip in clips:
            assert clip.start >= (start or 0) - 0.05 / fps
            assert clip.start + (clip.bucket.frames - 1) / clip.fps < min(end or 20, 20.1)


def test_start_is_the_first_frame_that_is_not_before_it() -> None:
    info = MediaInfo(240, 24, 64, 64)
    (clip,) = plan_clips([item("a.mp4", 1.03, 2.5)], [info], SETTINGS).clips
    assert clip.start == 25 / 24
    assert clip.bucket.frames == 9  # of 11 at 8 frames a second


def test_start_after_the_end_of_the_file_is_dropped_with_its_reason() -> None:
    infos = [MediaInfo(80, 8, 64, 64)] * 2
    plan = plan_clips([item("a.mp4", 12), item("b.mp4", 2, 2)], infos, SETTINGS)
    assert plan.clips == []
    assert plan.dropped == [
        Dropped("a.mp4", "lasts 10.00 s and nothing of it is after start=12; correct it"),
        Dropped("b.mp4", "lasts 10.00 s and nothing of it is from start=2 to end=2; correct them"),
    ]


def test_error_policy_accepts_ntsc_rates_and_drops_the_others() -> None:
    settings = replace(SETTINGS, policy="error")
    infos = {"a.mp4": MediaInfo(40, 24, 64, 64), "b.mp4": MediaInfo(40, 8.005, 64, 64)}
    planned = plan({**infos, "c.png": MediaInfo(1, 0, 64, 64)}, settings)
    assert [(clip.item.name, clip.policy) for clip in planned.clips] == [
        ("b.mp4", "keep"),
        ("c.png", "keep"),
    ]
    (dropped,) = planned.dropped
    assert dropped.name == "a.mp4"
    assert dropped.reason.startswith("has 24 frames a second and 8 are wanted; convert it, or set")


def test_too_small_sources_are_dropped_with_their_size() -> None:
    infos = [MediaInfo(9, 8, 15, 64), MediaInfo(9, 8, 64, 64), MediaInfo(1, 0, 64, 8)]
    planned = plan(dict(zip(("a.mp4", "b.mp4", "c.png"), infos, strict=True)))
    assert [clip.item.name for clip in planned.clips] == ["b.mp4"]
    assert [dropped.name for dropped in planned.dropped] == ["a.mp4", "c.png"]
    assert planned.dropped[0].reason.startswith("is 15x64 (height x width), and the least")


def sizes(info: MediaInfo, settings: ClipSettings) -> list[tuple[int, int]]:
    clips = plan({"a.png": info}, settings).clips
    return [(clip.bucket.height, clip.bucket.width) for clip in clips]


def test_each_scale_gives_a_clip_but_equal_shapes_once() -> None:
    settings = replace(SETTINGS, resolution=(480, 832), scales=(1.0, 0.5, 0.25))
    assert sizes(MediaInfo(1, 0, 960, 1664), settings) == [(480, 832), (240, 416), (112, 208)]
    assert sizes(MediaInfo(1, 0, 250, 420), settings) == [(240, 416), (128, 192)]


def test_small_sources_are_enlarged_only_if_asked() -> None:
    wide = replace(SETTINGS, resolution=(480, 832))
    for source in ((240, 416), (60, 104), (479, 831), (15, 26)):
        info = MediaInfo(1, 0, *source)
        assert sizes(info, replace(wide, upscale=True)) == [(480, 832)]
        assert sizes(info, wide) != [(480, 832)]
    tall = sizes(MediaInfo(1, 0, 416, 240), replace(wide, upscale=True))
    assert tall == [(832, 480)]
    large = MediaInfo(1, 0, 1080, 1920)
    assert sizes(large, replace(wide, upscale=True)) == sizes(large, wide)


def test_buckets_are_counted_smallest_first() -> None:
    clips = [plan_one(MediaInfo(frames, 8, 64, 64)) for frames in (17, 5, 99)]
    assert describe_buckets(clips) == [(Bucket(5, 64, 64), 1), (Bucket(17, 64, 64), 2)]


def warnings(fps: dict[str, float], policy: Policy, frames: int = 80) -> list[str]:
    infos = {name: MediaInfo(frames, rate, 64, 64) for name, rate in fps.items()}
    return plan(infos, replace(SETTINGS, fps=16, policy=policy)).warnings


def test_changed_speed_is_said_with_the_clips() -> None:
    assert warnings({"a.mp4": 30, "b.mp4": 16, "c.mp4": 15.99}, "keep") == [
        "a.mp4: 30 frames a second are shown to the model as 16: motion looks 1.88 times slower; "
        "data.fps_policy=resample keeps the speed"
    ]
    assert "motion looks 2 times faster" in warnings({"a.mp4": 8}, "keep")[0]
    many = warnings({f"{i}.mp4": 29.97 for i in range(7)}, "keep")
    assert len(many) == 1
    assert many[0].startswith("0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 2 more: 30 frames a second")
    assert warnings({"a.mp4": 30, "b.mp4": 24}, "resample") == []
    assert warnings({"a.mp4": 30}, "keep", frames=4)[0].startswith("1 video is shorter")  # a still


def test_repeated_frames_are_said() -> None:
    assert warnings({"a.mp4": 8, "b.mp4": 12, "c.mp4": 60, "d.mp4": 15.99}, "resample", 240) == [
        "a.mp4: 8 frames a second are shown to the model as 16: each frame is shown twice",
        "b.mp4: 12 frames a second are shown to the model as 16: each frame is shown 1.33 times on "
        "average",
    ]


def test_short_videos_are_said() -> None:
    infos = {
        "a.mp4": MediaInfo(16, 8, 64, 64),
        "b.mp4": MediaInfo(17, 8, 64, 64),
        "c.mp4": MediaInfo(1, 8, 64, 64),
        "d.png": MediaInfo(1, 0, 31, 48),
    }
    assert plan(infos).warnings == [
        "2 videos are shorter than data.frames=17 and used at fewer: a.mp4 (13), c.mp4 (1)"
    ]


def test_large_crops_are_said() -> None:
    infos = {f"{i}.png": MediaInfo(1, 0, 128, 128) for i in range(9)}
    infos["wide.png"] = MediaInfo(1, 0, 128, 256)
    assert plan(infos).warnings == []
    assert plan(infos, replace(SETTINGS, max_buckets=1)).warnings == [
        "more than 25% of the picture is cropped: wide.png (50%)"
    ]


def test_merged_buckets_keep_every_clip() -> None:
    infos = {
        **{f"{i}.mp4": MediaInfo(17, 8, 128, 128) for i in range(5)},
        "wide.mp4": MediaInfo(17, 8, 112, 160),
        "short.mp4": MediaInfo(13, 8, 128, 128),
        "tiny.mp4": MediaInfo(17, 8, 16, 16),
    }
    whole = plan(infos)
    assert len(describe_buckets(whole.clips)) == 4
    merged = plan(infos, replace(SETTINGS, max_buckets=3))
    assert [clip.item for clip in merged.clips] == [clip.item for clip in whole.clips]
    assert describe_buckets(merged.clips) == [
        (Bucket(13, 64, 64), 1),
        (Bucket(17, 16, 16), 1),
        (Bucket(17, 64, 64), 6),
    ]


def test_scales_that_meet_in_a_bucket_give_one_clip() -> None:
    scaled = replace(SETTINGS, scales=(1.0, 0.5))
    infos = {"a.mp4": MediaInfo(17, 8, 128, 128), "b.mp4": MediaInfo(17, 8, 128, 128)}
    assert len(plan(infos, scaled).clips) == 4
    merged = plan(infos, replace(scaled, max_buckets=1)).clips
    assert [(clip.item.name, clip.bucket) for clip in merged] == [
        ("a.mp4", Bucket(17, 32, 32)),
        ("b.mp4", Bucket(17, 32, 32)),
    ]
