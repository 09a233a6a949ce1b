"""What the encoders make of clips and prompts, kept on disk: what each kind of entry depends on.

latents     of a clip's frames
condition   of its first frame, for I2V-A14B
mask        of its mask
text        of a prompt
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, replace
from pathlib import Path

import torch
from torch import Tensor

from data.buckets import Clip
from data.entries import Recipe, make_entry
from data.files import FileFacts
from data.filling import CacheReport, Encode, Entries, Store, Work, fill
from data.items import DataError
from data.media import read_clip, read_mask

READER = 2  # raise it when `read_clip` or `read_mask` give other pixels for the same clip


def cache_latents(
    clips: Sequence[Clip],
    facts: Mapping[Path, FileFacts],
    make_encoder: Callable[[], Callable[[Tensor], Tensor]],
    encoder_id: str,
    store: Store,
) -> tuple[Entries, CacheReport]:
    """The latents (C, F, h, w) of each clip, encoded if they are missing.

    `make_encoder` loads what maps frames, uint8 (T, H, W, 3), to latents, stored in their dtype; it
    is called only if something is missing, and its result dropped afterwards. `encoder_id` names
    the weights and the dtype behind it. `facts` holds every file of the clips. `DataError` for a
    file that cannot be read or changes meanwhile, and for latents that are not finite.
    """

    def load_encoder() -> Encode:
        encode = make_encoder()
        return lambda _, frames: encode(frames)

    entries = [
        make_entry(
            store.root,
            "latents",
            clip.item.name,
            _window(clip, facts) | {"bucket": asdict(clip.bucket), "encoder": encoder_id},
        )
        for clip in clips
    ]
    return fill("latents", entries, _clip_work(clips, facts, read_clip, load_encoder), store)


def cache_conditions(
    clips: Sequence[Clip],
    facts: Mapping[Path, FileFacts],
    make_encoder: Callable[[], Callable[[Tensor, int], Tensor]],
    encoder_id: str,
    store: Store,
    last: bool = False,
) -> tuple[Entries, CacheReport]:
    """The condition Y (C, F, h, w) of each clip, for I2V-A14B; the rest is as in `cache_latents`.

    `make_encoder` loads what maps the first frame, uint8 (1, H, W, 3), and T to the latents of the
    frame followed by T-1 grey ones. Y of fewer frames is the start of Y of more, so of the windows
    at the start of a file only the longest is encoded. With `last` the encoder gets the first and
    the last frame, (2, H, W, 3), and every length has an entry of its own. Source:
    `spec/wan22.md` section 4.2.
    """

    def load_encoder() -> Encode:
        encode = make_encoder()
        return lambda index, given: encode(given, clips[index].bucket.frames)

    def read_given(clip: Clip) -> Tensor:
        return read_clip(clip)[[0, -1] if last else [0]]  # a copy: the rest need not travel

    entries = []
    for clip in clips:
        frames, height, width = astuple(clip.bucket)
        # The length of a window can move its first frame, but not before that of the file.
        own_length = last or clip.start > 0
        recipe = _window(clip, facts) | {
            "size": [height, width],
            "frames": frames if own_length else None,
            "last": last,
            "encoder": encoder_id,
        }
        entries.append(make_entry(store.root, "condition", clip.item.name, recipe, frames))
    return fill("condition", entries, _clip_work(clips, facts, read_given, load_encoder), store)


def cache_masks(
    clips: Sequence[Clip],
    facts: Mapping[Path, FileFacts],
    strides: tuple[int, int],
    store: Store,
) -> tuple[Entries, CacheReport]:
    """The loss weights (F, h, w) of each clip whose item has a mask, in the order of those clips.

    `strides` are those of the latents, in time and in space. `facts` holds the masks too.
    """
    masks = [(clip, clip.item.mask) for clip in clips if clip.item.mask is not None]
    entries = []
    for clip, mask in masks:
        recipe = _window(clip, facts) | {
            "bucket": asdict(clip.bucket),
            "mask": facts[mask].digest,
            "strides": strides,
        }
        entries.append(make_entry(store.root, "mask", clip.item.name, recipe))

    def read(clip: Clip) -> Tensor:
        return read_mask(clip, *strides)

    work = _clip_work([clip for clip, _ in masks], facts, read, lambda: lambda _, mask: mask)
    return fill("mask", entries, work, store)


def cache_text(
    prompts: Sequence[str],
    make_encoder: Callable[[], Callable[[str], Tensor]],
    encoder_id: str,
    store: Store,
) -> tuple[Entries, CacheReport]:
    """The embedding (L, D) of each different prompt, in their first order; "" is one like others.

    `make_encoder` loads what maps one prompt to its embedding: alone, since what is stored must not
    depend on the prompts beside it. The rest is as in `cache_latents`.
    """
    unique = list(dict.fromkeys(prompts))

    def load_encoder() -> Encode:
        encode = make_encoder()
        return lambda index, _: encode(unique[index])

    entries = [
        make_entry(
            store.root,
            "text",
            f"the prompt {prompt!r}",
            {"prompt": prompt, "encoder": encoder_id},
        )
        for prompt in unique
    ]
    work = Work(lambda _: torch.empty(0), load_encoder, [None] * len(unique))
    return fill("text", entries, work, replace(store, workers=0))


def _window(clip: Clip, facts: Mapping[Path, FileFacts]) -> Recipe:
    """The part of a recipe that says which frames of which file are read."""
    return {
        "file": facts[clip.item.path].digest,
        "window": [float(clip.start), float(clip.fps), clip.policy],
        "reader": READER,
    }


def _clip_work(
    clips: Sequence[Clip],
    facts: Mapping[Path, FileFacts],
    read: Callable[[Clip], Tensor],
    load_encoder: Callable[[], Encode],
) -> Work:
    stamps = {path: _stamp(path) for path in facts}

    def decode(index: int) -> Tensor:
        clip = clips[index]
        decoded = read(clip)
        for path in facts.keys() & {clip.item.path, clip.item.mask}:
            if _stamp(path) != stamps[path] and _digest(path) != facts[path].digest:
                raise DataError(
                    f"{clip.item.name}: {path} has changed since this run began; start again, "
                    "so that the new one is used"
                )
        return decoded

    return Work(decode, load_encoder, [facts[clip.item.path].previous for clip in clips])


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes with the file, as far as can be told without reading it."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns


def _digest(path: Path) -> str | None:
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
