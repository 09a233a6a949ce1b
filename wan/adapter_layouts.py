"""Adapter files as every tool writes them, read; `wan.adapter_writing` writes them.

    comfy      diffusion_model.<official>.lora_A.weight       scale in B, no alpha
    kohya      lora_unet_<official with _>.lora_down.weight   alpha = rank, every linear of a block
    diffusers  transformer.<diffusers>.lora_A.weight          scale in B, no alpha
    peft       base_model.model.<diffusers>.lora_A.weight     adapter_config.json beside it
    official   <official>.lora_A.weight                       scale in B, no alpha

Source: `spec/lora_formats.md` sections 2, 5.3, 6.1 to 6.5.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan.adapter_names import Layout, diffusers_name, read_stem, stem_of
from wan.adapter_products import HADA, LOKR, product_factors
from wan.adapter_values import Factors, check_factors, checked_alpha
from wan.headers import ModelError
from wan.lora_metadata import OURS
from wan.safetensors_writer import data_sha256
from wan.variants import Expert

log = logging.getLogger(__name__)

DORA = "dora_scale"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # an entry of the header: a LoraConfig as JSON
CONFIGS = (DIFFUSERS_CONFIG, "lora_config")  # finetrainers' entry, which nothing else reads

_PARTS = {
    "A": "a",
    "down": "a",
    "B": "b",
    "up": "b",
}  # or "alpha", "dora_scale", "lokr_w1" …
_TENSOR = re.compile(
    r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?(?:\.weight)?|(alpha|dora_scale|(?:hada|lokr)_\w+))"
)

# What a name that is no plain LoRA's tells: the first that is found in it.
_OF_AN_ADAPTER = re.compile(r"lora|lokr|hada|dora|oft|diff|alpha")
_WHY_NOT = (
    (
        r"^(diffusion_model\.)?transformer_[12]\.",
        "loaders ignore this prefix: each expert needs a file of its own, with 'transformer.' in "
        "both (load_into_transformer_2=True picks the low-noise one)",
    ),
    (
        r"patch_embedding",
        "diffusers refuses an adapter on it and WanVideoWrapper takes the file for a Control-LoRA",
    ),
    (
        r"lora_magnitude_vector",
        "this is a DoRA as PEFT keeps it, of which only diffusers knows",
    ),
    (r"lora_mid", "this is LoCon, which is no product B @ A"),
    (
        r"\.(diff(_b|_m)?|set_weight|reshape_weight)$",
        "this is a change of whole weights beside the LoRA, which would be lost",
    ),
)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter of one expert, whatever wrote it."""

    path: Path
    layout: Layout
    modules: dict[str, Factors]  # by official name: "blocks.0.self_attn.q"
    metadata: dict[str, str]
    dora: dict[str, Tensor] = field(default_factory=dict)  # dora_scale (out, 1), by module


def read_any(path: Path, alpha: float | None = None, with_dora: bool = False) -> AdapterFile:
    """The adapter in a file of any layout, or in a folder that PEFT saved. Tensors stay on disk.

    LoHa and LoKr come as the plain LoRA that they equal, in fp32 and of a larger rank.
    The scale is alpha / rank (alpha / sqrt(rank) of a configuration with use_rslora), 1 without an
    alpha. `alpha` is for PEFT's files alone, whose adapter_config.json is lost. `ModelError` names
    the file and its tensor if it is missing, broken, damaged, of two layouts, no plain LoRA, or a
    DoRA that was not asked for: its factors alone are not what it does.
    """
    path = path / PEFT_WEIGHTS if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    try:
        layout, parts = _sorted_by_module(tensors)
        if layout == "kohya":
            parts = {name: found for name, found in parts.items() if not _fills_up(found)} or parts
        dora = {name: found.pop(DORA) for name, found in parts.items() if DORA in found}
        if dora and not with_dora:
            raise ModelError(
                "holds a DoRA, which is no plain LoRA, and its factors alone are not what it does; "
                "info and check read it, convert writes it in layout comfy"
            )
        modules = _with_scales(parts, layout, _config(path, layout, metadata, alpha))
        _check_dora(dora, modules)
    except ModelError as error:
        raise ModelError(f"{path} {error}") from None
    try:
        check_factors(modules)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    is_ours = f"{OURS}format_version" in metadata
    if is_ours and metadata.get("sshs_model_hash") != data_sha256(tensors):
        raise ModelError(f"{path} is damaged: its data do not have the hash of its header")
    if DIFFUSERS_CONFIG in metadata and layout != "diffusers":
        log.warning(
            "%s: its entry %s is ignored, as by ComfyUI; diffusers would scale the adapter by it "
            "once more. A converted file has the right scale everywhere",
            path,
            DIFFUSERS_CONFIG,
        )
    return AdapterFile(path, layout, modules, metadata, dora)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, mapped from disk, and the metadata; `ModelError` if it is no whole file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; expected an adapter's .safetensors file") from None
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error})") from None


def pair_of(path: Path) -> dict[Expert, Path]:
    """The file and its sibling of the other expert, high first, as their names tell.

    Names say "high_noise" or "low_noise", in the file or in its folder; a bare "high" or "low"
    counts only if the other file is there. {"single": path} if nothing tells an expert.
    """
    for named in (path, path.parent):
        for pattern in (r"(high|low)(?=[_-]?noise)", r"(?<![a-z])(high|low)(?![a-z])"):
            found = re.search(pattern, named.name, re.IGNORECASE)
            if found is None:
                continue
            expert: Expert = "high" if found[0].lower() == "high" else "low"
            other: Expert = "low" if expert == "high" else "high"
            spelled = other.upper() if found[0].isupper() else other
            spelled = other.capitalize() if found[0].istitle() else spelled
            name = named.name[: found.start()] + spelled + named.name[found.end() :]
            sibling = named.with_name(name) / path.relative_to(named)
            if sibling.exists():
                pair: dict[Expert, Path] = {expert: path, other: sibling}
                return {"high": pair["high"], "low": pair["low"]}
            if "noise" in pattern:
                return {expert: path}
    return {"single": path}


# Reading


def _sorted_by_module(
    tensors: Mapping[str, Tensor],
) -> tuple[Layout, dict[str, dict[str, Tensor]]]:
    """The file's one layout, and the tensors of each module by what they are."""
    layout: Layout | None = None
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        stem = read_stem(found[1]) if found else None
        if not found or not stem:
            raise ModelError(f"has a tensor named {name!r}: {_why_not(name)}")
        if layout not in (None, stem[0]):
            raise ModelError(
                f"has a tensor named {name!r}, of layout {stem[0]}, beside others of {layout}; "
                "expected one layout in a file"
            )
        layout = stem[0]
        part = found[3] or _PARTS[found[2]]
        if parts.setdefault(stem[1], {}).setdefault(part, tensor) is not tensor:
            raise ModelError(f"has a tensor named {name!r} beside another that means the same")
    if layout is None:
        raise ModelError("is empty; expected tensors named <module>.lora_A.weight")
    return layout, parts


def _why_not(name: str) -> str:
    if not _OF_AN_ADAPTER.search(name):
        return (
            "that is a model's own weight, so this is a model, not a LoRA; give the LoRA's file "
            "here, and the model as model.path or --model"
        )
    for pattern, reason in _WHY_NOT:
        if re.search(pattern, name):
            return f"{reason}; take a plain LoRA without it"
    return (
        "no linear of Wan is called so in any layout; expected a plain LoRA with names like "
        "'diffusion_model.blocks.0.self_attn.q.lora_A.weight'"
    )


def _fills_up(parts: Mapping[str, Tensor]) -> bool:
    """Whether a module is there only because diffusers wants all ten of a block in this layout."""
    return {"a", "b"} <= parts.keys() and not parts["a"].any() and not parts["b"].any()


def _with_scales(
    parts: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    config: Mapping[str, object] | None,
) -> dict[str, Factors]:
    """Each module's factors; the scale is told by an alpha, a configuration, or is 1."""
    modules: dict[str, Factors] = {}
    for module, found in parts.items():
        stem = stem_of(module, layout)
        alpha = _alpha(found, stem)
        if found.keys() & {*HADA, *LOKR, "lokr_w2"} and config is None:
            modules[module] = product_factors(found, stem, alpha)
            continue
        if "a" not in found or "b" not in found:
            raise ModelError(
                f"needs both lora_A and lora_B (or lora_down and lora_up) of {stem}; one is "
                "missing: take a whole file"
            )
        rank, scale = found["a"].shape[0] if found["a"].ndim else 0, 1.0
        if alpha is not None and rank:
            scale = alpha / rank
        elif config is not None and rank:
            scale = _configured_scale(config, diffusers_name(module), rank)
        modules[module] = Factors(found["a"], found["b"], scale)
    return modules


def _check_dora(dora: Mapping[str, Tensor], modules: Mapping[str, Factors]) -> None:
    for module, scale in dora.items():
        expected = (modules[module].b.shape[0], 1)
        if scale.shape != expected or not scale.is_floating_point():
            raise ModelError(
                f"has at {module} a {DORA} of {tuple(scale.shape)} in {scale.dtype}; expected "
                f"{expected} numbers, one for each row"
            )


def _alpha(found: Mapping[str, Tensor], stem: str) -> float | None:
    if (tensor := found.get("alpha")) is None:
        return None
    number = tensor.item() if tensor.numel() == 1 else list(tensor.shape)
    return checked_alpha(number, f"{stem}.alpha")


def _config(
    path: Path, layout: Layout, metadata: Mapping[str, str], alpha: float | None
) -> dict[str, object] | None:
    """The LoraConfig that tells the scale: PEFT's file, diffusers' entry, or none."""
    if layout == "peft":
        beside = path.with_name(PEFT_CONFIG)
        if alpha is not None:
            return {"lora_alpha": alpha}
        if not beside.is_file():
            raise ModelError(
                f"is a file of PEFT, which keeps alpha in {PEFT_CONFIG}; that is not beside it: "
                "put it there, or give --alpha (that of the training; the rank, if unknown)"
            )
        return _json(beside.read_bytes(), PEFT_CONFIG)
    if layout != "diffusers" or DIFFUSERS_CONFIG not in metadata:
        return None
    entries = _json(metadata[DIFFUSERS_CONFIG].encode(), DIFFUSERS_CONFIG)
    prefix = "transformer."
    config = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
    if not config:
        raise ModelError(f"has an entry {DIFFUSERS_CONFIG} without any key that begins '{prefix}'")
    return config


def _json(text: bytes, name: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"has a damaged {name} ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"has a damaged {name}: expected a JSON object")
    return content


def _configured_scale(config: Mapping[str, object], module: str, rank: int) -> float:
    """alpha / rank of a module (a diffusers name), as PEFT computes it from a LoraConfig."""
    if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
        raise ModelError("is configured as DoRA or another method; expected a plain LoRA")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError("has an alpha_pattern that is no JSON object")
    for name, value in patterns.items():
        # PEFT takes regular expressions; a module's name is one whose dots need no escape.
        if not re.fullmatch(r"[\w.]+", name):
            raise ModelError(f"has {name!r} as an alpha_pattern; expected names of modules")
        alpha = value if f".{module}".endswith(f".{name}") else alpha
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return checked_alpha(alpha, "lora_alpha") / root
