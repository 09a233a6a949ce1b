"""Files become frames: what a video or an image holds, and the frames of a clip.

Videos are decoded by decord; images, and GIFs, in which decord finds no duration, by Pillow.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import decord
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from data.buckets import Clip
from data.sources import DataError, Item, MediaInfo, raise_problems

TIE_SECONDS = 1e-3  # mkv and webm round timestamps to milliseconds
GIF_DEFAULT_MS = 100  # what browsers do with a GIF frame of no duration
RATE_TOLERANCE = 0.02  # between a header's frame rate and the timestamps
# What decord and Pillow raise for a damaged file.
UNREADABLE = (
    decord.DECORDError, RuntimeError, IndexError,
    OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """An open file: `times` in seconds of each frame from the first, and how to decode some."""

    times: np.ndarray
    fps: float
    decode: Callable[[Sequence[int]], Iterable[Image.Image]]


def probe(item: Item) -> MediaInfo:
    """What the file holds. Decodes its first and last frame: `DataError` if it cannot be read."""
    with _readable(item):
        source = _open(item)
        first, _ = source.decode([0, len(source.times) - 1])
    return MediaInfo(len(source.times), source.fps, first.height, first.width)


def probe_all(items: Sequence[Item]) -> list[MediaInfo]:
    """What each file holds; one `DataError` names all that cannot be read."""
    infos, problems = [], []
    for item in items:
        try:
            infos.append(probe(item))
        except DataError as problem:
            problems.append(str(problem))
    raise_problems("the dataset", problems)
    return infos


def read_clip(clip: Clip) -> Tensor:
    """The frames of a clip, uint8 (T, H, W, 3), at the shape of its bucket.

    Antialiased resize to cover the bucket, then the centre. `DataError` if the file cannot be read.
    """
    size = (clip.bucket.width, clip.bucket.height)
    with _readable(clip.item):
        source = _open(clip.item)
        frames = [
            np.asarray(ImageOps.fit(frame, size, Image.Resampling.BICUBIC))
            for frame in source.decode(frame_indices(source.times, clip))
        ]
    return torch.from_numpy(np.stack(frames))


def frame_indices(times: np.ndarray, clip: Clip) -> list[int]:
    """Which frames of a file, shown at `times` in seconds, make the clip."""
    middles = (times[1:] + times[:-1]) / 2  # between two of them, one frame is the nearest
    steps = np.arange(clip.bucket.frames)
    if clip.policy == "keep":
        first = int(np.searchsorted(middles, clip.start - TIE_SECONDS))
        return (steps + min(first, len(times) - len(steps))).tolist()
    # Halfway between two frames the earlier one is taken, whatever the rounding of timestamps.
    return np.searchsorted(middles, clip.start + steps / clip.fps - TIE_SECONDS).tolist()


def _open(item: Item) -> _Source:
    if item.kind == "image":
        with Image.open(item.path) as image:
            picture = _flatten(ImageOps.exif_transpose(image))
        return _Source(np.zeros(1), 0.0, lambda indices: [picture for _ in indices])
    return _open_gif(item) if item.path.suffix.lower() == ".gif" else _open_video(item)


def _open_video(item: Item) -> _Source:
    decord.logging.set_level(decord.logging.QUIET)  # our own error says it once, and in words
    reader = decord.VideoReader(str(item.path), ctx=decord.cpu(0), num_threads=1)
    shown = reader.get_frame_timestamp(range(len(reader)))  # (T, 2): from, to
    # The header's rate is exact, but wrong for a variable rate; the timestamps are rounded.
    fps, seconds = float(reader.get_avg_fps()), float(shown[-1, 1] - shown[0, 0])
    if seconds > 0 and abs(fps * seconds / len(shown) - 1) > RATE_TOLERANCE:
        fps = len(shown) / seconds

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        for index, repeats in groupby(indices):  # to read a frame again, decord would seek back
            pixels = reader[index].asnumpy()
            height, width, _ = pixels.shape
            # Of frames 16, 24, 48 or 72 wide, decord takes the padding of rows for more channels
            # (and its get_batch fails).
            rows = pixels.reshape(height, -1)[:, : 3 * width]
            frame = Image.fromarray(rows.reshape(height, width, 3))
            yield from (frame for _ in repeats)

    return _Source(shown[:, 0] - shown[0, 0], fps, decode)


def _open_gif(item: Item) -> _Source:
    pictures, durations = [], []
    with Image.open(item.path) as image:
        for frame in ImageSequence.Iterator(image):
            durations.append(frame.info.get("duration") or GIF_DEFAULT_MS)
            pictures.append(_flatten(frame))
    times = (np.cumsum(durations) - durations) / 1000
    fps = 1000 * len(durations) / float(sum(durations))
    return _Source(times, fps, lambda indices: [pictures[i] for i in indices])


def _flatten(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, on white where it is transparent."""
    if image.mode.startswith("I;16"):  # Pillow would clip the 16 bits of grey, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@contextmanager
def _readable(item: Item) -> Iterator[None]:
    """Turn what the decoders raise for a damaged file into a `DataError` with the mend."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{item.name}: {_found(item, error)}") from error


def _found(item: Item, error: Exception) -> str:
    """What is wrong with a file that could not be decoded, and what to do."""
    try:
        with item.path.open("rb") as file:
            head = file.read(256)
    except OSError as refused:
        return f"cannot be opened ({refused.strerror}); restore it, or remove it and its caption"
    if not head:
        return "is empty (0 bytes); copy it again, or remove it and its caption"
    if head.isascii() and b"\0" not in head:
        return f"holds text ({head[:20].decode()!r}), no {item.kind}; replace it, or remove it"
    if "cannot find video stream" in str(error):
        found = "holds no video stream that decord can decode (it has no AV1)"
    else:
        reason = " ".join(str(error).split("\n\n")[0].split())[-60:]
        found = f"is damaged or cut short (the decoder ends with: {reason})"
    fixed = "fixed.mp4" if item.kind == "video" else "fixed.png"
    return (
        f"{found}; replace it, or re-encode what is left with `ffmpeg -i "
        f"{shlex.quote(str(item.path))} {fixed}` and put the result in its place"
    )
