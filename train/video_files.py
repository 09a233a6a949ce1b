"""Videos as mp4 files, alone or side by side, and as a PNG sheet that shows motion at a glance."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALL = 192  # pixels: smaller videos are enlarged by whole factors where people look at them
LABEL_HEIGHT = 18
SHEET_FRAMES = 5
CRF = "12"  # x264 quality: visually lossless


def write_mp4(path: Path, video: np.ndarray, fps: int, comment: str | None = None) -> None:
    """Write uint8 (T, H, W, 3) as H.264; the file appears only when it is whole.

    `comment` is kept in its metadata. `OSError` if the disk did not keep it.
    """
    frames, height, width, _ = video.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part.mp4")
    metadata = [] if comment is None else ["-metadata", f"comment={comment}"]
    writer = imageio_ffmpeg.write_frames(
        str(partial),
        (width, height),
        fps=fps,
        codec="libx264",
        macro_block_size=2,
        output_params=["-crf", CRF, "-movflags", "+faststart", *metadata],
    )
    with suppress(OSError):  # the encoder has ended: it is looked at what there is
        writer.send(None)
        for frame in range(frames):
            writer.send(np.ascontiguousarray(video[frame]))
    writer.close()
    if _frames_of(partial) != frames:  # it does not say that its disk was full
        partial.unlink(missing_ok=True)
        raise OSError(f"{path.name} was not kept whole; is the disk full?")
    os.replace(partial, path)


def _frames_of(video: Path) -> int:
    """How many frames can be read; 0 of what is no video."""
    try:
        return imageio_ffmpeg.count_frames_and_secs(video)[0] or 0
    except (RuntimeError, OSError):
        return 0


def side_by_side(videos: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Videos of one shape beside each other, each under its label, large enough to look at."""
    enlarged = [_enlarge(video) for video in videos]
    width = enlarged[0].shape[2]
    bar = Image.new("RGB", (width * len(videos), LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(bar)
    for column, label in enumerate(labels):
        draw.text((column * width + 4, 2), label, fill="black", font=_font())
    body = np.concatenate(enlarged, axis=2)  # (T, H, n W, 3)
    top = np.broadcast_to(np.asarray(bar), (len(body), *np.asarray(bar).shape))
    return np.concatenate([top, body], axis=1)


def write_sheet(
    path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]
) -> None:
    """One PNG: a row for each prompt, and in it a few frames of each video, columns labelled."""
    strips = []
    for title, videos in rows:
        strip = np.concatenate([_film_strip(_enlarge(video)) for video in videos], axis=1)
        strips += [_text_bar(title, strip.shape[1]), strip]
    width = strips[1].shape[1]
    head = np.concatenate([_text_bar(name, width // len(columns)) for name in columns], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate([head, *strips])
    partial = path.with_name(f".{path.name}.part.png")
    Image.fromarray(sheet).save(partial)
    os.replace(partial, path)


def _film_strip(video: np.ndarray) -> np.ndarray:
    chosen = np.linspace(0, len(video) - 1, min(SHEET_FRAMES, len(video))).round().astype(int)
    strip = np.concatenate(list(video[chosen]), axis=1)
    return np.pad(strip, ((0, 0), (0, 6), (0, 0)), constant_values=255)


def _text_bar(text: str, width: int) -> np.ndarray:
    bar = Image.new("RGB", (width, LABEL_HEIGHT), "white")
    ImageDraw.Draw(bar).text((4, 2), text, fill="black", font=_font())
    return np.asarray(bar)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _enlarge(video: np.ndarray) -> np.ndarray:
    factor = -(-SMALL // min(video.shape[1:3]))
    return video.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else video
