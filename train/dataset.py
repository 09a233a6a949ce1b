"""The user's folders become clips; clips and captions become cache entries, each encoded once."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from data.buckets import Bucket, Clip, ClipSettings, plan_clips
from data.cache import CacheReport, cache_latents, cache_text, load_latents, load_text
from data.media import probe_all
from data.sources import DataError, read_folder, split_heldout
from train.config import Config, DataConfig
from wan.checkpoints import (
    ModelFolder,
    component_hash,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)
from wan.latents import encode_video
from wan.text import clean_prompt, encode_prompts
from wan.variants import Variant

Progress = Callable[[Iterable[int], str], Iterable[int]]

VAE_DTYPE = torch.float32  # the official one: latents are made once, so they are made well


@dataclass(frozen=True)
class Clips:
    """What is trained on and what is only measured on; no file is on both sides."""

    train: list[Clip]
    heldout: list[Clip]


@dataclass(frozen=True)
class CachedClips:
    """Of each clip: its cache entries of latents and of text, its bucket and its name."""

    latents: list[Path]
    text: list[Path]
    buckets: list[Bucket]
    names: list[str]  # of the files, from the folder's root

    def first(self) -> tuple[Tensor, Tensor]:
        """Latents (C, F, h, w) and text (L, D) of the first clip."""
        return load_latents(self.latents[0]), load_text(self.text[0])


@dataclass(frozen=True)
class EncodedDataset:
    """Everything that training, validation and previews need of the encoders, gone by then."""

    train: CachedClips
    heldout: CachedClips
    empty_text: Path
    prompts: dict[str, Tensor]  # of previews: (L, D) each
    reports: list[CacheReport]

    def fingerprint(self) -> str:
        """16 hex digits that change with any clip or caption that is trained on."""
        names = sorted(path.name for path in [*self.train.latents, *self.train.text])
        return hashlib.sha256("".join(names).encode()).hexdigest()[:16]


def plan_dataset(data: DataConfig, facts: Variant) -> Clips:
    """Read the folders, open every file once and choose a window and a shape for each.

    `DataError` names what cannot be used. Nothing is encoded.
    """
    multiple = facts.geometry.multiple
    if data.height % multiple or data.width % multiple:
        raise DataError(
            f"data.height={data.height} and data.width={data.width}: {facts.title} takes "
            f"multiples of {multiple} pixels; set such a size"
        )
    settings = ClipSettings(
        resolution=(data.height, data.width),
        frames=data.frames,
        fps=facts.fps,
        policy=data.fps_policy,  # pyright: ignore[reportArgumentType] (checked by the schema)
        multiple=multiple,
        time_stride=facts.geometry.time_stride,
        extraction=data.extraction,  # pyright: ignore[reportArgumentType] (checked by the schema)
    )
    items = read_folder(Path(data.path), "data.path")
    if data.heldout_path is not None:
        heldout = read_folder(Path(data.heldout_path), "data.heldout_path")
        kept_away = {item.path.resolve() for item in heldout}  # one folder may lie in the other
        items = [item for item in items if item.path.resolve() not in kept_away]
    else:
        items, heldout = split_heldout(items, data.heldout_fraction)
    if not items:
        raise DataError(
            f"data.path={data.path}: all of it lies in data.heldout_path={data.heldout_path}, so "
            "nothing is left to train on. Give two folders."
        )
    if not heldout:
        raise DataError(
            f"data.path={data.path} holds one item: none is left to measure on. Add another, or "
            "set data.heldout_path to a folder of clips that are never trained on."
        )
    return Clips(
        train=plan_clips(items, probe_all(items), settings),
        heldout=plan_clips(heldout, probe_all(heldout), settings),
    )


def encode_dataset(
    clips: Clips,
    prompts: Sequence[str],
    config: Config,
    folder: ModelFolder,
    device: torch.device,
    progress: Progress,
) -> EncodedDataset:
    """Cache what is missing of clips, captions and prompts; load no encoder in vain."""
    root = Path(config.data.cache)
    both = [*clips.train, *clips.heldout]
    latents, latents_report = cache_latents(
        both, _video_encoder(folder, device), _vae_id(folder), root, progress
    )
    captions = [clean_prompt(clip.item.caption) for clip in both]
    wanted = [clean_prompt(prompt) for prompt in prompts]
    text, text_report = cache_text(
        [*captions, "", *wanted],
        _text_encoder(folder, getattr(torch, config.model.dtype), device),
        f"{component_hash(folder, 'text_encoder')} {component_hash(folder, 'tokenizer')}"
        f" {config.model.dtype}",
        root,
        progress,
    )
    count = len(clips.train)
    entries = [text[caption] for caption in captions]
    buckets = [clip.bucket for clip in both]
    names = [clip.item.name for clip in both]
    return EncodedDataset(
        train=CachedClips(latents[:count], entries[:count], buckets[:count], names[:count]),
        heldout=CachedClips(latents[count:], entries[count:], buckets[count:], names[count:]),
        empty_text=text[""],
        prompts={prompt: load_text(text[clean_prompt(prompt)]) for prompt in prompts},
        reports=[latents_report, text_report],
    )


def _vae_id(folder: ModelFolder) -> str:
    return f"{component_hash(folder, 'vae')} {VAE_DTYPE}"


def _video_encoder(folder: ModelFolder, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Frames, uint8 (T, H, W, 3), to latents (C, F, h, w); the VAE is loaded at the first call."""
    vae = cache(lambda: load_vae(folder, VAE_DTYPE, device))

    def encode(frames: Tensor) -> Tensor:
        video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # (1, 3, T, H, W)
        return encode_video(vae(), video)[0]

    return encode


def _text_encoder(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device
) -> Callable[[list[str]], list[Tensor]]:
    """Prompts to embeddings (L, D); the text encoder is loaded at the first call."""
    encoder = cache(lambda: load_text_encoder(folder, dtype, device))
    tokenizer = cache(lambda: load_tokenizer(folder))
    text_len = folder.variant.text_len
    return lambda prompts: encode_prompts(prompts, tokenizer(), encoder(), text_len)
