"""Health of an adapter: what it changes and where, how fast, and how much of its rank it uses.

All comes from (rank, rank) products of A and B, for every kind; only a DoRA's norm needs all of W.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from wan.adapter_choices import split_module
from wan.adapter_kinds import Hadamard, Kronecker, plain_factors
from wan.lora import ADAPTER, adapter_layers, delta_norms

DEAD = 0.01  # of the largest: smaller singular values do nothing that one would see


@dataclass(frozen=True)
class LayerHealth:
    """One linear's share of an adapter."""

    norm: float  # Frobenius, of all that is changed in the weight
    update: float  # the same, of what changed in s B A since it was looked at last
    effective_rank: float  # exp of the entropy of the singular values of B A, 0 if it is zero
    dead: float  # share of singular values below 1 % of the largest


@torch.no_grad()
def adapter_health(
    transformer: WanTransformer3DModel, earlier: Mapping[str, Tensor] | None
) -> dict[str, LayerHealth]:
    """The health of each linear that has an adapter, by full diffusers module name.

    `earlier` is a `wan.lora.adapter_state` to tell the update from; None: from the base model.
    """
    found: dict[str, LayerHealth] = {}
    norms = delta_norms(transformer)
    for module, layer in adapter_layers(transformer).items():
        a, b = (factor.double() for factor in plain_factors(layer, ADAPTER))
        values = singular_values(a, b)
        effective, dead = spread(values)
        update = values.norm()
        if earlier is not None:
            old_a, old_b = (f.to(a) for f in _earlier_factors(module, layer, earlier))
            # B A - B' A' = [B, -B'] [A; A']
            difference = torch.cat([a, old_a]), torch.cat([b, -old_b], dim=1)
            update = singular_values(*difference).norm()
        found[module] = LayerHealth(
            norm=norms[module],
            update=layer.scaling[ADAPTER] * update.item(),
            effective_rank=effective,
            dead=dead,
        )
    return found


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of B A, falling, for A (rank, in) and B (out, rank): min(rank, in, out) of them.

    With B^T B = U D U^T they are the roots of the eigenvalues of D^1/2 U^T (A A^T) U D^1/2.
    """
    gram_a, gram_b = (a @ a.T).cpu(), (b.T @ b).cpu()  # (rank, rank): small, and exact there
    values, vectors = torch.linalg.eigh(gram_b)
    root = vectors * values.clamp_min(0).sqrt()
    squares = torch.linalg.eigvalsh(root.T @ gram_a @ root).clamp_min(0)
    return squares.sqrt().flip(0)[: min(*a.shape, len(b))]


def spread(values: Tensor) -> tuple[float, float]:
    """Effective rank, and the share that is dead, of singular values."""
    if values.max() == 0:
        return 0.0, 1.0
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return entropy.exp().item(), (values < DEAD * values.max()).double().mean().item()


def _earlier_factors(
    module: str, layer: LoraLinear, state: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """`plain_factors` of a linear as they were in a state of the adapter."""
    product = layer.lora_A[ADAPTER]
    if isinstance(product, Hadamard | Kronecker):
        then = copy.deepcopy(product)
        then.load_state_dict({n: state[f"{module}.lora_A.{n}"] for n in then.state_dict()})
        return then.factors()
    return state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]


def summarised(health: Mapping[str, LayerHealth]) -> dict[str, float]:
    """Named figures: norms and updates in all, by block and by kind of linear, else means."""
    figures: dict[str, float] = {}
    for name in ("norm", "update"):
        squares: dict[str, float] = defaultdict(float)
        for module, layer in health.items():
            value = getattr(layer, name) ** 2
            for place in ("", *_places(module)):
                squares[f"{name}{place}"] += value
        figures |= {place: value**0.5 for place, value in squares.items()}
    for name in ("effective_rank", "dead"):
        figures[name] = sum(getattr(layer, name) for layer in health.values()) / len(health)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for module, layer in health.items():
            by_kind[_places(module)[1]].append(getattr(layer, name))
        figures |= {f"{name}{kind}": sum(v) / len(v) for kind, v in by_kind.items()}
    return figures


def _places(module: str) -> tuple[str, str]:
    """The block and the kind of a linear, as ends of figures' names."""
    found = split_module(module)
    assert found is not None
    block, kind = found
    return f"/block_{int(block.removeprefix('blocks.')):02d}", f"/{kind}"
