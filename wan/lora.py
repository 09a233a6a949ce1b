"""LoRA adapters on diffusers' `WanTransformer3DModel`, through PEFT: targets, ranks, state.

The adapter in training is called "default"; finished ones are loaded beside it under names of their
own. All are on some of the ten linears of each block; the model class stays the library's.
What each kind computes is in `wan.adapter_kinds`, which of them work at what strength in
`wan.strengths`. Module names: `spec/lora_formats.md` section 1.2, `spec/wan22.md` section 7.3.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from wan.adapted_linear import AdaptedLinear
from wan.adapter_choices import Kind, module_ranks, scale_of
from wan.adapter_kinds import (
    Dora,
    Factor,
    Hadamard,
    Kronecker,
    Magnitude,
    base_linear,
    dora_ratio,
    plain_factors,
    weight_change,
)
from wan.flow import mix_seed

ADAPTER = "default"
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")  # where PEFT's linear holds an adapter


def attach(
    transformer: WanTransformer3DModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str | Mapping[str, int],
    dropout: float,
    seed: int,
    kind: Kind = "lora",
) -> None:
    """Freeze the base and add the trainable adapter "default", which changes nothing yet.

    `targets` are as in `module_ranks`, or what that returned: ranks differ then, the scale does
    not. What is random is drawn from (seed, module name) alone: neither the order of modules nor
    the global generator plays a part, and the latter is left as it was. `ValueError` for an adapter
    that cannot be.
    """
    if lora_layers(transformer):
        raise ValueError("the transformer has an adapter already; attach to a freshly loaded one")
    if not isinstance(targets, Mapping):
        named = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv3d)]
        targets = module_ranks(named, targets, rank, {})
    if min(rank, *targets.values()) < 1 or alpha <= 0:
        raise ValueError(f"an adapter needs rank >= 1 and alpha > 0; found {rank} and {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"the dropout of an adapter must be in [0, 1); found {dropout}")
    scale = scale_of(kind, rank, alpha)
    others = {module: r for module, r in targets.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # pyright: ignore[reportArgumentType]  (declared int; a float is meant too)
        rank_pattern=others,
        alpha_pattern={module: scale * r for module, r in others.items()},
        lora_dropout=dropout,
        target_modules=[*targets],
    )
    config._register_custom_module({nn.Linear: AdaptedLinear})
    transformer.requires_grad_(False)
    # PEFT's own init, replaced below, draws from the global generator.
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(config, ADAPTER)
    for module, layer in adapter_layers(transformer).items():
        _make_kind(layer, kind, torch.Generator().manual_seed(mix_seed(seed, module)))
        layer.train(transformer.training)  # fresh modules are in training mode, dropout and all


@torch.no_grad()
def _make_kind(layer: LoraLinear, kind: Kind, generator: torch.Generator) -> None:
    """Give a linear the start of a kind. Drawn on the CPU: every device has the same values."""
    keep_masters(layer, ADAPTER)
    a, _ = plain_factors(layer, ADAPTER)
    if kind in ("lokr", "loha"):
        product = Kronecker if kind == "lokr" else Hadamard
        width = (base_linear(layer).out_features, base_linear(layer).in_features)
        made = product(width, layer.r[ADAPTER], generator).to(a.device)
        layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = made, nn.Identity()
        return
    drawn = torch.empty(a.shape)
    a.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
    if kind == "dora":
        layer.lora_magnitude_vector[ADAPTER] = Magnitude(base_linear(layer))
        layer.lora_variant[ADAPTER] = Dora()


def keep_masters(layer: LoraLinear, name: str) -> None:
    """Undo PEFT's cast of an adapter to the base's dtype: a master must not be rounded to bf16 at
    every step. Its answer, an input cast to fp32, would be slow; `Factor` casts the weight."""
    layer.cast_input_dtype_enabled = False
    for factors in (layer.lora_A, layer.lora_B):
        factors[name] = Factor(nn.Parameter(factors.get_parameter(f"{name}.weight").float()))


def lora_layers(transformer: nn.Module) -> dict[str, LoraLinear]:
    """The linears that carry any adapter, by full diffusers module name, in model order."""
    return {n: m for n, m in transformer.named_modules() if isinstance(m, LoraLinear)}


def adapter_layers(transformer: nn.Module, name: str = ADAPTER) -> dict[str, LoraLinear]:
    """The linears that carry the adapter called `name`."""
    layers = lora_layers(transformer).items()
    return {module: layer for module, layer in layers if name in layer.lora_A}


def named_adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, in model order, by its name in the state of an adapter.

    "<diffusers module>.lora_A.weight" and ".lora_B.weight", beside them for DoRA
    ".lora_magnitude_vector.weight"; for LoHa and LoKr ".lora_A.hada_w1_a", ".lora_A.lokr_w1" etc.
    """
    named: dict[str, nn.Parameter] = {}
    for module, layer in adapter_layers(transformer).items():
        parts = {part: getattr(layer, part) for part in PARTS}
        for part, held in parts.items():
            if ADAPTER in held:
                for name, parameter in held[ADAPTER].named_parameters():
                    named[f"{module}.{part}.{name}"] = parameter
    return named


def adapter_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """What is trained, in model order."""
    return list(named_adapter_parameters(transformer).values())


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """fp32 copies on the CPU of `named_adapter_parameters`."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in named_adapter_parameters(transformer).items()
    }


@torch.no_grad()
def finished_state(transformer: nn.Module) -> dict[str, Tensor]:
    """An adapter's state as `wan.lora_format.export_adapter` takes it.

    A DoRA has `dora_scale` (out, 1) for its magnitudes: loaders divide by the norm of W, not by
    that of the adapted weight (section 2.E), so m |W| / |W + s B A| gives exactly what was trained.
    """
    state = adapter_state(transformer)
    for module, layer in adapter_layers(transformer).items():
        if state.pop(f"{module}.{PARTS[2]}.weight", None) is not None:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            assert isinstance(magnitude, Magnitude)
            scale = dora_ratio(layer, ADAPTER) * magnitude.base_norm
            state[f"{module}.dora_scale"] = scale[:, None].to("cpu", torch.float32)
    return state


@torch.no_grad()
def load_adapter_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state of `adapter_state` back; `ValueError`, and no change, if it does not fit."""
    named = named_adapter_parameters(transformer)
    if different := sorted(named.keys() ^ state.keys()):
        owner = "the model's adapter" if different[0] in named else "the loaded state"
        raise ValueError(
            f"the adapter does not fit: {len(different)} tensors are not on both sides, the first, "
            f"{different[0]}, only in {owner}; use the same targets as when it was made"
        )
    for name, parameter in named.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"the adapter does not fit: {name} is {tuple(state[name].shape)}, the model needs "
                f"{tuple(parameter.shape)}; use the same base model and rank as when it was made"
            )
    for name, parameter in named.items():
        parameter.copy_(state[name])


@torch.no_grad()
def delta_norms(transformer: nn.Module) -> dict[str, float]:
    """Frobenius norm of what the adapter changes in each module, from two (rank, rank) products.

    ||B A||^2 = trace(A^T B^T B A) = sum(B^T B * A A^T): the (out, in) product is never formed but
    for DoRA, which changes all of W.
    """
    norms = []
    layers = adapter_layers(transformer)
    for layer in layers.values():
        if ADAPTER in layer.lora_magnitude_vector:
            norms.append(weight_change(layer, ADAPTER).norm().double())
            continue
        a, b = (factor.double() for factor in plain_factors(layer, ADAPTER))
        # Rounding may take a sum that is 0 below it.
        squared = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)
        norms.append(layer.scaling[ADAPTER] * squared.sqrt())
    return dict(zip(layers, torch.stack(norms).tolist(), strict=True))
