"""How the `speed` settings of a run are given to its transformers."""

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch.distributed.device_mesh import DeviceMesh

from train.config import Config, SpeedConfig
from train.encode import EncodedDataset
from train.rules import ConfigError
from wan.checkpoints import Model
from wan.compiler import can_compile
from wan.context import Context, share_sequence
from wan.experts import Experts, Placement, load_experts
from wan.headers import ModelError
from wan.memory import Auto, set_up_blocks
from wan.quantised_weight import check_format
from wan.speed import blocks_of, check_attention, prepare_blocks, use_attention
from wan.speed_choices import WITH_INPUTS, Attention, FrozenFormat, InputPlace, Keep
from wan.variants import Variant


def check_speed(speed: SpeedConfig, device: torch.device) -> None:
    """`ConfigError` for what cannot be had on this device or is not installed."""
    if device.type == "cpu" and speed.attention != "auto":
        raise ConfigError(
            f"speed.attention is {speed.attention}, which needs an NVIDIA GPU, and there is none "
            "here. Set speed.attention=auto."
        )
    try:
        check_attention(cast("Attention", speed.attention))
        if speed.frozen is not None:
            check_format(cast("FrozenFormat", speed.frozen))
    except (ValueError, ModelError) as error:
        raise ConfigError(f"{error}. Or change speed.attention or speed.frozen.") from error


def compiles(speed: SpeedConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: where there is a GPU and a compiler, unless it is set."""
    wanted = device.type == "cuda" if speed.compile is None else speed.compile
    return wanted and can_compile(device)


def records_steps(config: Config, device: torch.device, kept: Sequence[Keep]) -> bool:
    """Whether steps may be CUDA graphs: of kernels alone, in memory that stays where it is."""
    speed = config.speed
    waiting = "host" in kept or (speed.inputs == "host" and not WITH_INPUTS.isdisjoint(kept))
    on_the_device = speed.placement in ("resident", "swap") and not waiting
    alike = config.lora.dropout == 0 and speed.context == 1
    return speed.graphs and on_the_device and alike and compiles(speed, device)


def load_to_sample(
    model: Model,
    dtype: str,
    speed: SpeedConfig,
    device: torch.device,
    context: Context | None = None,
    mesh: DeviceMesh | None = None,
) -> Experts:
    """All experts, placed and packed as configured; their attention and blocks run so too.

    Those that are trained are prepared once more, with their adapters: `prepare_to_train`. With a
    `context` its processes share each sequence, with a `mesh` the base; a process alone swaps what
    a run of several has sharded.
    """
    alone = speed.placement == "shard" and mesh is None
    experts = load_experts(
        model,
        getattr(torch, dtype),
        device,
        cast("Placement", "swap" if alone else speed.placement),
        cast("FrozenFormat | None", speed.frozen),
        mesh,
    )
    for expert in experts:
        transformer = experts[expert]
        use_attention(transformer, cast("Attention", speed.attention))
        if context is not None:
            share_sequence(transformer, context)
        keep: tuple[Keep, ...] = ("nothing",) * len(blocks_of(transformer))
        prepare_blocks(transformer, keep, compiles(speed, device), device)
    return experts


def prepare_to_train(
    transformer: WanTransformer3DModel, config: Config, facts: Variant, dataset: EncodedDataset
) -> tuple[Keep, ...]:
    """Set up the blocks of a transformer on its device, adapter attached; what each of them keeps.

    With speed.keep=auto that is as much as fits beside the largest batch of the run.
    """
    shapes = (clip.bucket for clip in dataset.train.clips)
    latents = max(
        (facts.geometry.latent_shape(b.frames, b.height, b.width) for b in shapes),
        key=lambda shape: shape[1] * shape[2] * shape[3],
    )
    return set_up_blocks(
        transformer,
        cast("Keep | Auto", config.speed.keep),
        compiles(config.speed, transformer.device),
        torch.Size((config.batch_size, facts.in_channels, *latents[1:])),
        rows=latents[1] if facts.conditioning == "first_frame" else 1,
        inputs=cast("InputPlace", config.speed.inputs),
    )
