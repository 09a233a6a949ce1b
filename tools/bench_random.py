"""Random transformers of a variant's full width: the reference's, ours, and a step's inputs.

No weights can be had without a hub, and speed and memory do not depend on their values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from wan import lora
from wan.adapter_choices import BLOCK_LINEARS, split_module, target_modules
from wan.flow import timestep_of
from wan.frozen_linear import FrozenLinear
from wan.key_names import transformer_config
from wan.quantised_weight import pack
from wan.speed_choices import FrozenFormat
from wan.text import pad_text
from wan.transformer import predict_velocity
from wan.variants import Variant
from wan.weights import empty_transformer

RANK = 16
Shape = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Inputs:
    """What a step is given: a clip of noise, its caption, and the velocity to predict."""

    x: Tensor  # (1, C_in, F, h, w)
    timestep: Tensor  # (1,)
    text: Tensor  # (1, text_len, D)
    target: Tensor  # (1, C, F, h, w)


Loss = Callable[[WanTransformer3DModel, Inputs], Tensor]


def reference(facts: Variant, blocks: int, device: torch.device) -> WanTransformer3DModel:
    """diffusers and PEFT: a base in bf16, adapters in fp32, all of each block computed twice."""
    model = random_transformer(facts, blocks, torch.bfloat16, device)
    names = [f"blocks.{i}.{name}" for i in range(blocks) for name in BLOCK_LINEARS]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _fill_adapters(model)
    model.enable_gradient_checkpointing()
    return model.train()


def reference_loss(model: WanTransformer3DModel, inputs: Inputs) -> Tensor:
    """The library's forward pass under autocast, and the squared error."""
    with torch.autocast(inputs.x.device.type, torch.bfloat16):
        x, text = inputs.x.to(model.dtype), inputs.text.to(model.dtype)
        out = model(x, inputs.timestep, text, return_dict=False)[0]
    return (out.float() - inputs.target).square().mean()


def adapted(
    facts: Variant,
    blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    frozen: FrozenFormat | None,
) -> WanTransformer3DModel:
    """Our transformer, with the numbers of the reference in its weights and adapters."""
    model = random_transformer(facts, blocks, dtype, device, frozen)
    targets = target_modules("all")
    lora.attach(model, RANK, float(RANK), dict.fromkeys(targets, RANK), 0.0, seed=0)
    _fill_adapters(model)
    return model.train()


def our_loss(model: WanTransformer3DModel, inputs: Inputs) -> Tensor:
    """Our forward pass, and the squared error."""
    out = predict_velocity(model, inputs.x, inputs.timestep, inputs.text)
    return (out - inputs.target).square().mean()


@torch.no_grad()
def _fill_adapters(model: nn.Module) -> None:
    """Factors as after some training: with B = 0 the gradient of A would be 0."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * 0.5 * max(parameter.shape) ** -0.5)


def random_transformer(
    facts: Variant,
    blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    frozen: FrozenFormat | None = None,
) -> WanTransformer3DModel:
    """A transformer of the variant's width with so many blocks; always the same numbers.

    Made and packed tensor by tensor: never more of it is in memory than in the end.
    """
    small = replace(facts, transformer=replace(facts.transformer, layers=blocks))
    model = empty_transformer(transformer_config(small))
    generator = torch.Generator(device).manual_seed(0)
    in_fp32 = WanTransformer3DModel._keep_in_fp32_modules or ()
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        values = _random(name, parameter.shape, generator)
        values = values.to(torch.float32 if any(part in name for part in in_fp32) else dtype)
        module = model.get_submodule(path)
        if frozen is not None and leaf == "weight" and split_module(path) is not None:
            linear = cast("nn.Linear", module)
            model.set_submodule(path, FrozenLinear(pack(values, frozen), linear, dtype))
        else:
            setattr(module, leaf, nn.Parameter(values, requires_grad=False))
    config = model.config
    model.rope = WanRotaryPosEmbed(
        config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
    ).to(device)
    return model.eval()


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of a trained model's scale, exact in bf16, so that every dtype has the same model."""
    device = generator.device
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, device=device)
    fan_in = shape[1:].numel() if len(shape) > 1 else shape.numel()
    values = torch.randn(shape, generator=generator, device=device) * fan_in**-0.5
    return values.bfloat16().float()


def random_inputs(facts: Variant, shape: Shape, device: torch.device) -> Inputs:
    """Inputs of one clip (frames, height, width)."""
    generator = torch.Generator(device).manual_seed(1)
    latent = facts.geometry.latent_shape(*shape)
    x = torch.randn(1, facts.in_channels, *latent[1:], generator=generator, device=device)
    target = torch.randn(1, *latent, generator=generator, device=device)
    rows = torch.randn(60, facts.transformer.text_dim, generator=generator, device=device)
    text = pad_text([rows.cpu()], facts.text_len).to(device)
    return Inputs(x, timestep_of(torch.tensor([0.7], device=device)), text, target)
