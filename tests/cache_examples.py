"""Small clips, and an encoder that leaves a trace of all it does, for the tests of the cache."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.buckets import Bucket, Clip
from data.cache import CacheReport, Entries, Store, cache_latents
from data.files import FileFacts, read_files
from data.items import Item

SECONDS = 60.0  # to wait for another process at most; a tenth of one is enough on a free machine


def silent(indices: Iterable[int], _label: str) -> Iterable[int]:
    return indices


def store_at(root: Path, workers: int = 0, encode: bool = True) -> Store:
    return Store(root, workers, encode, silent, lambda _: None)


def image_clip(folder: Path, name: str, colour: int) -> Clip:
    """A grey picture, 16 high and 32 wide."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (32, 16), colour).save(folder / name)
    item = Item(folder / name, ("a caption",), "image", name)
    return Clip(item, Bucket(1, 16, 32), 0, 0, "keep")


def image_clips(folder: Path, count: int) -> list[Clip]:
    return [image_clip(folder, f"{i}.png", 10 * i) for i in range(count)]


def video_clip(path: Path, frames: int, colours: Sequence[int]) -> Clip:
    """The first frames of a GIF of so many grey frames, 10 in a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.new("L", (32, 16), colour) for colour in colours]
    first.save(path, save_all=True, append_images=others, duration=100)
    item = Item(path, ("a caption",), "video", path.name)
    return Clip(item, Bucket(frames, 16, 32), 0, 10, "resample")


def look(clips: Sequence[Clip], root: Path) -> dict[Path, FileFacts]:
    """The facts of all files of the clips."""
    masks = [clip.item.mask for clip in clips if clip.item.mask is not None]
    paths = [clip.item.path for clip in clips] + masks
    return dict(zip(paths, read_files(paths, root, 0, silent), strict=True))


@dataclass
class Encoder:
    """Counts what it is asked for; latents (1, T, H, W) are the brightness of the frames."""

    loaded: int = 0
    frames: list[Tensor] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def load(self) -> Callable[[Tensor], Tensor]:
        self.loaded += 1
        return self._latents

    def load_text(self) -> Callable[[str], Tensor]:
        self.loaded += 1
        return self._text

    def _latents(self, frames: Tensor) -> Tensor:
        self.frames.append(frames)
        return frames.float().mean(dim=-1)[None]

    def _text(self, prompt: str) -> Tensor:
        self.prompts.append(prompt)
        return torch.full((len(prompt) + 1, 2), 1.0)


def fill(clips: Sequence[Clip], store: Store, encoder_id: str = "vae") -> tuple[int, CacheReport]:
    """Cache the clips and check what is read: how many were encoded here, and the report."""
    encoder = Encoder()
    facts = look(clips, store.root)
    entries, report = cache_latents(clips, facts, encoder.load, encoder_id, store)
    assert_right(clips, entries)
    return len(encoder.frames), report


def assert_right(clips: Sequence[Clip], entries: Entries) -> None:
    for index, clip in enumerate(clips):
        with Image.open(clip.item.path) as image:
            brightness = float(np.asarray(image)[0, 0])
        shape = (1, clip.bucket.frames, clip.bucket.height, clip.bucket.width)
        assert torch.equal(entries.read(index), torch.full(shape, brightness))


def in_child(work: Callable[[], None]) -> ForkProcess:
    """A process that does this and then ends; it is not a daemon, so it may have workers."""

    def run() -> None:
        # A shell that starts the tests in the background lets them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def ended(processes: Sequence[ForkProcess]) -> list[int | None]:
    """The exit codes, once all have ended."""
    for process in processes:
        process.join(SECONDS)
    return [process.exitcode for process in processes]


def waits_for(happens: Callable[[], bool]) -> None:
    """Return when it has happened; fail if it does not."""
    end = time.monotonic() + SECONDS
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@dataclass(frozen=True)
class Diary:
    """Lines that several processes append to one file."""

    path: Path

    def write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def progress(self, indices: Iterable[int], label: str) -> Iterator[int]:
        """Writes what is announced."""
        self.write(label)
        yield from indices
