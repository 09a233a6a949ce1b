"""Shapes: which window of an item is used, and at which frames x height x width."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.sources import DataError, Item, MediaInfo, raise_problems

Policy = Literal["resample", "keep", "error"]
Extraction = Literal["head", "middle"]

FPS_TOLERANCE = 0.01  # "error": 23.976 passes as 24, 25 does not
# A frame that is missing by less than this share counts as there: containers round timestamps.
FRAME_TOLERANCE = 0.05


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a clip in pixels; clips of one bucket can share a batch."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """One window of an item, at the shape of its bucket.

    "resample": frames at `start`, `start` + 1/`fps`, ... seconds, each the nearest of the source.
    "keep": the source's own frames in a row, from the one nearest to `start`.
    """

    item: Item
    bucket: Bucket
    start: float  # seconds from the first frame
    fps: float  # 0 for an image
    policy: Literal["resample", "keep"]


@dataclass(frozen=True)
class ClipSettings:
    """How items are cut into clips; `multiple` and `time_stride` are the model's geometry.

    `resolution` (height, width) is an area to fill, of any aspect ratio. `policy` says what happens
    to a video of other than `fps` frames a second: "resample" drops or repeats frames and keeps its
    speed, "keep" takes its frames as they are, "error" refuses it.
    """

    resolution: tuple[int, int]
    frames: int
    fps: float
    policy: Policy
    multiple: int
    time_stride: int
    extraction: Extraction


def available_frames(info: MediaInfo, fps: float, policy: Policy) -> int:
    """How many frames a file yields under the fps policy."""
    if info.fps == 0 or policy != "resample":
        return info.frames
    return max(1, int(info.frames * fps / info.fps + FRAME_TOLERANCE))


def choose_bucket(
    info: MediaInfo,
    resolution: tuple[int, int],
    frames: int,
    fps: float,
    policy: Policy,
    multiple: int,
    time_stride: int,
) -> Bucket:
    """The shape at which a file is used; see `choose_size` for height and width.

    The frames are the most of the form `time_stride` * n + 1 that the file has, up to `frames`.
    """
    usable = min(frames, available_frames(info, fps, policy))
    height, width = choose_size(info.height, info.width, resolution[0] * resolution[1], multiple)
    return Bucket((usable - 1) // time_stride * time_stride + 1, height, width)


def choose_size(height: int, width: int, area: int, multiple: int) -> tuple[int, int]:
    """The height and width, multiples of `multiple`, that show a source of `height` x `width` best.

    Of all pairs (h, w) within `area` that need no upscaling, the one of the largest
    min(h / height, w / width), which weighs a crop against a smaller picture; of equals, the one
    that crops least. So 16:9 gets 480x832 at that area (2.5 % cropped), not 432x768 (nothing
    cropped, 17 % fewer pixels). `DataError` for a source below one multiple.
    """
    best = (0, 0, 0, 0)
    for w in range(multiple, width + 1, multiple):
        enough = -(-w * height // (width * multiple)) * multiple  # more rows would crop columns
        h = min(enough, area // w // multiple * multiple, height // multiple * multiple)
        # Times height * width, to compare in integers.
        best = max(best, (min(h * width, w * height), -max(h * width, w * height), h, w))
    if best[0] == 0:
        raise DataError(
            f"is {height}x{width} (height x width), and the least that fits the model is "
            f"{multiple}x{multiple}; remove it or give a larger one"
        )
    return best[2], best[3]


def plan_clips(
    items: Sequence[Item], infos: Sequence[MediaInfo], settings: ClipSettings
) -> list[Clip]:
    """The clips of the items, in their order; `DataError` names all items that cannot be used."""
    clips, problems = [], []
    for item, info in zip(items, infos, strict=True):
        try:
            clips.append(_plan_clip(item, info, settings))
        except DataError as problem:
            problems.append(f"{item.name}: {problem}")
    raise_problems("the dataset", problems)
    return clips


def _plan_clip(item: Item, info: MediaInfo, settings: ClipSettings) -> Clip:
    fps, policy = settings.fps, settings.policy
    if policy == "error" and info.fps and abs(info.fps / fps - 1) > FPS_TOLERANCE:
        raise DataError(
            f"has {info.fps:g} frames a second and {fps:g} are wanted; convert it, or set the fps "
            "policy to resample (same speed) or keep (frames as they are)"
        )
    bucket = choose_bucket(
        info, settings.resolution, settings.frames, fps, policy,
        settings.multiple, settings.time_stride,
    )  # fmt: skip
    if policy == "resample" and info.fps:
        spare = available_frames(info, fps, policy) - bucket.frames
        return Clip(item, bucket, _first(spare, settings) / fps, fps, "resample")
    start = _first(info.frames - bucket.frames, settings) / info.fps if info.fps else 0.0
    return Clip(item, bucket, start, info.fps, "keep")


def _first(spare: int, settings: ClipSettings) -> int:
    """The first frame of a window that leaves `spare` frames of its file."""
    return spare // 2 if settings.extraction == "middle" else 0


def describe_buckets(clips: Sequence[Clip]) -> list[tuple[Bucket, int]]:
    """The buckets in use, smallest first, with the number of clips in each."""
    return sorted(Counter(clip.bucket for clip in clips).items())
