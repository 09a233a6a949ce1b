"""The studio in which shots become videos: models one after the other, then clip after clip.

Memory is the order: the text encoder is gone before an expert comes, one expert is on the device at
a time, and the VAE is loaded when the first image or the first latents ask for it.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from tqdm import tqdm

from data.buckets import Bucket, Clip
from data.items import Item
from data.media import probe, read_clip
from tools.storyboard import Lora, Shot
from train.rules import ConfigError
from wan.checkpoints import Model, load_text_encoder, load_tokenizer, load_transformer, load_vae
from wan.conditioning import (
    Condition,
    channels_condition,
    first_frame_latents,
    i2v_image,
    i2v_size,
    image_condition,
    ti2v_image,
)
from wan.experts import Experts
from wan.latents import decode_latents
from wan.lora_format import read_adapter
from wan.sample_settings import SampleSettings
from wan.sampler import sample_steps
from wan.strengths import load_adapter, set_strengths
from wan.text import encode_prompts, pad_text
from wan.variants import Expert, Variant
from wan.weights import empty_transformer

Adapter = tuple[Path, Expert]


@dataclass(frozen=True)
class Take:
    """The videos of a shot that are made together, one for each of its seeds."""

    number: int  # of the shot
    shot: Shot
    settings: SampleSettings


@dataclass(frozen=True)
class Film:
    """The videos of a take: clips, uint8 (T, H, W, 3), in their order, for each seed."""

    clips: list[list[np.ndarray]]
    tiled: bool  # whether any was decoded in tiles

    def joined(self, loop: bool) -> list[np.ndarray]:
        """One video for each seed, without the frames that are shown twice.

        The first frame of a further clip is the last of the one before; of a loop, the last frame
        is the first.
        """
        end = -1 if loop else None
        return [
            np.concatenate([parts[0], *(part[1:] for part in parts[1:])])[:end]
            for parts in self.clips
        ]


@dataclass(frozen=True)
class Studio:
    """All that takes are made with."""

    facts: Variant
    transformers: Mapping[Expert, WanTransformer3DModel]
    experts: Experts  # the same: the one that is asked for moves to the device
    adapters: Mapping[Adapter, str]  # by what name each is in its transformer
    load_vae: Callable[[], AutoencoderKLWan]  # the same one each time
    text: Mapping[str, Tensor]  # (1, text_len, D) on the device, of each prompt
    device: torch.device


def read_adapters(loras: Iterable[Lora], model: Model) -> dict[Adapter, Mapping[str, Tensor]]:
    """The states of the adapters, each read once; `ConfigError` if one does not fit the model."""
    states: dict[Adapter, Mapping[str, Tensor]] = {}
    for lora in loras:
        if (lora.path, lora.expert) in states:
            continue
        state, _, _ = read_adapter(lora.path)
        try:
            load_adapter(empty_transformer(model.parts[lora.expert].config), state, "tried")
        except ValueError as error:
            found = str(error).replace("the adapter 'tried'", "the adapter")
            raise ConfigError(f"{lora.path}: {found}") from None
        states[lora.path, lora.expert] = state
    return states


def open_studio(
    model: Model,
    prompts: Iterable[str],
    states: Mapping[Adapter, Mapping[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> Studio:
    """Encode the prompts, then load the experts and put their adapters on."""
    text = _encode(model, list(dict.fromkeys(prompts)), dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the text encoder, which is gone
    transformers: dict[Expert, WanTransformer3DModel] = {
        expert: load_transformer(model, expert, dtype, "cpu") for expert in model.variant.experts
    }
    names = {adapter: f"adapter{index}" for index, adapter in enumerate(states)}
    for (path, expert), state in states.items():
        load_adapter(transformers[expert], state, names[path, expert])
    return Studio(
        facts=model.variant,
        transformers=transformers,
        experts=Experts(transformers, device),
        adapters=names,
        load_vae=functools.cache(lambda: load_vae(model, torch.float32, device)),
        text=text,
        device=device,
    )


def _encode(
    model: Model, prompts: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    encoder, tokenizer = load_text_encoder(model, dtype, device), load_tokenizer(model)
    text_len = model.variant.text_len
    rows = encode_prompts(prompts, tokenizer, encoder, text_len)
    return {prompt: pad_text([row], text_len) for prompt, row in zip(prompts, rows, strict=True)}


def film(take: Take, negative_prompt: str, tiled: bool, studio: Studio) -> Film:
    """Make the videos of a take, clip after clip; what memory cannot decode is decoded in tiles."""
    shot, settings = take.shot, take.settings
    _use_adapters(shot.loras, studio)
    batch = len(shot.seeds)
    first = None if shot.image is None else _fitted(_picture(shot.image), settings, studio.facts)
    last = first if shot.loop else None
    if shot.last_image is not None:
        last = _fitted(_picture(shot.last_image), settings, studio.facts)
    clips: list[list[np.ndarray]] = [[] for _ in shot.seeds]
    for index, prompt in enumerate(shot.prompts):
        is_last_clip = index == len(shot.prompts) - 1
        condition = _condition(first, last if is_last_clip else None, settings, studio)
        steps = sample_steps(
            studio.experts,
            settings,
            studio.facts,
            studio.text[prompt].expand(batch, -1, -1),
            studio.text[negative_prompt],
            [seed + index for seed in shot.seeds],  # another motion in each clip
            condition,
        )
        name = f"shot {take.number}, clip {index + 1}"
        *_, latents = tqdm(steps, name, settings.steps, leave=False)
        for parts, row in zip(clips, latents, strict=True):
            video, tiled = _decode(studio.load_vae(), row, tiled)
            parts.append(video)
        ends = [torch.from_numpy(parts[-1][-1]) for parts in clips]  # (H, W, 3) each
        first = torch.cat([_fitted(end, settings, studio.facts) for end in ends])
    return Film(clips, tiled)


def _use_adapters(loras: Sequence[Lora], studio: Studio) -> None:
    for expert, transformer in studio.transformers.items():
        used = [lora for lora in loras if lora.expert == expert]
        strengths = {studio.adapters[lora.path, expert]: lora.strength for lora in used}
        set_strengths(transformer, strengths)


def _picture(path: Path) -> Tensor:
    """An image as it is: uint8 (H, W, 3)."""
    info = probe(path, "image", str(path))
    item = Item(path, ("",), "image", str(path))
    return read_clip(Clip(item, Bucket(1, info.height, info.width), 0.0, 0.0, "keep"))[0]


def _fitted(pixels: Tensor, settings: SampleSettings, facts: Variant) -> Tensor:
    """uint8 pixels (H, W, 3) as a frame (1, 3, height, width) of a clip, in [-1, 1].

    I2V-A14B stretches an image that gave the clip its size, which was rounded down. Any other is
    cropped, as TI2V-5B does: stretching would distort it.
    """
    size = settings.height, settings.width
    height, width, _ = pixels.shape
    official = i2v_size(height, width, facts.height * facts.width)
    stretched = facts.conditioning == "channels" and size == official
    return (i2v_image if stretched else ti2v_image)(pixels, *size)


def _condition(
    first: Tensor | None, last: Tensor | None, settings: SampleSettings, studio: Studio
) -> Condition:
    """The first frame (1 or B, 3, H, W), and the last (1, 3, H, W), as the model takes them."""
    if first is None:
        return Condition()
    vae = studio.load_vae()
    # One after the other: encoded at once they would need so many times the memory.
    if studio.facts.conditioning == "first_frame":
        latents = [first_frame_latents(vae, frame[None]) for frame in first]
        return Condition(first_frame=torch.cat(latents))
    latents = [image_condition(vae, frame[None], last, settings.frames) for frame in first]
    return Condition(channels=channels_condition(torch.cat(latents), last=last is not None))


def _decode(vae: AutoencoderKLWan, latents: Tensor, tiled: bool) -> tuple[np.ndarray, bool]:
    """The clip, uint8 (T, H, W, 3), of latents (C, F, h, w), and whether tiles were needed."""
    told: list[str] = []
    video = decode_latents(vae, latents[None], tiled, told.append)[0]  # (3, T, H, W) in [-1, 1]
    for line in told:
        sys.stderr.write(f"note: {line}\n")
    levels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).cpu().numpy(), tiled or bool(told)
