"""Videos for a page that holds them: as they are, or smaller where they would not all fit."""

import subprocess
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import imageio_ffmpeg

from data.items import DataError, MediaInfo
from data.media import probe
from train.video_files import LABEL_HEIGHT

SMALLEST = 60_000  # bytes: below it a video is no longer worth looking at
LONG_SIDE = 480  # pixels of a video that was made smaller


@dataclass(frozen=True)
class Film:
    """A video of a run. With `size_of` it is the base model's: the left of a comparison.

    The comparison is enlarged and labelled, so its half is brought to the size of that file.
    """

    path: Path
    size_of: Path | None = None


@dataclass(frozen=True)
class Packed:
    """A video in base64, with its size in pixels."""

    text: str
    width: int
    height: int


@dataclass(frozen=True)
class Reel:
    """The videos that fit, and what happened to the others."""

    videos: dict[Film, Packed]
    reduced: int = 0
    left_out: int = 0


def pack(films: Sequence[Film], room: int) -> Reel:
    """As many of the films, the most important first, as fit into `room` characters of base64.

    Where room is short each gets an equal share of it, and what needs less leaves it to others. A
    file that cannot be decoded, as one that is being written, is passed over.
    """
    readable = {film: info for film in dict.fromkeys(films) if (info := _info(film))}
    bytes_left = room * 3 // 4
    kept = list(readable)[: bytes_left // SMALLEST]
    data = {film: _bytes(film, readable[film]) for film in kept}
    reduced = 0
    for place, film in enumerate(sorted(kept, key=lambda film: len(data[film]))):
        share = bytes_left // (len(kept) - place)
        if len(data[film]) > share:
            data[film] = _smaller(data[film], readable[film], share)
            reduced += 1
        bytes_left -= len(data[film])
    while bytes_left < 0:  # a bit rate is a wish
        bytes_left += len(data.pop(kept.pop()))
    videos = {
        film: Packed(b64encode(data[film]).decode(), readable[film].width, readable[film].height)
        for film in kept
    }
    return Reel(videos, reduced, len(readable) - len(kept))


def _info(film: Film) -> MediaInfo | None:
    """What the film is at its true size, or None if it cannot be decoded."""
    try:
        if film.size_of is not None:
            probe(film.path, "video", film.path.name)
        path = film.size_of or film.path
        return probe(path, "video", path.name)
    except DataError:
        return None


def _bytes(film: Film, info: MediaInfo) -> bytes:
    if film.size_of is None:
        return film.path.read_bytes()
    left = f"crop=iw/2:ih-{LABEL_HEIGHT}:0:{LABEL_HEIGHT}"
    return _encoded(
        film.path.read_bytes(),
        "-vf", f"{left},scale={info.width}:{info.height}:flags=neighbor", "-crf", "12",
    )  # fmt: skip


def _smaller(video: bytes, info: MediaInfo, size: int) -> bytes:
    """The video in at most `size` bytes if the encoder can, and with fewer pixels if it has many.

    Of its bits, 6 in 8 are for the rate and 1.6 for the encoder's buffer, which it may use up once.
    """
    sides = rf"min({LONG_SIDE}\,iw):min({LONG_SIDE}\,ih)"
    scale = f"scale={sides}:force_original_aspect_ratio=decrease:force_divisible_by=2"
    rate, buffer = str(int(6 * size * info.fps / info.frames)), str(int(1.6 * size))
    return _encoded(video, "-vf", scale, "-b:v", rate, "-maxrate", rate, "-bufsize", buffer)


def _encoded(video: bytes, *options: str) -> bytes:
    """H.264 that browsers start at once. An mp4 that starts at once cannot be piped."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "in.mp4"), Path(folder, "out.mp4")
        source.write_bytes(video)
        subprocess.run(
            [
                imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(source), "-an", *options,
                "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(target),
            ],
            check=True,
        )  # fmt: skip
        return target.read_bytes()
