"""A frozen linear whose weight is packed in fewer bits."""

import torch
from torch import Tensor, nn

from wan.frozen_operators import turned_weight
from wan.frozen_product import Frozen, frozen_product
from wan.quantised_weight import PackedWeight, make_whole


class FrozenLinear(nn.Linear):
    """x W^T + b on a packed W (out, in) that is never trained; it computes in its input's dtype.

    What is packed lies in buffers, and is moved as they are. `weight` is W made whole in `dtype`
    each time that it is asked for; writing to it changes nothing.
    """

    qweight: Tensor  # as PEFT looks for it, to know the device without making the weight whole
    scale: Tensor
    turned: Tensor | None = None  # fp8: (in, out), where there is room; it stays on its device

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
        return frozen_product(input, self.frozen())

    def frozen(self) -> Frozen:
        """What products need of it."""
        return Frozen(self.qweight, self.scale, self.format, self.bias, self.turned)

    def turn(self) -> None:
        """Keep fp8 a second time as the gradient of the input reads it, not to turn it each time.

        It is no buffer: it is neither saved nor moved.
        """
        assert self.format == "fp8"
        self.turned = turned_weight(self.qweight)

    def extra_repr(self) -> str:
        """As of any linear, and the format."""
        return f"{super().extra_repr()}, format={self.format}"
