"""Clips, captions and masks become cache entries, each encoded once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from data.batches import EncodedClip, EncodedClips, Pictures
from data.buckets import Clip
from data.cache import (
    CacheReport,
    Store,
    cache_conditions,
    cache_latents,
    cache_masks,
    cache_text,
)
from train.config import EMBEDDED, Config, ModelConfig
from train.dataset import Clips, Progress
from wan.checkpoints import (
    Model,
    ModelPaths,
    component_hash,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)
from wan.conditioning import image_condition
from wan.latents import encode_video
from wan.text import clean_prompt, encode_prompts
from wan.variants import TINY_PATH


@dataclass(frozen=True)
class EncodedDataset:
    """Everything that training, validation and previews need of the encoders, gone by then."""

    train: EncodedClips
    heldout: EncodedClips
    prompts: dict[str, Tensor]  # of previews: (L, D) each
    reports: list[CacheReport]

    def fingerprint(self) -> str:
        """16 hex digits that change with any clip, caption or mask that is trained on."""
        clips = self.train
        names = [clips.pictures.latents.paths[clip.latents].name for clip in clips.clips]
        names += [clips.text.paths[entry].name for clip in clips.clips for entry in clip.captions]
        if clips.pictures.masks is not None:
            paths, masks = clips.pictures.masks.paths, [clip.mask for clip in clips.clips]
            names += [paths[mask].name for mask in masks if mask is not None]
        return hashlib.sha256("".join(sorted(names)).encode()).hexdigest()[:16]


def model_paths(model: ModelConfig) -> ModelPaths:
    """Where the settings say that the weights lie."""
    path = str(TINY_PATH) if model.path == EMBEDDED else model.path
    return ModelPaths(path, model.high, model.low, model.vae, model.text_encoder, model.tokenizer)


def encode_dataset(
    clips: Clips,
    prompts: Sequence[str],
    config: Config,
    model: Model,
    device: torch.device,
    progress: Progress,
    say: Callable[[str], None],
) -> EncodedDataset:
    """Cache what is missing of clips, masks, captions and prompts; load no encoder in vain."""
    data = config.data
    # An encoder on the CPU has all cores at work: decoding beside it slows both down.
    workers = 0 if device.type == "cpu" else data.workers
    store = Store(Path(data.cache), workers, data.encode, progress, say)
    both = [*clips.train, *clips.heldout]
    captions = [tuple(clean_prompt(text) for text in clip.item.captions) for clip in both]
    wanted = [clean_prompt(prompt) for prompt in prompts]
    unique = list(dict.fromkeys([*(text for texts in captions for text in texts), "", *wanted]))
    entry_of = {prompt: index for index, prompt in enumerate(unique)}

    seen, reports = _cache_pictures(both, clips, config, model, device, store)
    text_id = f"{component_hash(model, 'text_encoder')} {component_hash(model, 'tokenizer')}"
    text, report = cache_text(
        unique,
        _text_encoder(model, config.model.dtype, device),
        f"{text_id} {config.model.dtype}",
        store,
    )
    mask_entry = count()
    encoded = [
        EncodedClip(
            name=clip.item.name,
            bucket=clip.bucket,
            latents=index,
            captions=tuple(entry_of[caption] for caption in captions[index]),
            mask=next(mask_entry) if clip.item.mask else None,
            visits=clip.item.visits,
            loss_weight=clip.item.loss_weight,
        )
        for index, clip in enumerate(both)
    ]
    train, heldout = encoded[: len(clips.train)], encoded[len(clips.train) :]
    return EncodedDataset(
        train=EncodedClips(train, seen, text, entry_of[""]),
        heldout=EncodedClips(heldout, seen, text, entry_of[""]),
        prompts={prompt: text.read(entry_of[clean_prompt(prompt)]) for prompt in prompts},
        reports=[*reports, report],
    )


def _cache_pictures(
    both: Sequence[Clip],
    clips: Clips,
    config: Config,
    model: Model,
    device: torch.device,
    store: Store,
) -> tuple[Pictures, list[CacheReport]]:
    """Everything that is made of frames: latents, and masks and conditions where there are any."""
    dtype, facts = config.data.vae_dtype, model.variant
    vae_id = f"{component_hash(model, 'vae')} {dtype}"
    latents, report = cache_latents(
        both, clips.files, _video_encoder(model, dtype, device), vae_id, store
    )
    reports = [report]
    masks, first, last = None, None, None
    if any(clip.item.mask for clip in both):
        strides = (facts.geometry.time_stride, facts.geometry.space_stride)
        masks, report = cache_masks(both, clips.files, strides, store)
        reports.append(report)
    if facts.conditioning == "channels":
        encoder = _condition_encoder(model, dtype, device)
        first, report = cache_conditions(both, clips.files, encoder, vae_id, store)
        reports.append(report)
        if config.condition.last_frame:
            last, report = cache_conditions(both, clips.files, encoder, vae_id, store, last=True)
            reports.append(report)
    return Pictures(latents, masks, first, last), reports


def _video_encoder(
    model: Model, dtype: str, device: torch.device
) -> Callable[[], Callable[[Tensor], Tensor]]:
    """Loads the VAE; what it gives maps frames, uint8 (T, H, W, 3), to latents (C, F, h, w)."""

    def load() -> Callable[[Tensor], Tensor]:
        vae = load_vae(model, getattr(torch, dtype), device)
        return lambda frames: encode_video(vae, as_video(frames.to(device)))[0]

    return load


def _condition_encoder(
    model: Model, dtype: str, device: torch.device
) -> Callable[[], Callable[[Tensor, int], Tensor]]:
    """Loads the VAE; what it gives maps the first frame, or first and last, to I2V-A14B's Y."""

    def load() -> Callable[[Tensor, int], Tensor]:
        vae = load_vae(model, getattr(torch, dtype), device)

        def encode(given: Tensor, frames: int) -> Tensor:
            images = as_video(given.to(device)).transpose(1, 2)[0]  # (1 or 2, 3, H, W)
            last = images[1:] if len(images) == 2 else None
            return image_condition(vae, images[:1], last, frames)[0]

        return encode

    return load


def _text_encoder(
    model: Model, dtype: str, device: torch.device
) -> Callable[[], Callable[[str], Tensor]]:
    """Loads UMT5; what it gives maps a prompt to its embedding (L, D)."""

    def load() -> Callable[[str], Tensor]:
        encoder, tokenizer = (
            load_text_encoder(model, getattr(torch, dtype), device),
            load_tokenizer(model),
        )
        text_len = model.variant.text_len
        return lambda prompt: encode_prompts([prompt], tokenizer, encoder, text_len)[0]

    return load


def as_video(frames: Tensor) -> Tensor:
    """Frames, uint8 (T, H, W, 3), as a video (1, 3, T, H, W) in [-1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
