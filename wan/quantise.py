"""Frozen linears in fewer bits: the ten of each block, which are nearly all of a transformer.

Everything else keeps its precision: embeddings, time, head, norms, modulation and all biases.
Adapters train on what the packed weights compute. Source: `spec/wan22.md` section 5.3.
"""

from typing import cast

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from wan.adapter_choices import split_module
from wan.frozen_linear import FrozenLinear
from wan.quantised_weight import check_format, pack
from wan.speed_choices import FrozenFormat


def quantise_blocks(transformer: WanTransformer3DModel, format: FrozenFormat) -> None:
    """Replace the ten linears of each block in place, before adapters are attached."""
    check_format(format)
    for name, module in list(transformer.named_modules()):
        if split_module(name) is not None:
            linear = cast("nn.Linear", module)
            packed = pack(linear.weight.detach(), format)
            transformer.set_submodule(name, FrozenLinear(packed, linear, linear.weight.dtype))
