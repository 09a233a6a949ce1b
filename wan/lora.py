"""LoRA adapters on diffusers' `WanTransformer3DModel`, through PEFT: targets, state, strengths.

The adapter in training is called "default"; finished ones are loaded beside it under names of their
own. All are on some of the ten linears of each block; the model class stays the library's.
W_eff = W + the sum of strength * alpha / rank * B @ A, with A (rank, in) and B (out, rank), in fp32
even on a bf16 base. Module names: `spec/lora_formats.md` section 1.2, `spec/wan22.md` section 7.3.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from wan.flow import mix_seed

ADAPTER = "default"

# The ten linears of a block, diffusers name -> official name: the one key map of adapters.
BLOCK_LINEARS: dict[str, str] = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}

PRESETS: dict[str, tuple[str, ...]] = {
    "all": ("attn1.", "attn2.", "ffn."),
    "attention": ("attn1.", "attn2."),
    "self_attention": ("attn1.",),
    "ffn": ("ffn.",),
}


def target_modules(preset: str) -> list[str]:
    """The linears (names within a block) of a preset; `ValueError` if there is no such preset."""
    if preset not in PRESETS:
        raise ValueError(f"no preset of targets is called {preset!r}; known: {', '.join(PRESETS)}")
    return [linear for linear in BLOCK_LINEARS if linear.startswith(PRESETS[preset])]


def split_module(module: str) -> tuple[str, str] | None:
    """("blocks.3", "attn1.to_q") of a block linear's full name; None for any other module."""
    found = re.fullmatch(r"(blocks\.\d+)\.(.+)", module)
    return (found[1], found[2]) if found and found[2] in BLOCK_LINEARS else None


def attach(
    transformer: WanTransformer3DModel,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str,
    dropout: float,
    seed: int,
) -> None:
    """Freeze the base and add the trainable adapter "default", which changes nothing yet (B = 0).

    `targets` are names of linears within a block, or one regex over full module names. A is drawn
    from (seed, module name) alone: neither the order of modules nor the global generator plays a
    part, and the latter is left as it was. `ValueError` for an adapter that cannot be.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"an adapter needs rank >= 1 and alpha > 0; found {rank} and {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"the dropout of an adapter must be in [0, 1); found {dropout}")
    if _lora_layers(transformer):
        raise ValueError("the transformer has an adapter already; attach to a freshly loaded one")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (declared int; a float is meant too)
        lora_dropout=dropout,
        target_modules=_matching_modules(transformer, targets),
    )
    transformer.requires_grad_(False)
    # PEFT's own init, replaced below, draws from the global generator.
    with torch.random.fork_rng(devices=[]):
        transformer.add_adapter(config, ADAPTER)
    for module, layer in adapter_layers(transformer).items():
        # PEFT casts to the base's dtype; master weights must not be rounded to bf16 at every step.
        layer.lora_A.float()
        layer.lora_B.float()
        layer.train(transformer.training)  # fresh modules are in training mode, dropout and all
        a, _ = _factors(layer)
        generator = torch.Generator().manual_seed(mix_seed(seed, module))
        drawn = torch.empty(a.shape)  # on the CPU: every device starts from the same values
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        with torch.no_grad():
            a.copy_(drawn)


def _matching_modules(
    transformer: WanTransformer3DModel, targets: Sequence[str] | str
) -> list[str]:
    """Full names of the block linears that `targets` means; each entry must mean at least one."""
    in_block = r"blocks\.\d+\."
    patterns = [targets] if isinstance(targets, str) else [in_block + re.escape(t) for t in targets]
    named = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear | nn.Conv3d)]
    matching: list[str] = []
    for pattern in patterns:
        found = [name for name in named if re.fullmatch(pattern, name)]
        if not found:
            raise ValueError(
                f"the adapter target {pattern!r} matches no linear of the model; "
                f"a full name looks like 'blocks.0.{next(iter(BLOCK_LINEARS))}'"
            )
        matching += found
    outside = [name for name in matching if split_module(name) is None]
    if outside or not matching:
        raise ValueError(
            f"adapters go on the linears of blocks ({', '.join(BLOCK_LINEARS)}); "
            f"the targets {targets!r} mean {outside[0] if outside else 'nothing'}"
        )
    return list(dict.fromkeys(matching))


def _lora_layers(transformer: nn.Module) -> dict[str, LoraLinear]:
    """The linears that carry any adapter, by full diffusers module name, in model order."""
    return {n: m for n, m in transformer.named_modules() if isinstance(m, LoraLinear)}


def adapter_layers(transformer: nn.Module, name: str = ADAPTER) -> dict[str, LoraLinear]:
    """The linears that carry the adapter called `name`."""
    layers = _lora_layers(transformer).items()
    return {module: layer for module, layer in layers if name in layer.lora_A}


def _factors(layer: LoraLinear, name: str = ADAPTER) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of a linear."""
    weight = f"{name}.weight"
    return layer.lora_A.get_parameter(weight), layer.lora_B.get_parameter(weight)


def _named_factors(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B under its name in the state of an adapter."""
    named: dict[str, nn.Parameter] = {}
    for module, layer in adapter_layers(transformer).items():
        named[f"{module}.lora_A.weight"], named[f"{module}.lora_B.weight"] = _factors(layer)
    return named


def adapter_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The A and B of each adapted linear, in model order."""
    return list(_named_factors(transformer).values())


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """fp32 copies on the CPU, named "<diffusers module>.lora_A.weight" and ".lora_B.weight"."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in _named_factors(transformer).items()
    }


@torch.no_grad()
def load_adapter_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state of `adapter_state` back; `ValueError`, and no change, if it does not fit."""
    named = _named_factors(transformer)
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
    with _trainability_kept(transformer), torch.random.fork_rng(devices=[]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # meant
            transformer.add_adapter(config, name)
        for module, layer in adapter_layers(transformer, name).items():
            layer.lora_A[name].float()  # PEFT casts to the base's dtype
            layer.lora_B[name].float()
            for factor, parameter in zip("AB", _factors(layer, name), strict=True):
                parameter.copy_(state[f"{module}.lora_{factor}.weight"])
        active = [other for other, strength in strengths.items() if strength]
        for layer in _lora_layers(transformer).values():
            layer.set_adapter([*active, name])


def _ranks_that_fit(
    transformer: nn.Module, state: Mapping[str, Tensor], name: str
) -> dict[str, int]:
    """The rank in each module of a state; `ValueError` if the model has no such linear."""
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(key.rpartition(".lora_")[0] for key in state):
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
    for layer in _lora_layers(transformer).values():
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
        for layer in _lora_layers(transformer).values():
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
    layers = _lora_layers(transformer).values()
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


@torch.no_grad()
def delta_norms(transformer: nn.Module) -> dict[str, float]:
    """Frobenius norm of alpha / rank * B @ A for each module, from two (rank, rank) products.

    ||B A||^2 = trace(A^T B^T B A) = sum(B^T B * A A^T): the (out, in) product is never formed.
    """
    norms = []
    layers = adapter_layers(transformer)
    for layer in layers.values():
        a, b = (factor.double() for factor in _factors(layer))
        # Rounding may take a sum that is 0 below it.
        squared = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)
        norms.append(layer.scaling[ADAPTER] * squared.sqrt())
    return dict(zip(layers, torch.stack(norms).tolist(), strict=True))
