"""Shapes of clips: the best for a source, what it crops, and fewer shapes from many."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.items import DataError, MediaInfo


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a clip in pixels; clips of one bucket can share a batch."""

    frames: int
    height: int
    width: int


@lru_cache(maxsize=4096)  # few sizes, many files
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


def cropped_share(info: MediaInfo, bucket: Bucket) -> float:
    """The share of the picture that is cut off when it covers the bucket."""
    scale = max(bucket.height / info.height, bucket.width / info.width)
    return 1 - bucket.height * bucket.width / (scale**2 * info.height * info.width)


def merge_buckets(
    groups: Mapping[tuple[Bucket, int, int], int], most: int, upscale: bool
) -> dict[tuple[Bucket, int, int], Bucket]:
    """Where the clips of each (bucket, height and width of the source) go to leave `most` buckets.

    `groups` counts them. Again and again the bucket is dissolved whose clips lose the least pixels
    when each moves to the best of the others: one of no more frames that needs no upscaling (unless
    `upscale`); a video becomes a still only if there is nothing else. If not enough buckets can be
    dissolved, as few as possible are left.
    """
    keys = sorted(groups)
    buckets = sorted({bucket for bucket, _, _ in keys})
    shapes = np.array([(b.frames, b.height, b.width) for b in buckets]).T
    number = {bucket: i for i, bucket in enumerate(buckets)}
    place = np.array([number[bucket] for bucket, _, _ in keys])  # where each group is
    best, lost = np.zeros(len(keys), int), np.zeros(len(keys))  # its move, and the pixels it costs
    left = np.ones(len(buckets), bool)

    def find_moves(rows: Iterable[int]) -> None:
        for row in rows:
            worth = np.where(left, _worth(*keys[row], shapes, upscale), -np.inf)
            at_present, worth[place[row]] = worth[place[row]], -np.inf
            best[row] = worth.argmax()
            lost[row] = groups[keys[row]] * (at_present - worth[best[row]])

    find_moves(range(len(keys)))
    while left.sum() > most:
        losses = np.where(left, np.bincount(place, lost, len(buckets)), np.inf)
        weakest = int(losses.argmin())
        if np.isinf(losses[weakest]):
            break
        left[weakest] = False
        moving = place == weakest
        place[moving] = best[moving]
        find_moves(np.flatnonzero(moving | (best == weakest)))
    return {key: buckets[i] for key, i in zip(keys, place, strict=True)}


def _worth(home: Bucket, height: int, width: int, shapes: np.ndarray, upscale: bool) -> np.ndarray:
    """How many pixels show what is seen of a source in each of `shapes` (3, B); -inf: impossible.

    A picture is weighed as in `choose_size`: by the smaller of its two scales.
    """
    frames, h, w = shapes
    scale = np.minimum(h / height, w / width)
    # A larger scale than that of its own would only repeat what another clip of it shows.
    possible = (frames <= home.frames) & (scale <= min(home.height / height, home.width / width))
    if not upscale:
        possible &= (h <= height) & (w <= width)
    worth = scale**2 * height * width * np.where((frames == 1) & (home.frames > 1), 1e-9, frames)
    return np.where(possible, worth, -np.inf)
