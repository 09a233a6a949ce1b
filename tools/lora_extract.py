"""`extract` of tools.lora: the adapter that turns one model into a tuned one, as far as one can.

    python -m tools.lora extract models/Wan2.2-T2V-A14B tuned/high_noise.safetensors --rank 64 \
        --out extracted

The two may be in different layouts. Linear by linear: the factors nearest to W_tuned - W_base, and
how much of its energy they hold. What no LoRA holds (norms, biases, modulation) is reported.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import torch
from torch import Tensor

from tools.lora_changes import (
    MERGED_FROM,
    Made,
    Output,
    add_kept,
    add_output,
    held,
    kept_of,
    kind_table,
    new_file,
    write_made,
)
from tools.lora_files import DTYPES, how_to_load
from wan.adapter_algebra import Kept, low_rank, rounded, squared_norm
from wan.adapter_names import Layout, block_linear, read_stem
from wan.headers import ModelError
from wan.lora_metadata import IMPLEMENTATION, OURS
from wan.recognise import Found, is_called_wan_21
from wan.stored_tensors import transformers_at, whole_readers
from wan.variants import VARIANTS, Expert, Variant

ROUNDED = ("fp8", "gguf")  # storages whose rounding is as large as a small training


@dataclass(frozen=True)
class Extract:
    """An adapter of the difference of two models, and what it does not hold."""

    modules: dict[str, Made]
    left_out: dict[str, tuple[int, float, float]]  # by kind: tensors, ||change||^2, ||W||^2


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `extract` to tools.lora."""
    parser = subparsers.add_parser("extract", help="an adapter from a model and a tuned one")
    parser.add_argument("base", type=Path, metavar="BASE", help="a file or folder, any layout")
    parser.add_argument("tuned", type=Path, metavar="TUNED")
    parser.add_argument("--name", default="extracted", help="of the new files")
    add_kept(parser)
    add_output(parser, "comfy")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the adapter of each expert that the tuned model has, and say what it holds."""
    kept, dtype = kept_of(args), DTYPES[args.dtype or "bf16"]
    layout: Layout = args.layout or "comfy"
    if kept.is_all:
        raise ModelError("extract needs --rank, --energy or both: how much is to be kept")
    models = _matched(args.base, args.tuned)
    targets = [new_file(args.out, args.name, expert, layout) for expert, _, _ in models]
    written: list[Path] = []
    for (expert, base, tuned), target in zip(models, targets, strict=True):
        extract = extracted(base, tuned, kept, dtype, args.outside_blocks)
        entries = _metadata(base, tuned, expert, target.stem)
        output = Output(args.out, layout, dtype, args.outside_blocks)
        written.append(write_made(target, extract.modules, entries, output))
        print("\n".join([f"{target.name}:", *_report(base, tuned, extract), ""]))
    variant = variant_of(models[0][1])
    print("\n".join(how_to_load(written, layout, variant.base_model if variant else "")))


def extracted(
    base: Found, tuned: Found, kept: Kept, dtype: torch.dtype, outside_blocks: bool
) -> Extract:
    """The adapter of tuned - base; of the models, a tensor of each is in memory at a time.

    `ModelError` if no linear differs, or if a value is NaN.
    """
    readers = whole_readers(base), whole_readers(tuned)
    modules: dict[str, Made] = {}
    left_out: dict[str, tuple[int, float, float]] = {}
    for name in readers[0]:
        change, size = _change(name, readers, tuned.place)
        energy = squared_norm(change)
        if not energy:
            continue
        module = _linear(name)
        if module is None or (block_linear(module) is None and not outside_blocks):
            count, changes, sizes = left_out.get(_kind(name), (0, 0.0, 0.0))
            left_out[_kind(name)] = count + 1, changes + energy, sizes + size
            continue
        modules[module] = made_of(change, kept, dtype)
    if not modules:
        raise ModelError(
            f"{base.place} and {tuned.place} differ in no linear that an adapter can hold"
            + ("; give --outside-blocks for those outside the blocks" if left_out else "")
        )
    return Extract(modules, left_out)


def made_of(change: Tensor, kept: Kept, dtype: torch.dtype) -> Made:
    """The factors nearest to a change (out, in), which is used up, and what they lack of it."""
    factors, wanted = low_rank(change, kept), squared_norm(change)
    as_stored = rounded(factors, dtype)
    change.addmm_(as_stored.b, as_stored.a, alpha=-1)
    return Made(held(factors, dtype), wanted, squared_norm(change))


def _matched(base: Path, tuned: Path) -> list[tuple[Expert, Found, Found]]:
    """The models to compare, by expert; `ModelError` unless each has its like."""
    bases, others = transformers_at(base), transformers_at(tuned)
    models: list[tuple[Expert, Found, Found]]
    if len(bases) == len(others) == 1 and "single" in (*bases, *others):
        told: list[Expert] = [e for e in (*others, *bases) if e != "single"]
        expert = told[0] if told else "single"
        models = [(expert, next(iter(bases.values())), next(iter(others.values())))]
    else:
        models = [(e, bases[e], found) for e, found in others.items() if e in bases]
    if len(models) < len(others):
        found = [
            f"{place} has {' and '.join(of)}" for place, of in ((base, bases), (tuned, others))
        ]
        raise ModelError(f"{'; '.join(found)}: give the same experts of both (see their names)")
    for _, one, other in models:
        _check_one_model(one, other)
    return models


def _check_one_model(base: Found, tuned: Found) -> None:
    for name in sorted({*base.shapes, *tuned.shapes}):
        shapes = [found.shapes.get(name, "missing") for found in (base, tuned)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{base.place} and {tuned.place} are of two models: {name} is {shapes[0]} in the "
                f"one and {shapes[1]} in the other; give the model that the tuned one is from"
            )


def _change(
    name: str, readers: tuple[Mapping[str, Callable[[], Tensor]], ...], place: Path
) -> tuple[Tensor, float]:
    """(tuned - base in fp32, squared norm of the base) of a tensor."""
    base, tuned = (side[name]() for side in readers)
    size = squared_norm(base)
    change = tuned.sub_(base)
    if not all(isfinite(end) for end in change.aminmax()):
        raise ModelError(f"{place}: {name} differs by NaN or infinite values: a file is damaged")
    return change, size


def _linear(name: str) -> str | None:
    """The official name of the linear whose weight this is; None for norms, biases and the like."""
    stem = read_stem(f"transformer.{name.removesuffix('.weight')}")
    return stem[1] if stem and name.endswith(".weight") else None


def _kind(name: str) -> str:
    """A tensor's name without the number of its block."""
    parts = name.split(".")
    return ".".join(parts[2:] if parts[0] == "blocks" else parts)


def variant_of(found: Found) -> Variant | None:
    """The variant of Wan 2.2 whose shapes these are; none for Wan 2.1, which has T2V-A14B's."""
    if is_called_wan_21(found.files[0]):
        return None
    patch, blocks = found.shapes["patch_embedding.weight"], _blocks(found)
    fits = (
        variant
        for variant in VARIANTS.values()
        if (variant.transformer.dim, variant.in_channels) == patch[:2]
        and variant.transformer.layers == blocks
    )
    return next(fits, None)


def _blocks(found: Found) -> int:
    return len({name.split(".")[1] for name in found.shapes if name.startswith("blocks.")})


def _metadata(base: Found, tuned: Found, expert: Expert, title: str) -> dict[str, str]:
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        MERGED_FROM: f"{tuned.place.stem} - {base.place.stem}",
        "ss_network_module": "wan.lora",
        "ss_network_dim": "",  # the writer puts in the rank
    }
    variant = variant_of(base)
    if variant:
        entries |= {
            "modelspec.architecture": variant.architecture,
            "ss_base_model_version": variant.base_model,
            f"{OURS}variant": variant.name,
        }
    if expert != "single" or (variant and expert in variant.experts):
        entries[f"{OURS}expert"] = expert
    return entries


def _report(base: Found, tuned: Found, extract: Extract) -> list[str]:
    found = extract.modules.values()
    wanted, error = sum(one.wanted for one in found), sum(one.error for one in found)
    lines = [*kind_table(extract.modules), f"  captured energy {max(1 - error / wanted, 0):.3%}"]
    for kind, (count, change, size) in sorted(extract.left_out.items()):
        share = f" ({sqrt(change / size):.2%} of it)" if size else ""
        lines.append(
            f"  not in the adapter: {kind}, {count} tensors, norm of the change "
            f"{sqrt(change):.4g}{share}"
        )
    for model in (base, tuned):
        if model.storage.startswith(ROUNDED):
            lines.append(
                f"  {model.place.name} is {model.storage}: its rounding is part of the difference"
            )
    return lines
