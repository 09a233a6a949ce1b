"""Which Wan model the shapes of an adapter fit.

Source: `spec/lora_formats.md` sections 1.1 and 1.2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from wan.adapter_choices import BLOCK_LINEARS
from wan.adapter_contents import Module
from wan.variants import A14B, VARIANTS, TransformerFacts, Variant

IMAGE_WIDTH = 1280  # of the CLIP features that the image-to-video models of Wan 2.1 attend to
WAN_21_SMALL = TransformerFacts(
    dim=1536, ffn_dim=8960, heads=12, layers=30, text_dim=4096, freq_dim=256
)
ALSO = {A14B: ("T2V-14B of Wan 2.1",)}
PATCH = 2 * 2  # tokens are 1 x 2 x 2 latent pixels


@dataclass(frozen=True)
class Family:
    """Models whose adapters have the same shapes: nothing in their tensors tells them apart."""

    title: str
    facts: TransformerFacts
    channels: tuple[int, ...]  # of the input: one of these
    out_channels: int
    variants: tuple[Variant, ...]


def _families() -> tuple[Family, ...]:
    families: list[Family] = []
    for facts in dict.fromkeys(variant.transformer for variant in VARIANTS.values()):
        found = tuple(v for v in VARIANTS.values() if v.transformer == facts)
        families.append(
            Family(
                title=" or ".join((*(v.title for v in found), *ALSO.get(facts, ()))),
                facts=facts,
                channels=tuple(variant.in_channels for variant in found),
                out_channels=found[0].geometry.channels,
                variants=found,
            )
        )
    return (*families, Family("Wan 2.1 1.3B", WAN_21_SMALL, (16,), 16, ()))


FAMILIES = _families()


@dataclass(frozen=True)
class Fit:
    """The family that most modules fit, and those that do not."""

    family: Family
    title: str  # of the models that it can be for
    variants: tuple[Variant, ...]  # those of them that are of Wan 2.2
    misfits: tuple[str, ...]  # official names
    beyond: tuple[str, ...]  # of blocks that the model has not


def best_fit(modules: Mapping[str, Module]) -> Fit | None:
    """The family that most modules fit; None if none fits at all, or there are no modules."""
    fits = [_fit(modules, family) for family in FAMILIES] if modules else []
    best = min(fits, key=lambda fit: (len(fit.misfits), len(fit.beyond)), default=None)
    return best if best and len(best.misfits) < len(modules) else None


def _fit(modules: Mapping[str, Module], family: Family) -> Fit:
    allowed = _widths(family)
    blocks = {name: split_block(name) for name in modules}
    title, variants = family.title, family.variants
    if any(is_for_images(name) for name in modules):
        title, variants = "I2V-14B of Wan 2.1", ()
    elif patch := modules.get("patch_embedding"):
        variants = tuple(v for v in variants if PATCH * v.in_channels == patch.width[1])
        title = " or ".join(variant.title for variant in variants) or title
    return Fit(
        family,
        title,
        variants,
        misfits=tuple(
            n for n, (_, rest) in blocks.items() if modules[n].width not in allowed[rest]
        ),
        beyond=tuple(n for n, (i, _) in blocks.items() if (i or 0) >= family.facts.layers),
    )


def _widths(family: Family) -> dict[str, tuple[tuple[int, int], ...]]:
    """(out, in) that each module may have, by its official name without the block."""
    facts = family.facts
    square = ((facts.dim, facts.dim),)
    return {
        **dict.fromkeys((*BLOCK_LINEARS.values(), "cross_attn.k_img", "cross_attn.v_img"), square),
        "ffn.0": ((facts.ffn_dim, facts.dim),),
        "ffn.2": ((facts.dim, facts.ffn_dim),),
        "text_embedding.0": ((facts.dim, facts.text_dim),),
        "text_embedding.2": square,
        "time_embedding.0": ((facts.dim, facts.freq_dim),),
        "time_embedding.2": square,
        "time_projection.1": ((6 * facts.dim, facts.dim),),
        "head.head": ((PATCH * family.out_channels, facts.dim),),
        "patch_embedding": tuple((facts.dim, PATCH * n) for n in family.channels),
        "img_emb.proj.1": ((IMAGE_WIDTH, IMAGE_WIDTH),),
        "img_emb.proj.3": ((facts.dim, IMAGE_WIDTH),),
    }


def split_block(module: str) -> tuple[int | None, str]:
    """(3, "self_attn.q") of blocks.3.self_attn.q; (None, its name) for what is in no block."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    return (int(found[1]), found[2]) if found else (None, module)


def is_for_images(module: str) -> bool:
    """Whether a module attends to images or reads them: only Wan 2.1 I2V and its like have it."""
    return module.endswith(("cross_attn.k_img", "cross_attn.v_img")) or module.startswith("img_emb")
