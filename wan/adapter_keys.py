"""What the name of a tensor in an adapter file says: whose layout, which module, which part of it.

More than `wan.adapter_names` reads is told apart here, as each is a known trap: other kinds of
adapters, and names that look like a layout and are taken by no loader. Source:
`spec/lora_formats.md` sections 1.2, 2.A to 2.G and 5.3.
"""

import re
from dataclasses import dataclass
from typing import Literal

from wan.adapter_names import PREFIXES, Layout, read_stem, stem_of

Style = Literal[
    "comfy",  # diffusion_model. + official
    "kohya",  # lora_unet_ + official, with underscores
    "diffusers",  # transformer. + diffusers
    "official",  # official, no prefix
    "peft",  # base_model.model. + either
    "fun",  # lora_unet__ + official, with underscores
    "comfy_diffusers",  # diffusion_model. + diffusers: SimpleTuner
    "transformer_2",  # transformer_2. + diffusers
    "stages",  # diffusion_model.transformer_1. + official: ai-toolkit
]

FACTOR_SUFFIXES = {  # ending -> (part, how the factors are spelled)
    ".lora_A.weight": ("a", "lora_A"),
    ".lora_B.weight": ("b", "lora_A"),
    ".lora_down.weight": ("a", "lora_down"),
    ".lora_up.weight": ("b", "lora_down"),
    ".lora_A.default.weight": ("a", "default"),
    ".lora_B.default.weight": ("b", "default"),
    ".lora_A": ("a", "bare"),
    ".lora_B": ("b", "bare"),
}
OTHER_SUFFIXES = {  # ending -> part
    ".alpha": "alpha",
    ".modulation.diff": "modulation_diff",
    ".diff_m": "diff_m",
    ".diff_b": "diff_b",
    ".diff": "diff",
    ".set_weight": "set_weight",
    ".reshape_weight": "set_weight",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_mid.weight": "lora_mid",
    ".lokr_w1": "lokr",
    ".lokr_w2": "lokr",
    ".lokr_w1_a": "lokr_factored",
    ".lokr_w1_b": "lokr_factored",
    ".lokr_w2_a": "lokr_factored",
    ".lokr_w2_b": "lokr_factored",
    ".lokr_t2": "lokr_factored",
    ".hada_w1_a": "loha",
    ".hada_w1_b": "loha",
    ".hada_w2_a": "loha",
    ".hada_w2_b": "loha",
}
_PARTS = {ending: (part, "") for ending, part in OTHER_SUFFIXES.items()} | FACTOR_SUFFIXES
_ENDINGS = sorted(_PARTS, key=len, reverse=True)  # the longest that fits is meant

_DIFFERENCES = {"diff", "diff_b", "diff_m", "modulation_diff", "set_weight"}
_PARAMETERS = re.compile(  # no linears: distilled files have differences for them
    r"blocks\.(0|[1-9][0-9]{0,2})(\.((self|cross)_attn\.norm_[qk]|cross_attn\.norm_k_img|norm3))?"
    r"|head|img_emb\.proj\.[04]"
)
_PATCH = "patch_embedding"
_PATCH_STEMS: dict[str, Layout] = {f"{prefix}{_PATCH}": layout for prefix, layout in PREFIXES}


@dataclass(frozen=True)
class Key:
    """A tensor's name, understood; `module` is the official one, with its block."""

    style: Style
    module: str
    part: str  # "a" (rank, in), "b" (out, rank), "alpha", or a value of OTHER_SUFFIXES
    spelling: str  # of a factor: "lora_A", "lora_down", "default", "bare"


def understand(name: str) -> Key | None:
    """What a tensor's name says; None if it names no module of Wan, or no part of an adapter."""
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
    if ending is None:
        return None
    part, spelling = _PARTS[ending]
    stem = name.removesuffix(ending)
    found = _trap(stem) or _module(stem) or _parameter(stem, part)
    return Key(*found, part, spelling) if found else None


def _trap(stem: str) -> tuple[Style, str] | None:
    """Names with the expert in them, which no loader reads as such."""
    traps: tuple[tuple[Style, str, str], ...] = (
        ("transformer_2", "transformer_2.", "transformer."),
        ("stages", "diffusion_model.transformer_1.", "diffusion_model."),
        ("stages", "diffusion_model.transformer_2.", "diffusion_model."),
    )
    for style, prefix, meant in traps:
        found = _module(meant + stem.removeprefix(prefix)) if stem.startswith(prefix) else None
        if found:
            return style, found[1]
    return None


def _module(stem: str) -> tuple[Style, str] | None:
    if stem in _PATCH_STEMS:
        return _PATCH_STEMS[stem], _PATCH
    found = read_stem(stem)
    if found is None:
        return None
    layout, module = found
    if stem.startswith("lora_unet__"):
        return "fun", module
    if layout == "peft" or stem == stem_of(module, layout):
        return layout, module
    return ("comfy_diffusers", module) if layout == "comfy" else None


def _parameter(stem: str, part: str) -> tuple[Style, str] | None:
    """What is no linear but can have a difference: norms, modulations."""
    module = stem.removeprefix("diffusion_model.")
    if part not in _DIFFERENCES or not _PARAMETERS.fullmatch(module):
        return None
    return "comfy" if module != stem else "official", module
