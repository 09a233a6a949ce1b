"""Which adapters of a transformer work, and how strongly; finished ones beside that in training."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from wan.adapted_linear import AdaptedLinear
from wan.adapter_kinds import Dora, Magnitude, adapted_norm, base_linear, plain_factors
from wan.adapter_layouts import DORA
from wan.lora import adapter_layers, keep_masters, lora_layers


@torch.no_grad()
def load_adapter(
    transformer: WanTransformer3DModel, state: Mapping[str, Tensor], name: str
) -> None:
    """Add a finished adapter, frozen, at strength 1; other adapters keep their strengths.

    `state` is that of `wan.lora_format.read_adapter`: the scale is in B. `ValueError`, and no
    change, if it does not fit the model or the name cannot be had.
    """
    strengths = adapter_strengths(transformer)
    if name in strengths or not name or "." in name:
        raise ValueError(f"an adapter cannot be called {name!r}: it is taken, empty or has a dot")
    ranks = _ranks_that_fit(transformer, state, name)
    usual = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=[*ranks],
    )
    config._register_custom_module({nn.Linear: AdaptedLinear})
    with _trainability_kept(transformer), torch.random.fork_rng(devices=[]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # meant
            transformer.add_adapter(config, name)
        for module, layer in adapter_layers(transformer, name).items():
            keep_masters(layer, name)
            for factor, parameter in zip("AB", plain_factors(layer, name), strict=True):
                parameter.copy_(state[f"{module}.lora_{factor}.weight"])
            if f"{module}.{DORA}" in state:
                _make_dora(layer, name, state[f"{module}.{DORA}"])
        active = [other for other, strength in strengths.items() if strength]
        for layer in lora_layers(transformer).values():
            layer.set_adapter([*active, name])


def _make_dora(layer: LoraLinear, name: str, scale: Tensor) -> None:
    """Give an adapter the scale of a file (out, 1), m |W| / |W + B A| as loaders take it."""
    magnitude = Magnitude(base_linear(layer))
    layer.lora_magnitude_vector[name], layer.lora_variant[name] = magnitude, Dora()
    share = scale[:, 0].to(magnitude.base_norm) / magnitude.base_norm
    magnitude.weight.copy_(share * adapted_norm(layer, name)).requires_grad_(False)


def _ranks_that_fit(
    transformer: nn.Module, state: Mapping[str, Tensor], name: str
) -> dict[str, int]:
    """The rank in each module of a state; `ValueError` if the model has no such linear."""
    ranks: dict[str, int] = {}
    factors = (key for key in state if not key.endswith(f".{DORA}"))
    for module in dict.fromkeys(key.rpartition(".lora_")[0] for key in factors):
        a, b = (state[f"{module}.lora_{factor}.weight"] for factor in "AB")
        found, ranks[module] = (b.shape[0], a.shape[1]), a.shape[0]
        try:
            linear = transformer.get_submodule(module)
        except AttributeError:
            raise ValueError(
                f"the adapter {name!r} does not fit: the model has no {module}"
            ) from None
        needed = (linear.out_features, linear.in_features)
        if found != needed:
            raise ValueError(
                f"the adapter {name!r} does not fit: its {module} is {found} (out, in), that of "
                f"the model {needed}; was it made for another model?"
            )
    return ranks


def adapter_strengths(transformer: nn.Module) -> dict[str, float]:
    """The strength of each adapter that the transformer has: 0 for one that does not work."""
    strengths: dict[str, float] = {}
    for layer in lora_layers(transformer).values():
        for name in layer.lora_A:
            strength = layer.scaling[name] * layer.r[name] / layer.lora_alpha[name]
            strengths[name] = strength if name in layer.active_adapters else 0.0
    return strengths


def set_strengths(transformer: nn.Module, strengths: Mapping[str, float]) -> None:
    """Let adapters work at these strengths together, and those that are not named not at all.

    1 is as trained, 0 exactly the base. `ValueError` for a name that the transformer does not have.
    """
    known = adapter_strengths(transformer)
    for name, strength in strengths.items():
        if name not in known:
            raise ValueError(f"no adapter is called {name!r}; known: {', '.join(known) or 'none'}")
        if not math.isfinite(strength):
            raise ValueError(f"the strength of an adapter must be a number; found {strength}")
    with _trainability_kept(transformer):
        for layer in lora_layers(transformer).values():
            layer.set_adapter([name for name, strength in strengths.items() if strength])
            for name, strength in strengths.items():
                layer.set_scale(name, strength)


@contextmanager
def _trainability_kept(transformer: nn.Module) -> Iterator[None]:
    """After the block is trainable what was before, and nothing else: PEFT's switches change it."""
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    try:
        yield
    finally:
        for parameter in transformer.parameters():
            parameter.requires_grad_(id(parameter) in trainable)


@contextmanager
def without_adapter(transformer: nn.Module) -> Iterator[None]:
    """Within the block the model computes exactly what its base does; after it, all is back."""
    layers = lora_layers(transformer).values()
    enabled = [not layer.disable_adapters for layer in layers]
    with _trainability_kept(transformer):
        for layer in layers:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        with _trainability_kept(transformer):
            for layer, was_enabled in zip(layers, enabled, strict=True):
                layer.enable_adapters(was_enabled)
