"""Proof that an exported pair does in diffusers what the trained adapters do here."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from wan.adapter_kinds import base_linear, weight_change
from wan.adapter_layouts import read_any, read_tensors
from wan.adapter_names import read_stem, stem_of
from wan.adapter_products import PRODUCT
from wan.context import whole_sequences
from wan.flow import add_noise, expert_range, noise_like, timestep_of
from wan.lora import ADAPTER, adapter_layers
from wan.speed import blocks_of
from wan.strengths import without_adapter
from wan.text import pad_text
from wan.variants import Expert, Variant

RELOADED = "reloaded"
TOLERANCE = 0.02  # several times the rounding of bf16 files, far below a lost scale or module


@torch.no_grad()
def reload_errors(
    experts: Mapping[Expert, WanTransformer3DModel],
    files: Mapping[Expert, Path],
    facts: Variant,
    latents: Tensor,
    text: Tensor,
) -> dict[Expert, float]:
    """How far each file, loaded by `WanPipeline.load_lora_weights`, is from the trained adapter.

    A LoHa or LoKr, which diffusers does not read, is given to it as the plain LoRA that the file
    equals. A DoRA's file is not given to it at all, as its scales have another meaning there: the
    weights that ComfyUI makes of it are compared with the trained ones, as for bf16 below.

    For one noisy clip, latents (C, F, h, w) with text (L, D): |reloaded - trained| over
    |trained - base| of the expert's output; zero but for the rounding of the file's dtype. A model
    in bf16 rounds its output by more than a young adapter changes it, so there the changes of the
    weights are compared instead, and the worst module counts. The trained adapters are as before
    when this returns.
    """
    pipeline = WanPipeline(  # its annotations know no part that may be absent
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=None,  # pyright: ignore[reportArgumentType]
        scheduler=UniPCMultistepScheduler(),  # pyright: ignore[reportArgumentType]
        transformer=experts[facts.experts[0]],
        transformer_2=experts["low"] if "low" in facts.experts else None,
        boundary_ratio=facts.boundary,
    )
    errors: dict[Expert, float] = {}
    for expert, path in files.items():
        levels = expert_range(facts.boundary, expert)
        sigma = torch.tensor([(levels.low + levels.high) / 2])
        noise = noise_like((facts.in_channels, *latents.shape[1:]), 0, f"reload {expert}")[None]
        x = add_noise(latents[None], noise[:, : len(latents)], sigma)
        # What I2V-A14B has beside them is noise here: any input compares two adapters.
        x = torch.cat([x, noise[:, len(latents) :]], dim=1)  # (1, in_channels, F, h, w)
        clip = NoisyClip(x, timestep_of(sigma), text)
        if any(layer.lora_magnitude_vector for layer in adapter_layers(experts[expert]).values()):
            errors[expert] = _dora_error(experts[expert], path)
        else:
            with _library_blocks(experts[expert]), whole_sequences(experts[expert]):
                errors[expert] = _reload_error(pipeline, experts[expert], expert, path, clip, facts)
    return errors


@contextmanager
def _library_blocks(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Within the block its blocks run as the library's own, as they will for a user of the file."""
    blocks = blocks_of(transformer)
    prepared = [vars(block).pop("forward", None) for block in blocks]  # by wan.speed
    try:
        yield
    finally:
        for block, forward in zip(blocks, prepared, strict=True):
            if forward is not None:
                block.forward = forward


@dataclass(frozen=True)
class NoisyClip:
    """One input of a transformer: x (1, in_channels, F, h, w), timestep (1,), text (L, D)."""

    x: Tensor
    timestep: Tensor
    text: Tensor


def _reload_error(
    pipeline: WanPipeline,
    transformer: WanTransformer3DModel,
    expert: Expert,
    path: Path,
    clip: NoisyClip,
    facts: Variant,
) -> float:
    device, dtype = transformer.device, transformer.dtype
    text = pad_text([clip.text], facts.text_len).to(device, dtype)

    def output() -> Tensor:
        x, timestep = clip.x.to(device, dtype), clip.timestep.to(device)
        return transformer(x, timestep, text, return_dict=False)[0].float()

    was_training = transformer.training
    transformer.eval()
    trained = output()
    with without_adapter(transformer):
        base = output()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # meant
            plain = _as_plain(path)
            pipeline.load_lora_weights(
                plain or str(path.parent),
                weight_name=None if plain else path.name,
                adapter_name=RELOADED,
                load_into_transformer_2=expert == "low",
                local_files_only=True,
            )
        transformer.set_adapters(RELOADED)
        reloaded, delta_error = output(), _delta_error(transformer)
    finally:
        transformer.set_adapters(ADAPTER)
        transformer.delete_adapters(RELOADED)
        transformer.train(was_training)
    if dtype != torch.float32:
        return delta_error
    return ((reloaded - trained).norm() / (trained - base).norm().clamp_min(1e-12)).item()


def _as_plain(path: Path) -> dict[str, Tensor]:
    """The plain LoRA that a file with LoHa or LoKr equals, as diffusers names it; else nothing."""
    if not any(PRODUCT.fullmatch(name) for name in read_tensors(path)[0]):
        return {}
    plain: dict[str, Tensor] = {}
    for official, factors in read_any(path).modules.items():
        stem = stem_of(official, "diffusers")
        plain[f"{stem}.lora_A.weight"] = factors.a.float()
        plain[f"{stem}.lora_B.weight"] = factors.b.float() * factors.scale
    return plain


def _delta_error(transformer: WanTransformer3DModel) -> float:
    """The largest |change reloaded - change trained| over |change trained| of the modules."""
    layers = adapter_layers(transformer).values()
    return max(_distance(weight_change(le, RELOADED), weight_change(le, ADAPTER)) for le in layers)


def _dora_error(transformer: WanTransformer3DModel, path: Path) -> float:
    """The same for a file with `dora_scale`, as ComfyUI reads it: dora_scale / |W| (W + B A)."""
    tensors, _ = read_tensors(path)
    errors = [0.0]
    for module, layer in adapter_layers(transformer).items():
        weight = base_linear(layer).weight.float()
        found = read_stem(module)
        assert found is not None
        stem = stem_of(found[1], "comfy")
        a, b, scale = (
            tensors[stem + part].to(weight)
            for part in (".lora_A.weight", ".lora_B.weight", ".dora_scale")
        )
        read = scale / weight.norm(dim=1, keepdim=True).clamp_min(1e-12) * (weight + b @ a)
        errors.append(_distance(read - weight, weight_change(layer, ADAPTER)))
    return max(errors)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()
