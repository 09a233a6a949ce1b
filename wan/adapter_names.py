"""What each layout of adapter files calls a linear, and which linear a name means.

Every name goes through the official one ("blocks.0.self_attn.q"). Names are looked up, never built
by replacing underscores: `k_img` or `text_embedding_0` would break. `spec/lora_formats.md` sections
1.2 and 2.A to 2.D.
"""

import re
from typing import Literal

from wan.adapter_choices import BLOCK_LINEARS
from wan.key_names import transformer_name

# "official": official names without a prefix, as DiffSynth-Studio writes them.
Layout = Literal["comfy", "kohya", "diffusers", "peft", "official"]

# Longer prefixes first. `lora_unet__` is Alibaba-PAI's; InvokeAI reads PEFT's with `transformer.`.
PREFIXES: tuple[tuple[str, Layout], ...] = (
    ("lora_unet__", "kohya"),
    ("lora_unet_", "kohya"),
    ("diffusion_model.", "comfy"),
    ("base_model.model.transformer.", "peft"),
    ("base_model.model.", "peft"),
    ("transformer.", "diffusers"),
    ("", "official"),
)

# Official name -> diffusers name, within a block; those of images are of Wan 2.1 I2V alone.
_IN_BLOCK = {official: library for library, official in BLOCK_LINEARS.items()} | {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
}
_OUTSIDE = {
    official: transformer_name(official)
    for official in (
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    )
} | {
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}


def _either_way(names: dict[str, str]) -> dict[str, str]:
    """Official and diffusers names -> official names."""
    return {name: name for name in names} | {library: name for name, library in names.items()}


def _underscored(names: dict[str, str]) -> dict[str, str]:
    return {official.replace(".", "_"): official for official in names}


_BLOCK = r"blocks{0}(0|[1-9][0-9]{{0,2}}){0}(.+)"  # at most 1000 blocks: a file may lie
_DOTTED = (_BLOCK.format(r"\."), _either_way(_IN_BLOCK), _either_way(_OUTSIDE))
_KOHYA = (_BLOCK.format("_"), _underscored(_IN_BLOCK), _underscored(_OUTSIDE))


def read_stem(stem: str) -> tuple[Layout, str] | None:
    """(layout, official module) of a tensor's name without its `.lora_A.weight`; None if unknown.

    After a prefix both official and diffusers names are understood: SimpleTuner writes
    `diffusion_model.blocks.0.attn1.to_q`, PEFT whatever the model calls its modules.
    """
    prefix, layout = next(entry for entry in PREFIXES if stem.startswith(entry[0]))
    pattern, in_block, outside = _KOHYA if layout == "kohya" else _DOTTED
    module = stem.removeprefix(prefix)
    found = re.fullmatch(pattern, module)
    if found is None:
        official = outside.get(module)
    else:
        linear = in_block.get(found[2])
        official = f"blocks.{found[1]}.{linear}" if linear else None
    return (layout, official) if official else None


def diffusers_name(official: str) -> str:
    """What diffusers' WanTransformer3DModel calls an official linear."""
    found = re.fullmatch(_DOTTED[0], official)
    return f"blocks.{found[1]}.{_IN_BLOCK[found[2]]}" if found else _OUTSIDE[official]


def stem_of(official: str, layout: Layout) -> str:
    """The name of a linear in a layout, before `.lora_A.weight`: the reverse of `read_stem`."""
    if layout == "kohya":
        return f"lora_unet_{official.replace('.', '_')}"
    prefix = {"comfy": "diffusion_model.", "diffusers": "transformer.", "peft": "base_model.model."}
    name = diffusers_name(official) if layout in ("diffusers", "peft") else official
    return prefix.get(layout, "") + name


def block_linear(official: str) -> tuple[int, str] | None:
    """(3, "self_attn.q") of one of the ten linears of a block that Wan 2.2 has; None of others."""
    found = re.fullmatch(_DOTTED[0], official)
    return (int(found[1]), found[2]) if found and found[2] in BLOCK_LINEARS.values() else None
