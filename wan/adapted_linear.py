"""PEFT's adapted linear, where a lone LoRA and its frozen base are one product."""

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from wan.adapter_kinds import Factor
from wan.frozen_linear import FrozenLinear
from wan.frozen_product import PLAIN, Frozen, Narrow, frozen_product


class AdaptedLinear(LoraLinear):
    """What PEFT's computes; faster where one LoRA works and its dropout does not.

    Its base is frozen: it never gets a gradient.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., in) to (..., out)."""
        frozen, narrow = _frozen(self.get_base_layer(), x), _lone_lora(self)
        if frozen is None or narrow is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        return frozen_product(x, frozen, narrow)


def _frozen(base: nn.Module, x: Tensor) -> Frozen | None:
    """A base that multiplies in the dtype of x."""
    if isinstance(base, FrozenLinear):
        return base.frozen()
    if type(base) is not nn.Linear or base.weight.dtype != x.dtype:
        return None
    return Frozen(base.weight, None, PLAIN, base.bias)


def _lone_lora(layer: AdaptedLinear) -> Narrow | None:
    """The only adapter at work, if it is a LoRA without dropout."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] in layer.lora_variant:
        return None
    name = names[0]
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    dropping = layer.training and not isinstance(dropout, nn.Identity)
    if dropping or not (isinstance(a, Factor) and isinstance(b, Factor)):
        return None
    return Narrow(a.weight, b.weight, layer.scaling[name])
