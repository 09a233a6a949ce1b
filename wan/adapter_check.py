"""What is wrong with an adapter file, and what other programs will make of it.

Source: `spec/lora_formats.md` sections 2.0, 5.3, 6.1 and 6.4.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from wan.adapter_choices import BLOCK_LINEARS
from wan.adapter_contents import Contents, Module, read_contents
from wan.adapter_layouts import DIFFUSERS_CONFIG
from wan.adapter_shapes import Fit, best_fit, is_for_images, split_block
from wan.adapter_values import MOST_ALPHA
from wan.loader_rules import LOADERS, Feature, Outcome, verdict
from wan.lora_format import FORBIDDEN_WORDS
from wan.lora_metadata import FORMAT_VERSION, OURS
from wan.recognise import expert_by_name
from wan.variants import VARIANTS, Expert

LARGE_HEADER = 1_000_000  # bytes (section 4.1)
SWARM_ARCHITECTURES = ("wan-2_2-ti2v-5b/lora", "wan-2_1-text2video-14b/lora")
SWARM_WIDTHS = (1536, 5120)
INVOKE_WIDTHS = (5120, 3072)
DETECTION_MODULE = "blocks.0.cross_attn.k"
PORTABLE = {"F32", "F16", "BF16"}
STYLE_FAULTS = {
    "comfy_diffusers": "names of diffusers after diffusion_model. (SimpleTuner's comfyui format)",
    "transformer_2": "names with transformer_2., which diffusers passes over without an error",
    "stages": "names of both experts in one file (ai-toolkit's), which nothing else reads",
    "peft": "names of PEFT's own checkpoints (base_model.model.), which are not for sharing",
}


@dataclass(frozen=True)
class Finding:
    """Something to know about a file: an error if it will not work as it should somewhere."""

    level: Literal["error", "warning"]
    text: str


@dataclass(frozen=True)
class LoaderVerdict:
    """What a program makes of a file."""

    loader: str
    version: str
    known_by: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Check:
    """All that is known of one adapter file."""

    contents: Contents
    fit: Fit | None
    expert_by_metadata: Expert | None
    expert_by_name: Expert | None
    findings: tuple[Finding, ...]
    verdicts: tuple[LoaderVerdict, ...]

    @property
    def expert(self) -> Expert | None:
        """What the file says itself, or else its name."""
        return self.expert_by_metadata or self.expert_by_name

    @property
    def has_errors(self) -> bool:
        """Whether anything found is an error."""
        return any(finding.level == "error" for finding in self.findings)


def check_adapter(path: Path) -> Check:
    """Everything about an adapter file. `ModelError` only if it is no whole safetensors file."""
    contents = read_contents(path)
    fit = best_fit(contents.modules)
    told = contents.metadata.get(f"{OURS}expert")
    by_metadata = cast(Expert, told) if told in get_args(Expert) else None
    by_name = expert_by_name(path)
    found = features(contents, fit)
    findings = [
        *_key_findings(contents),
        *_scale_findings(contents),
        *_shape_findings(contents, fit),
        *_value_findings(contents),
        *_hash_findings(contents),
        *_name_findings(contents, fit, by_metadata, by_name),
    ]
    verdicts = [
        LoaderVerdict(loader.name, loader.version, loader.known_by, *verdict(loader, found))
        for loader in LOADERS
    ]
    return Check(contents, fit, by_metadata, by_name, tuple(findings), tuple(verdicts))


def features(contents: Contents, fit: Fit | None) -> frozenset[Feature]:
    """What a file has that some loader minds."""
    names, modules = contents.parts, contents.modules
    blocks = {name for name in modules if name.startswith("blocks.")}
    alphas = {name: m.alpha for name, m in modules.items() if m.alpha is not None}
    widths = {m.width[1] for n, m in modules.items() if n.endswith(("_attn.q", "_attn.k"))}
    diff_b = names.get("diff_b", frozenset())
    architecture = contents.metadata.get("modelspec.architecture")
    tests: dict[Feature, bool] = {
        "unknown": bool(contents.unknown),
        "alpha": bool(names.get("alpha")),
        "some_alpha_missing": len(alphas) < len(modules),
        "alpha_zero": 0 in alphas.values(),
        "alpha_negative": any(alpha < 0 for alpha in alphas.values()),
        "alpha_outside_blocks": bool(alphas.keys() - blocks),
        "adapter_metadata": DIFFUSERS_CONFIG in contents.metadata,
        "no_blocks": not blocks,
        "outside_blocks": bool(modules.keys() - blocks),
        "patch_embedding": "patch_embedding" in modules,
        "head": "head.head" in modules,
        "image_attention": any(is_for_images(name) for name in modules),
        "gap_in_blocks": any(
            len(linears) < len(BLOCK_LINEARS) for linears in linears_by_block(modules).values()
        ),
        "mixed_ranks": len({module.rank for module in modules.values()}) > 1,
        "orphans": bool(contents.orphans),
        "misfit": bool(modules) and fit is None,
        "not_14b_or_5b": not widths.issubset(INVOKE_WIDTHS),
        "no_detection_key": DETECTION_MODULE not in modules,
        "swarm_misses_width": architecture not in SWARM_ARCHITECTURES
        and not widths.issubset(SWARM_WIDTHS),
        "diff_b_on_some": bool(diff_b & modules.keys()) and not modules.keys() <= diff_b,
        "lokr_and_alpha": bool(names.get("lokr", frozenset()) & names.get("alpha", frozenset())),
    }
    told = {*contents.styles, *contents.spellings, *names}
    plain: list[Feature] = [feature for feature in get_args(Feature) if feature in told]
    return frozenset((*plain, *(feature for feature, has in tests.items() if has)))


def _key_findings(contents: Contents) -> Iterator[Finding]:
    factors = {"a", "b", "lokr", "lokr_factored", "loha"}
    if not factors & contents.parts.keys():
        yield Finding("error", "it holds no LoRA: no tensor is a factor of a module of Wan")
    if contents.unknown:
        yield _error_with_names("unknown keys", contents.unknown)
    if len(contents.styles) > 1:
        styles = ", ".join(f"{style} ({n} keys)" for style, n in contents.styles.items())
        yield Finding("error", f"layouts are mixed: {styles}; no loader takes all of them")
    for style in contents.styles:
        if style in STYLE_FAULTS:
            yield Finding("error", f"it has {STYLE_FAULTS[style]}: convert it to comfy")
    if len(contents.spellings) > 1:
        spellings = ", ".join(sorted(contents.spellings))
        yield Finding("error", f"factors are spelled in several ways: {spellings}")
    if contents.orphans:
        yield _error_with_names("modules with half a LoRA", contents.orphans)
    if contents.misshapen:
        yield _error_with_names("tensors of impossible shapes", contents.misshapen)


def _scale_findings(contents: Contents) -> Iterator[Finding]:
    alphas = {n: m.alpha for n, m in contents.modules.items() if m.alpha is not None}
    wrong = [f"{n}: {alpha:g}" for n, alpha in alphas.items() if not 0 < alpha <= MOST_ALPHA]
    if wrong:
        yield _error_with_names(f"alphas that are not in (0, {MOST_ALPHA:g}]", wrong)
    if 0 < len(alphas) < len(contents.modules):
        missing = len(contents.modules) - len(alphas)
        yield Finding("warning", f"{missing} of {len(contents.modules)} modules have no alpha")
    if DIFFUSERS_CONFIG in contents.metadata and "diffusers" not in contents.styles:
        level = "error" if alphas else "warning"
        yield Finding(level, f"it has {DIFFUSERS_CONFIG}, by which diffusers scales once more")
    ranks = sorted({module.rank for module in contents.modules.values()})
    if len(ranks) > 1:
        text = ", ".join(map(str, ranks))
        yield Finding("warning", f"mixed ranks ({text}): diffusers up to 0.38 scales them wrong")


def _shape_findings(contents: Contents, fit: Fit | None) -> Iterator[Finding]:
    modules = contents.modules
    if modules and fit is None:
        name, module = next(iter(modules.items()))
        yield Finding("error", f"no Wan model has these shapes: {name} is {module.width} (out, in)")
    if fit and fit.misfits:
        shown = [f"{name} {modules[name].width}" for name in fit.misfits]
        yield _error_with_names(f"modules that do not fit {fit.title}", shown)
    if fit and fit.beyond:
        layers = fit.family.facts.layers
        yield _error_with_names(f"modules beyond the {layers} blocks of the model", fit.beyond)
    if images := [name for name in modules if is_for_images(name)]:
        text = "modules for images, which only Wan 2.1 has; the rest loads in Wan 2.2"
        yield Finding("warning", f"{len(images)} {text}")
    linears = linears_by_block(modules)
    all_linears = set().union(*linears.values())
    if uneven := [f"blocks.{i}" for i, found in linears.items() if found < all_linears]:
        text = f"blocks that lack linears which others have: {_shown(uneven)}"
        yield Finding("warning", text)


def _value_findings(contents: Contents) -> Iterator[Finding]:
    if contents.not_finite:
        yield _error_with_names("tensors with NaN or infinity", contents.not_finite)
    if odd := contents.dtypes.keys() - PORTABLE:
        text = f"tensors of {', '.join(sorted(odd))}: only F32, F16 and BF16 load everywhere"
        yield Finding("warning", text)
    dead = dead_modules(contents)
    if dead and len(dead) == len(contents.modules):
        yield Finding("error", "B @ A is 0 in every module: it was never trained, and does nothing")
        return
    kinds = sorted({split_block(name)[1] for name in contents.modules})
    of_kind = {kind: {n for n in contents.modules if split_block(n)[1] == kind} for kind in kinds}
    if whole := [kind for kind in kinds if of_kind[kind].issubset(dead)]:
        text = f"B @ A is 0 in all blocks for {', '.join(whole)}: never trained, or filled up"
        yield Finding("warning", text)
    elif dead:
        yield Finding("warning", f"B @ A is 0 in {len(dead)} modules: {_shown(dead)}")


def _hash_findings(contents: Contents) -> Iterator[Finding]:
    entries, real = contents.metadata, contents.data_sha256
    ours = f"{OURS}format_version" in entries
    for key in ("sshs_model_hash", "modelspec.hash_sha256"):
        stored = entries.get(key, "").lower().removeprefix("0x")
        if stored and stored != real:
            text = (
                "the file is damaged or was changed" if ours else "sites will take it for another"
            )
            found = f"{key} begins with {stored[:12]!r}, the data's with {real[:12]!r}"
            yield Finding("error" if ours else "warning", f"{found}: {text}")
        elif ours and not stored:
            yield Finding("warning", f"{key} is missing, which our files have")
    if ours and entries[f"{OURS}format_version"] != FORMAT_VERSION:
        version = entries[f"{OURS}format_version"][:20]
        yield Finding("warning", f"our format version {version!r}; this program knows 1")
    rank = entries.get("ss_network_dim", "")
    ranks = {str(module.rank) for module in contents.modules.values()}
    if rank.isdecimal() and len(ranks) == 1 and rank not in ranks:
        text = f"ss_network_dim is {rank[:20]}, the tensors have rank {ranks.pop()}"
        yield Finding("warning", text)
    if contents.header_size > LARGE_HEADER:
        yield Finding("warning", f"a header of {contents.header_size:,} bytes; keep it under 1 MB")


def _name_findings(
    contents: Contents, fit: Fit | None, by_metadata: Expert | None, by_name: Expert | None
) -> Iterator[Finding]:
    if by_metadata and by_name and by_metadata != by_name:
        text = f"its name says {by_name}, its metadata say {by_metadata}: rename it"
        yield Finding("error", text)
    variants = fit.variants if fit else ()
    if variants and "high" in variants[0].experts and not (by_metadata or by_name):
        text = "neither name nor metadata say which expert it is for: high or low noise"
        yield Finding("warning", text)
    if by_name and all(facts.experts == ("single",) for facts in variants) and variants:
        text = f"InvokeAI reads {by_name} in its name, but {variants[0].title} has one transformer"
        yield Finding("warning", text)
    told = contents.metadata.get(f"{OURS}variant")
    if told in VARIANTS and fit and VARIANTS[told] not in variants:
        yield Finding("error", f"its metadata say {told}, its shapes {fit.title}")
    if word := next((w for w in FORBIDDEN_WORDS if w in contents.path.name.lower()), None):
        yield Finding("warning", f"diffusers passes over files with {word!r} in their name")


def dead_modules(contents: Contents) -> list[str]:
    """Modules whose B @ A is 0, in the order of the file."""
    return [name for name, module in contents.modules.items() if module.norm == 0]


def kinds_of_norms(contents: Contents) -> dict[str, float]:
    """The norm of the whole change at strength 1, by part of the model: "self_attn", "ffn" …"""
    squares: dict[str, float] = {}
    for name, module in contents.modules.items():
        part = split_block(name)[1].split(".")[0]
        norm = module.scale * (module.norm or 0.0)
        squares[part] = squares.get(part, 0.0) + norm * norm
    return {part: math.sqrt(square) for part, square in squares.items()}


def linears_by_block(modules: dict[str, Module]) -> dict[int, set[str]]:
    """Which of the 10 linears each block has, from block 0 to the last that has any."""
    found: dict[int, set[str]] = {}
    for name in modules:
        block, linear = split_block(name)
        if block is not None and linear in BLOCK_LINEARS.values():
            found.setdefault(block, set()).add(linear)
    return {block: found.get(block, set()) for block in range(max(found, default=-1) + 1)}


def _error_with_names(what: str, names: tuple[str, ...] | list[str]) -> Finding:
    return Finding("error", f"{len(names)} {what}: {_shown(names)}")


def _shown(names: tuple[str, ...] | list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
