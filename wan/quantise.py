"""Frozen linears in fewer bits: the ten of each block, which are nearly all of a transformer.

Everything else keeps its precision: embeddings, time, head, norms, modulation and all biases.
Adapters train on what the packed weights compute. Source: `spec/wan22.md` section 5.3.
"""

from typing import cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from wan.lora import split_module
from wan.quantised_product import frozen_product
from wan.quantised_weight import FrozenFormat, PackedWeight, check_format, make_whole, pack


class FrozenLinear(nn.Linear):
    """x W^T + b on a packed W (out, in) that is never trained; it computes in its input's dtype.

    What is packed lies in buffers, and is moved as they are. `weight` is W made whole in `dtype`
    each time that it is asked for; writing to it changes nothing.
    """

    qweight: Tensor  # as PEFT looks for it, to know the device without making the weight whole
    scale: Tensor

    def __init__(self, packed: PackedWeight, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format, self.dtype = packed.format, dtype
        self.register_buffer("qweight", packed.data)
        self.register_buffer("scale", packed.scale)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] (no parameter)
        """W (out, in), made whole in `dtype`."""
        return make_whole(self.qweight, self.scale, self.format, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return frozen_product(input, self.qweight, self.scale, self.bias, self.format)

    def extra_repr(self) -> str:
        """As of any linear, and the format."""
        return f"{super().extra_repr()}, format={self.format}"


def quantise_blocks(transformer: WanTransformer3DModel, format: FrozenFormat) -> None:
    """Replace the ten linears of each block in place, before adapters are attached."""
    check_format(format)
    for name, module in list(transformer.named_modules()):
        if split_module(name) is not None:
            linear = cast("nn.Linear", module)
            packed = pack(linear.weight.detach(), format)
            transformer.set_submodule(name, FrozenLinear(packed, linear, linear.weight.dtype))
