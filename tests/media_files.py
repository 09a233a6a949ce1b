"""Small real videos for tests, made with ffmpeg."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from data.items import Item, MediaInfo, kind_of
from data.media import probe

STEP = 5  # brightness added by each frame, so that a frame's number can be read from it


def make_item(path: Path) -> Item:
    kind = kind_of(path)
    assert kind is not None
    return Item(path, ("a caption",), kind, path.name)


def probe_item(item: Item) -> MediaInfo:
    return probe(item.path, item.kind, item.name)


def ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-threads", "1"]
    subprocess.run([*command, *map(str, arguments)], input=stdin, check=True)


def make_video(path: Path, frames: int, fps: float, size: tuple[int, int], *options: str) -> Item:
    """A video of `size` (height, width) whose frame i has brightness STEP * i."""
    height, width = size
    pixels = np.repeat(np.arange(frames, dtype=np.uint8) * STEP, height * width * 3)
    options = options or ("-c:v", "libx264", "-crf", "4", "-preset", "ultrafast")
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps),
        "-i", "-", *options, path, stdin=pixels.tobytes(),
    )  # fmt: skip
    return make_item(path)


def encode(path: Path, pixels: np.ndarray, *options: str) -> None:
    """Write frames, uint8 (T, H, W, 3), as a video of 8 frames a second, nearly lossless."""
    _, height, width, _ = pixels.shape
    options = options or ("-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv444p")
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "8", "-i", "-",
        *options, path, stdin=pixels.tobytes(),
    )  # fmt: skip
