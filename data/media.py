"""Files become frames: what a video or an image holds, the frames of a clip, and its mask.

Videos are decoded by decord, which applies the rotation that phones write; images, and GIFs, in
which decord finds no duration, by Pillow. Of an animated webp or png the first frame is used.
"""

import io
import shlex
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, ImageSequence
from torch import Tensor
from torch.nn.functional import avg_pool2d

from data.buckets import Clip
from data.items import DataError, Kind, MediaInfo, kind_of, printable

BACKGROUND = "white"  # behind what is transparent
TIE_SECONDS = 1e-3  # mkv and webm round timestamps to milliseconds
GIF_DEFAULT_MS = 100  # what browsers do with a GIF frame of no duration
RATE_TOLERANCE = 0.02  # between a header's frame rate and the timestamps
MASK_SHAPE_TOLERANCE = 0.02  # between the aspect ratios of a video and its mask
BLACK = 0.02  # what a codec may leave of black
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What decord and Pillow raise for a file that they cannot read.
UNREADABLE = (
    decord.DECORDError, RuntimeError, IndexError,
    OSError, SyntaxError, ValueError, EOFError, struct.error, *TOO_LARGE,
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """An open file: `times` in seconds of each frame from the first, and how to decode some."""

    times: np.ndarray
    fps: float
    decode: Callable[[Sequence[int]], Iterable[Image.Image]]


def probe(path: Path, kind: Kind, name: str) -> MediaInfo:
    """What the file holds. Decodes its first and last frame: `DataError` if it cannot be read.

    `name` is for the message, which begins with it.
    """
    with _readable(path, kind, name):
        source = _open(path, kind)
        first, _ = source.decode([0, len(source.times) - 1])
    return MediaInfo(len(source.times), source.fps, first.height, first.width)


def read_clip(clip: Clip) -> Tensor:
    """The frames of a clip, uint8 (T, H, W, 3), at the shape of its bucket.

    Antialiased resize to cover the bucket, then the centre. `DataError` if the file cannot be read.
    """
    item, size = clip.item, (clip.bucket.width, clip.bucket.height)
    with _readable(item.path, item.kind, item.name):
        source = _open(item.path, item.kind)
        frames = [
            np.asarray(ImageOps.fit(frame, size, Image.Resampling.BICUBIC))
            for frame in source.decode(frame_indices(source.times, clip))
        ]
    return torch.from_numpy(np.stack(frames))


def read_mask(clip: Clip, time_stride: int, space_stride: int) -> Tensor:
    """How much of each latent of a clip is to be learned, float32 (F, h, w), from 0 = ignore to 1.

    The luminance of the item's mask at the instants of the clip's frames, resized and cropped as
    they are, averaged over the pixels that make a latent: `space_stride` squared, of the first
    frame, then of `time_stride` frames each. `DataError` if it does not fit its video or is black.
    """
    item, size = clip.item, (clip.bucket.width, clip.bucket.height)
    assert item.mask is not None, f"{item.name} has no mask"
    name = f"{item.name}: its mask {printable(item.mask.name)}"
    kind = kind_of(item.mask) or "image"
    with _readable(item.path, item.kind, item.name):
        source = _open(item.path, item.kind)
        indices = frame_indices(source.times, clip)
        (shown,) = source.decode(indices[:1])
    with _readable(item.mask, kind, name):
        mask = _open(item.mask, kind)
        used = _nearest(mask.times, source.times[indices])
        pictures = [frame.convert("L") for frame in mask.decode(used)]
    _check_shape(name, pictures[0], shown)
    _check_length(name, mask, float(source.times[indices[-1]]))
    fitted = [np.asarray(ImageOps.fit(p, size, Image.Resampling.BILINEAR)) for p in pictures]
    weights = _of_latents(torch.from_numpy(np.stack(fitted)) / 255, time_stride, space_stride)
    if weights.max() < BLACK:
        raise DataError(
            f"{name} masks everything: it is black wherever it covers the clip (from "
            f"{clip.start:g} s); paint white what is to be learned, or remove the mask"
        )
    return weights


def frame_indices(times: np.ndarray, clip: Clip) -> list[int]:
    """Which frames of a file, shown at `times` in seconds, make the clip; none after its window."""
    steps = np.arange(clip.bucket.frames)
    if clip.policy == "keep":
        (first,) = _nearest(times, np.array([clip.start]))
        return (steps + min(first, len(times) - len(steps))).tolist()
    after = np.searchsorted(times, clip.start + len(steps) / clip.fps - TIE_SECONDS)
    nearest = _nearest(times, clip.start + steps / clip.fps)
    return np.minimum(nearest, max(int(after) - 1, 0)).tolist()


def _nearest(times: np.ndarray, instants: np.ndarray) -> list[int]:
    """The frame nearest to each instant; halfway, and whatever the rounding, the earlier one."""
    return np.searchsorted((times[1:] + times[:-1]) / 2, instants - TIE_SECONDS).tolist()


def _check_shape(name: str, mask: Image.Image, shown: Image.Image) -> None:
    ratio = mask.width * shown.height / (mask.height * shown.width)
    if abs(ratio - 1) > MASK_SHAPE_TOLERANCE:
        raise DataError(
            f"{name} is {mask.height}x{mask.width} (height x width) and what it covers is "
            f"{shown.height}x{shown.width}; give a mask of the same shape, in any size"
        )


def _check_length(name: str, mask: _Source, last: float) -> None:
    if mask.fps and mask.times[-1] + 1 / mask.fps < last - TIE_SECONDS:
        raise DataError(
            f"{name} ends after {mask.times[-1] + 1 / mask.fps:.2f} s, and a frame at {last:.2f} s "
            "is used of its video; give a mask as long as the video, or an image for all frames"
        )


def _of_latents(weights: Tensor, time_stride: int, space_stride: int) -> Tensor:
    """Means (F, h, w) of the pixels (T, H, W) that make each latent."""
    weights = avg_pool2d(weights[:, None], space_stride)[:, 0]  # (T, h, w)
    groups = (len(weights) - 1) // time_stride
    later = weights[1:].reshape(groups, time_stride, *weights.shape[1:])
    return torch.cat([weights[:1], later.mean(dim=1)])


def _open(path: Path, kind: Kind) -> _Source:
    if kind == "image":
        picture = _open_picture(path)
        return _Source(np.zeros(1), 0.0, lambda indices: [picture for _ in indices])
    return _open_gif(path) if path.suffix.lower() == ".gif" else _open_video(path)


def _open_picture(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns above 89 million pixels. They would take a GB in each worker.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _flatten(image)


def _open_video(path: Path) -> _Source:
    decord.logging.set_level(decord.logging.QUIET)  # our own error says it once, and in words
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    shown = reader.get_frame_timestamp(range(len(reader)))  # (T, 2): from, to
    # The header's rate is exact, but wrong for a variable rate; the timestamps are rounded.
    fps, seconds = float(reader.get_avg_fps()), float(shown[-1, 1] - shown[0, 0])
    if seconds > 0 and not abs(fps * seconds / len(shown) - 1) <= RATE_TOLERANCE:  # or NaN
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


def _open_gif(path: Path) -> _Source:
    with Image.open(path) as image:
        durations = [
            frame.info.get("duration") or GIF_DEFAULT_MS for frame in ImageSequence.Iterator(image)
        ]

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        with Image.open(path) as image:
            for index, repeats in groupby(indices):
                image.seek(index)
                frame = _flatten(image)
                yield from (frame for _ in repeats)

    times = (np.cumsum(durations) - durations) / 1000
    return _Source(times, 1000 * len(durations) / float(sum(durations)), decode)


def _flatten(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, on `BACKGROUND` where it is transparent."""
    if image.mode in ("I", "F"):
        raise DataError(
            f"holds 32 bits a pixel (mode {image.mode}), of which nothing says how many are white; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow would clip the 16 bits of grey, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "CMYK":
        return _of_inks(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, BACKGROUND)
    canvas.paste(image, mask=image)
    return canvas


def _of_inks(image: Image.Image) -> Image.Image:
    """A CMYK picture in RGB, by its colour profile if it has one that works."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB")
        assert converted is not None  # only an inPlace conversion returns None
        return converted
    return image.convert("RGB")


@contextmanager
def _readable(path: Path, kind: Kind, name: str) -> Iterator[None]:
    """Turn what the decoders raise for a damaged file into a `DataError` with the mend."""
    try:
        yield
    except DataError as problem:
        raise DataError(f"{name}: {problem}") from problem
    except UNREADABLE as error:
        raise DataError(f"{name}: {_found(path, kind, error)}") from error


def _found(path: Path, kind: Kind, error: Exception) -> str:
    """What is wrong with a file that could not be decoded, and what to do."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as refused:
        return f"cannot be opened ({refused.strerror}); restore it, or remove it and its caption"
    if not head:
        return "is empty (0 bytes); copy it again, or remove it and its caption"
    if head.isascii() and b"\0" not in head:
        return f"holds text ({head[:20].decode()!r}), no {kind}; replace it, or remove it"
    quoted = shlex.quote(printable(str(path)))
    if isinstance(error, TOO_LARGE):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return (
            f"has more than {limit} million pixels; make it smaller with `ffmpeg -i {quoted} -vf "
            "scale=4096:-1 fixed.png` and put the result in its place"
        )
    if "cannot find video stream" in str(error):
        found = "holds no video stream that decord can decode (it has no AV1)"
    else:
        reason = " ".join(str(error).split("\n\n")[0].split())[-60:]
        found = f"is damaged or cut short (the decoder ends with: {reason})"
    fixed = "fixed.mp4" if kind == "video" else "fixed.png"
    return (
        f"{found}; replace it, or re-encode what is left with `ffmpeg -i {quoted} {fixed}` and put "
        "the result in its place"
    )
