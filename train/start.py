"""Where adapters start from: nothing, or a file of `lora.init` in any layout, at another rank too.

A smaller rank is filled up: what is new in A is drawn as ever and B is 0 there, so that nothing
changes and all of it learns. A larger rank is cut to the nearest by its singular values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from train.compose import lora_ranks, trained_experts
from train.config import Config
from train.rules import ConfigError
from wan.adapter_algebra import Kept, inner_product, resized, squared_distance
from wan.adapter_kinds import Magnitude, adapted_norm, plain_factors
from wan.adapter_layouts import AdapterFile, pair_of, read_any
from wan.adapter_names import diffusers_name
from wan.adapter_values import Factors
from wan.headers import ModelError
from wan.lora import ADAPTER, adapter_layers
from wan.lora_metadata import OURS
from wan.variants import Expert, Variant


@dataclass(frozen=True)
class Start:
    """What one expert starts from, fitted to its ranks, and what to tell about it."""

    modules: Mapping[str, Factors]  # by diffusers name
    told: str


def plan_starts(config: Config, facts: Variant) -> dict[Expert, Start]:
    """What each trained expert starts from; nothing without `lora.init`.

    `ConfigError` for files that are missing, broken, or made for another model or expert. Of the
    base no weight is needed.
    """
    if config.lora.init is None:
        return {}
    files = _files(Path(config.lora.init), config)
    return {expert: _start(file, expert, config, facts) for expert, file in files.items()}


def _files(given: Path, config: Config) -> dict[Expert, Path]:
    """The file of each trained expert; one that names no expert is for all."""
    if not given.exists():
        raise ConfigError(f"lora.init is {given}, which does not exist.")
    pair, experts = pair_of(given), trained_experts(config)
    if "single" in pair:
        return dict.fromkeys(experts, given)
    if missing := [expert for expert in experts if expert not in pair]:
        raise ConfigError(
            f"lora.init is {given}, whose name tells the {' and '.join(pair)} expert, and no file "
            f"for {missing[0]} is beside it. Put it there, or set experts=[{next(iter(pair))}]."
        )
    return {expert: pair[expert] for expert in experts}


def _start(path: Path, expert: Expert, config: Config, facts: Variant) -> Start:
    try:
        file = read_any(path)
    except ModelError as error:
        raise ConfigError(f"lora.init: {error}.") from None
    _check_metadata(file, expert, facts)
    given = {diffusers_name(official): factors for official, factors in file.modules.items()}
    ranks = lora_ranks(config, attrgetter(expert)(config).rank)
    used = {module: factors for module, factors in given.items() if module in ranks}
    _check_widths(path, used, facts)
    fitted = {module: resized(used[module], Kept(rank=ranks[module])) for module in used}
    return Start(fitted, f"{expert:<9}  starts from {path.name}: {_told(given, fitted, ranks)}")


def _check_metadata(file: AdapterFile, expert: Expert, facts: Variant) -> None:
    """`ConfigError` if the file says that it is for another variant or expert."""
    for name, wanted in (("variant", facts.name), ("expert", expert)):
        found = file.metadata.get(f"{OURS}{name}", wanted)
        if found != wanted:
            raise ConfigError(
                f"lora.init: {file.path} was trained for the {name} {found}, and this run trains "
                f"{wanted} from it. Give a file for {wanted}."
            )


def _check_widths(path: Path, used: Mapping[str, Factors], facts: Variant) -> None:
    """`ConfigError` if the file does not fit the model, or has nothing that is trained."""
    if not used:
        raise ConfigError(
            f"lora.init: {path} has none of the layers that lora.targets means. Set lora.targets "
            "to what the file has."
        )
    dim, ffn = facts.transformer.dim, facts.transformer.ffn_dim
    widths = {"ffn.net.0.proj": (ffn, dim), "ffn.net.2": (dim, ffn)}
    for module, factors in used.items():
        wanted = widths.get(module.split(".", 2)[2], (dim, dim))
        found = (factors.b.shape[0], factors.a.shape[1])
        if found != wanted:
            raise ConfigError(
                f"lora.init: {path} was made for another model: its {module} is {found} (out, "
                f"in), that of {facts.title} {wanted}. Give a file for {facts.title}."
            )


def _told(
    given: Mapping[str, Factors], fitted: Mapping[str, Factors], ranks: Mapping[str, int]
) -> str:
    parts = [f"{len(fitted)} of {len(ranks)} layers"]
    if raised := {f.rank for module, f in fitted.items() if f.rank < ranks[module]}:
        parts.append(f"rank {_listed(raised)} filled up, which changes nothing")
    cut = [module for module, factors in fitted.items() if factors.rank < given[module].rank]
    if cut:
        lost = sum(squared_distance(given[module], fitted[module]) for module in cut)
        whole = sum(inner_product(given[module], given[module]) for module in fitted)
        share = math.sqrt(lost / whole) if whole else 0.0
        before, after = ({of[m].rank for m in cut} for of in (given, fitted))
        parts.append(
            f"rank {_listed(before)} cut to {_listed(after)}, which changes it by {share:.2%} of "
            "its norm"
        )
    if dropped := sorted(given.keys() - ranks.keys()):
        parts.append(f"{len(dropped)} layers of the file are not trained ({dropped[0]} …)")
    return "; ".join(parts)


def _listed(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


@torch.no_grad()
def begin(transformer: WanTransformer3DModel, start: Start) -> None:
    """Give a fresh adapter the weights that it starts from; layers without any stay fresh."""
    for module, layer in adapter_layers(transformer).items():
        if (given := start.modules.get(module)) is None:
            continue
        a, b = plain_factors(layer, ADAPTER)
        a[: given.rank] = given.a.to(a)
        b[:, : given.rank] = given.b.to(b) * (given.scale / layer.scaling[ADAPTER])
        if ADAPTER in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            assert isinstance(magnitude, Magnitude)
            magnitude.weight.copy_(adapted_norm(layer, ADAPTER))
