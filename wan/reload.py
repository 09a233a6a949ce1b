"""Proof that an exported pair does in diffusers what the trained adapters do here."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from wan.flow import add_noise, expert_range, noise_like, timestep_of
from wan.lora import ADAPTER, adapter_layers, without_adapter
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

    For one noisy clip, latents (C, F, h, w) with text (L, D): |reloaded - trained| over
    |trained - base| of the expert's output; zero but for the rounding of the file's dtype. A model
    in bf16 rounds its output by more than a young adapter changes it, so there the adapted weights
    B A are compared instead, and the worst module counts. The trained adapters are as before when
    this returns.
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
        errors[expert] = _reload_error(pipeline, experts[expert], expert, path, clip, facts)
    return errors


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
            pipeline.load_lora_weights(
                str(path.parent),
                weight_name=path.name,
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


def _delta_error(transformer: WanTransformer3DModel) -> float:
    """The largest |B A reloaded - B A trained| over |B A trained| of the adapted modules."""
    errors = [0.0]
    for layer in adapter_layers(transformer).values():
        trained, reloaded = (
            layer.scaling[name]
            * (
                layer.lora_B.get_parameter(f"{name}.weight").float()
                @ layer.lora_A.get_parameter(f"{name}.weight").float()
            )
            for name in (ADAPTER, RELOADED)
        )
        error = (reloaded - trained).norm() / trained.norm().clamp_min(1e-12)
        errors.append(error.item())
    return max(errors)
