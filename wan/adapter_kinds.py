"""The kinds of adapters, and what each computes beside a frozen linear W (out, in) with scale s.

    lora, rslora  W + s B A             A (rank, in), B (out, rank)
    dora          m (W + s B A) / |W + s B A|, row by row; m (out,)
    loha          W + s (w1_a w1_b) * (w2_a w2_b), elementwise; (out, rank) and (rank, in) each
    lokr          W + s kron(w1, w2_a w2_b); w1 (p, q), w2_a (out / p, rank), w2_b (rank, in / q)

s is alpha / rank, for rslora alpha / sqrt(rank). All is kept in fp32 and computed in the dtype of
the input, and no (out, in) matrix is ever formed: a Hadamard product of products is one of rank
rank^2, a Kronecker product works on parts of the input. Names are those of LyCORIS, which loaders
read: `spec/lora_formats.md` section 2.E.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from wan.adapter_products import hadamard_factors, kronecker_factors

LARGEST_KRON = 8  # rows and columns of w1 at most: a small one leaves w2 the capacity


def kron_sides(width: int) -> tuple[int, int]:
    """The sides of w1 and of w2 along a width: a divisor up to `LARGEST_KRON`, and the rest."""
    small = max(d for d in range(1, LARGEST_KRON + 1) if width % d == 0 and d * d <= width)
    return small, width // small


class Factor(nn.Linear):
    """A or B: an fp32 master that multiplies in the dtype of its input, as the base beside it."""

    def __init__(self, weight: nn.Parameter) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(input, self.weight.to(input.dtype))


class Hadamard(nn.Module):
    """The product of a LoHa; it starts at zero."""

    def __init__(self, width: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        (out, wide), self.rank = width, rank
        self.hada_w1_a = nn.Parameter(0.1 * torch.randn(out, rank, generator=generator))
        self.hada_w1_b = nn.Parameter(torch.randn(rank, wide, generator=generator))
        self.hada_w2_a = nn.Parameter(torch.zeros(out, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, wide, generator=generator))

    @property
    def weight(self) -> Tensor:
        """What PEFT asks for the dtype and the device."""
        return self.hada_w1_a

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank^2, in) and B (out, rank^2) of the same product."""
        return hadamard_factors(self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        a, b = (factor.to(x.dtype) for factor in self.factors())
        return F.linear(F.linear(x, a), b)


class Kronecker(nn.Module):
    """The product of a LoKr; it starts at zero."""

    def __init__(self, width: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        (p, m), (q, n) = (kron_sides(side) for side in width)
        self.rank = rank
        self.lokr_w1 = nn.Parameter(_uniform((p, q), generator))
        self.lokr_w2_a = nn.Parameter(torch.zeros(m, rank))
        self.lokr_w2_b = nn.Parameter(_uniform((rank, n), generator))

    @property
    def weight(self) -> Tensor:
        """What PEFT asks for the dtype and the device."""
        return self.lokr_w1

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (q rank, in) and B (out, q rank) of the same product."""
        return kronecker_factors(self.lokr_w1, self.lokr_w2_a, self.lokr_w2_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        w1, w2_a, w2_b = (w.to(x.dtype) for w in (self.lokr_w1, self.lokr_w2_a, self.lokr_w2_b))
        narrow = F.linear(x.unflatten(-1, (w1.shape[1], -1)), w2_b)  # (..., q, rank)
        mixed = F.linear(narrow.transpose(-1, -2), w1).transpose(-1, -2)  # (..., p, rank)
        return F.linear(mixed, w2_a).flatten(-2)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """As A of a LoRA starts."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=generator)


class Magnitude(nn.Module):
    """m of a DoRA: the norm that each row of the adapted weight has; at first that of W."""

    base_norm: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        norm = torch.linalg.vector_norm(base.weight.detach(), dim=1, dtype=torch.float32)
        norm = norm.clamp_min(1e-12)  # a row of zeros has no direction to scale
        self.register_buffer("base_norm", norm, persistent=False)  # (out,)
        self.weight = nn.Parameter(norm.clone())


class Dora(LoraVariant):
    """How PEFT's linear applies a DoRA; its own forms (out, in) matrices, in the base's dtype."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """The linear's whole output, from that of the base.

        A strength scales all that is changed in W, as in ComfyUI: not s alone.
        """
        assert isinstance(module, LoraLinear)
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        trained, strength = _trained_scale(module, active_adapter)
        update = b(a(module.lora_dropout[active_adapter](x))) * trained
        ratio = dora_ratio(module, active_adapter)
        bias = base_linear(module).bias
        straight = result if bias is None else result - bias.to(result.dtype)
        # The difference first: 1 + something small would be rounded away in bf16.
        less, more = ((strength * part).to(x.dtype) for part in (ratio - 1, ratio))
        return result + less * straight + more * update


def _trained_scale(layer: LoraLayer, name: str) -> tuple[float, float]:
    """s as it was in training, and the strength at work: `scaling` is their product."""
    trained = layer.lora_alpha[name] / layer.r[name]
    return trained, layer.scaling[name] / trained


def dora_ratio(layer: LoraLinear, name: str) -> Tensor:
    """m / |W + s B A| of each row (out,); as in the paper the norm gets no gradient."""
    magnitude = layer.lora_magnitude_vector[name]
    assert isinstance(magnitude, Magnitude)
    return magnitude.weight / adapted_norm(layer, name)


@torch.no_grad()
def adapted_norm(layer: LoraLinear, name: str) -> Tensor:
    """|W + s B A| of each row (out,), from |W|, W A^T and (rank, rank) products."""
    magnitude, base = layer.lora_magnitude_vector[name], base_linear(layer)
    assert isinstance(magnitude, Magnitude)
    a, b = plain_factors(layer, name)
    b = _trained_scale(layer, name)[0] * b
    w_a = F.linear(a.to(base.weight.dtype), base.weight).float().T  # (out, rank)
    more = ((2 * w_a + b @ (a @ a.T)) * b).sum(1) / magnitude.base_norm**2
    return magnitude.base_norm * (1 + more).clamp_min(1e-12).sqrt()  # exactly |W| where B is 0


def base_linear(layer: LoraLinear) -> nn.Linear:
    """The frozen linear beside an adapter."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    return base


def plain_factors(layer: LoraLinear, name: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of what an adapter adds to a linear, before its scale."""
    product = layer.lora_A[name]
    if isinstance(product, Hadamard | Kronecker):
        return product.factors()
    weight = f"{name}.weight"
    return layer.lora_A.get_parameter(weight), layer.lora_B.get_parameter(weight)


@torch.no_grad()
def weight_change(layer: LoraLinear, name: str) -> Tensor:
    """All that an adapter changes in W, (out, in) in fp32: for proofs, not for training."""
    a, b = plain_factors(layer, name)
    trained, strength = _trained_scale(layer, name)
    product = trained * (b.float() @ a.float())
    if name not in layer.lora_magnitude_vector:
        return strength * product
    weight = base_linear(layer).weight.detach().float()
    adapted = weight + product
    magnitude = layer.lora_magnitude_vector.get_parameter(f"{name}.weight").float()
    ratio = magnitude / torch.linalg.vector_norm(adapted, dim=1)
    return strength * (ratio[:, None] * adapted - weight)
