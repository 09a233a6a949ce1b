"""Shapes: which windows of an item are used, and at which frames x height x width."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.items import DataError, Dropped, Item, MediaInfo
from data.shapes import Bucket, choose_size, cropped_share, merge_buckets

Policy = Literal["resample", "keep", "error"]
Extraction = Literal["head", "middle", "uniform", "sliding", "full"]

FPS_TOLERANCE = 0.01  # 23.976 passes as 24, 25 does not
# A frame that is missing by less than this share counts as there: containers round timestamps.
FRAME_TOLERANCE = 0.05
MUCH_CROPPED = 0.25  # share of the picture
LISTED_NAMES = 5


@dataclass(frozen=True)
class Clip:
    """One window of an item, at the shape of its bucket.

    "resample": frames at `start`, `start` + 1/`fps`, ... seconds, each the nearest of the source.
    "keep": the source's own frames in a row, from the one nearest to `start`.
    """

    item: Item
    bucket: Bucket
    start: float  # seconds from the first frame of the file
    fps: float  # 0 for an image
    policy: Literal["resample", "keep"]


@dataclass(frozen=True)
class ClipSettings:
    """How items are cut into clips; `multiple` and `time_stride` are the model's geometry.

    `resolution` (height, width) is an area to fill, of any aspect ratio. `policy` says what happens
    to a video of other than `fps` frames a second: "resample" drops or repeats frames and keeps its
    speed, "keep" takes its frames as they are, "error" refuses it.

    A window has the most frames of the form `time_stride` * n + 1 that the file has, up to
    `frames`. `extraction` says which windows: "head" the first; "middle"; "uniform" `windows` of
    them from the first to the last, fewer where they would coincide; "sliding" one every `stride`
    frames; "full" one after the other, and what is left as a shorter one if that has a second
    latent frame. Frames of the tail that fill no window are not used.
    """

    resolution: tuple[int, int]
    frames: int
    fps: float
    policy: Policy
    multiple: int
    time_stride: int
    extraction: Extraction
    scales: tuple[float, ...] = (1.0,)  # every item at each of these sizes (of height and width)
    windows: int = 1  # of each file, if "uniform"
    stride: int = 0  # frames from one window to the next, if "sliding"
    upscale: bool = False  # enlarge what is smaller than the resolution
    max_buckets: int | None = None  # merge shapes until so many are left


@dataclass(frozen=True)
class _Planned:
    """One item: what its file holds, and its clips."""

    info: MediaInfo
    clips: list[Clip]


@dataclass(frozen=True)
class ClipPlan:
    """The clips of a dataset, what is not used of it, and what its owner may want to change."""

    clips: list[Clip]
    dropped: list[Dropped]
    warnings: list[str]


def plan_clips(
    items: Sequence[Item], infos: Sequence[MediaInfo], settings: ClipSettings
) -> ClipPlan:
    """The clips of the items, in their order; an item that cannot be used is dropped and said."""
    planned: list[_Planned] = []
    dropped = []
    for item, info in zip(items, infos, strict=True):
        try:
            planned.append(_Planned(info, _clips_of(item, info, settings)))
        except DataError as problem:
            dropped.append(Dropped(item.name, str(problem)))
    warnings = [*_speed_warnings(planned, settings), *_length_warnings(planned, settings)]
    if settings.max_buckets is not None:
        planned = _merge(planned, settings.max_buckets, settings.upscale)
    warnings += _crop_warnings(planned)
    return ClipPlan([clip for plan in planned for clip in plan.clips], dropped, warnings)


def describe_buckets(clips: Sequence[Clip]) -> list[tuple[Bucket, int]]:
    """The buckets in use, smallest first, with the number of clips in each."""
    return sorted(Counter(clip.bucket for clip in clips).items())


def _clips_of(item: Item, info: MediaInfo, settings: ClipSettings) -> list[Clip]:
    if settings.policy == "error" and info.fps and abs(info.fps / settings.fps - 1) > FPS_TOLERANCE:
        raise DataError(
            f"has {info.fps:g} frames a second and {settings.fps:g} are wanted; convert it, or set "
            "data.fps_policy to resample (same speed) or keep (frames as they are)"
        )
    begin, end = _used_frames(item, info)
    resampled = settings.policy == "resample" and info.fps > 0
    fps = settings.fps if resampled else info.fps
    yielded = (end - begin) * fps / info.fps if resampled else end - begin
    available = max(1, int(yielded + FRAME_TOLERANCE))
    earliest = begin / info.fps if info.fps else 0.0
    return [
        Clip(
            item,
            Bucket(frames, height, width),
            earliest + (first / fps if fps else 0.0),
            fps,
            "resample" if resampled else "keep",
        )
        for height, width in _sizes_of(info, settings)
        for first, frames in _windows_of(available, settings)
    ]


def _used_frames(item: Item, info: MediaInfo) -> tuple[int, int]:
    """The frames of the file from the item's start to its end: (first, first after them)."""
    begin, end = 0, info.frames
    if info.fps and item.start is not None:
        begin = max(0, math.ceil(item.start * info.fps - FRAME_TOLERANCE))
    if info.fps and item.end is not None:
        end = min(end, math.ceil(item.end * info.fps - FRAME_TOLERANCE))
    if begin >= end:
        lasts = f"lasts {info.frames / info.fps:.2f} s and nothing of it is"
        if item.end is None:
            raise DataError(f"{lasts} after start={item.start:g}; correct it")
        raise DataError(f"{lasts} from start={item.start or 0:g} to end={item.end:g}; correct them")
    return begin, end


def _sizes_of(info: MediaInfo, settings: ClipSettings) -> list[tuple[int, int]]:
    """The height and width at each scale; a small source may have the same at several: once."""
    sizes = []
    for scale in settings.scales:
        area = round(math.prod(settings.resolution) * scale**2)
        enlarged = 1
        if settings.upscale and info.height * info.width < area:
            enlarged = math.ceil(math.sqrt(area / (info.height * info.width))) + 1
        sizes.append(
            choose_size(info.height * enlarged, info.width * enlarged, area, settings.multiple)
        )
    return list(dict.fromkeys(sizes))


def _windows_of(available: int, settings: ClipSettings) -> list[tuple[int, int]]:
    """(first frame, length) of each window of a file that yields so many frames."""
    longest = _latent_length(min(settings.frames, available), settings)
    spare = available - longest
    match settings.extraction:
        case "head":
            firsts = [0]
        case "uniform" if settings.windows > 1:
            last = settings.windows - 1
            firsts = sorted({round(spare * i / last) for i in range(settings.windows)})
        case "middle" | "uniform":
            firsts = [spare // 2]
        case "sliding":
            firsts = range(0, spare + 1, settings.stride)
        case "full":
            firsts = range(0, spare + 1, longest)
    windows = [(first, longest) for first in firsts]
    if settings.extraction == "full":
        rest = available - len(windows) * longest
        if rest > settings.time_stride:
            windows.append((available - rest, _latent_length(rest, settings)))
    return windows


def _latent_length(frames: int, settings: ClipSettings) -> int:
    return (frames - 1) // settings.time_stride * settings.time_stride + 1


def _merge(planned: Sequence[_Planned], most: int, upscale: bool) -> list[_Planned]:
    def key(clip: Clip, info: MediaInfo) -> tuple[Bucket, int, int]:
        return clip.bucket, info.height, info.width

    groups = Counter(key(clip, plan.info) for plan in planned for clip in plan.clips)
    moved = merge_buckets(groups, most, upscale)
    merged = []
    for plan in planned:
        clips = [replace(clip, bucket=moved[key(clip, plan.info)]) for clip in plan.clips]
        merged.append(_Planned(plan.info, list(dict.fromkeys(clips))))  # two scales may meet
    return merged


def _speed_warnings(planned: Sequence[_Planned], settings: ClipSettings) -> list[str]:
    """Of each frame rate that is not the model's: which videos look slower, faster or jerky."""
    by_fps: dict[str, list[str]] = {}
    for plan in planned:
        moves = max(clip.bucket.frames for clip in plan.clips) > 1
        if moves and abs(plan.info.fps / settings.fps - 1) > FPS_TOLERANCE:
            by_fps.setdefault(f"{plan.info.fps:.3g}", []).append(plan.clips[0].item.name)
    lines = []
    for fps, names in by_fps.items():
        ratio = settings.fps / float(fps)
        found = (
            f"{_listed(names)}: {fps} frames a second are shown to the model as {settings.fps:g}"
        )
        if settings.policy == "keep":
            speed = f"{ratio:.3g} times faster" if ratio > 1 else f"{1 / ratio:.3g} times slower"
            lines.append(f"{found}: motion looks {speed}; data.fps_policy=resample keeps the speed")
        elif ratio > 1:
            times = "twice" if ratio == 2 else f"{ratio:.3g} times on average"
            lines.append(f"{found}: each frame is shown {times}")
    return lines


def _length_warnings(planned: Sequence[_Planned], settings: ClipSettings) -> list[str]:
    short = []
    for plan in planned:
        longest = max(clip.bucket.frames for clip in plan.clips)
        if plan.info.fps and longest < settings.frames:
            short.append(f"{plan.clips[0].item.name} ({longest})")
    if not short:
        return []
    count = f"{len(short)} {'video is' if len(short) == 1 else 'videos are'}"
    frames = f"data.frames={settings.frames}"
    return [f"{count} shorter than {frames} and used at fewer: {_listed(short)}"]


def _crop_warnings(planned: Sequence[_Planned]) -> list[str]:
    shares = [
        (max(cropped_share(plan.info, clip.bucket) for clip in plan.clips), plan.clips[0].item.name)
        for plan in planned
    ]
    much = [f"{name} ({share:.0%})" for share, name in sorted(shares)[::-1] if share > MUCH_CROPPED]
    if not much:
        return []
    return [f"more than {MUCH_CROPPED:.0%} of the picture is cropped: {_listed(much)}"]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED_NAMES
    return ", ".join(names[:LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")
