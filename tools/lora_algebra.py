"""`merge` and `resize` of tools.lora: several adapters as one, and one of a smaller rank.

    python -m tools.lora merge fox_high_noise.safetensors:0.8 style_high_noise.safetensors:0.5 \
        --pair --out merged
    python -m tools.lora merge fox_high_noise.safetensors --pair --into models/Wan2.2-T2V-A14B \
        --out models/fox
    python -m tools.lora resize fox_high_noise.safetensors --pair --rank 8 --out small

The CPU is enough. One expert's adapter is in memory at a time; of a model, one tensor.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.lora_changes import (
    MERGED_FROM,
    Made,
    Output,
    add_kept,
    add_output,
    bare_name,
    common_dtype,
    expert_of,
    kept_of,
    kind_table,
    made,
    new_file,
    pair_paths,
    read_finite,
    write_made,
)
from tools.lora_files import how_to_load
from tools.lora_merge_base import merge_into_models
from wan.adapter_algebra import Kept, resized, weighted_sum
from wan.adapter_layouts import AdapterFile
from wan.adapter_names import Layout
from wan.headers import ModelError
from wan.lora_metadata import OURS
from wan.variants import Expert

# What identifies the model that an adapter is for: told by any file, it is told of their sum.
IDENTITY = (
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.timestep_range",
    "ss_base_model_version",
    f"{OURS}format_version",
    f"{OURS}variant",
    f"{OURS}expert",
    f"{OURS}boundary",
)
PAIR_ID = f"{OURS}pair_id"
TITLE, TRIGGER = "modelspec.title", "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Part:
    """An adapter of a sum."""

    file: AdapterFile
    strength: float


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `merge` and `resize` to tools.lora."""
    merging = subparsers.add_parser(
        "merge", help="several adapters as one, or adapters into a model's weights"
    )
    merging.add_argument("adapters", nargs="+", metavar="FILE[:STRENGTH]")
    merging.add_argument("--pair", action="store_true", help="also the other expert's file of each")
    merging.add_argument(
        "--into", type=Path, metavar="MODEL", help="a model's file or folder, in safetensors"
    )
    merging.add_argument("--name", help="of the new file, without its expert")
    add_kept(merging)
    add_output(merging, "comfy")
    merging.set_defaults(run=merge)

    resizing = subparsers.add_parser("resize", help="the nearest adapter of a smaller rank")
    resizing.add_argument("files", nargs="+", type=Path, metavar="FILE")
    resizing.add_argument(
        "--pair", action="store_true", help="also the other expert's file of each"
    )
    add_kept(resizing)
    add_output(resizing, "the file's layout")
    resizing.set_defaults(run=resize)


def merge(args: argparse.Namespace) -> None:
    """Add up adapters, by themselves or into a model, and say what came of it."""
    if args.into is not None:
        _refuse_without_effect(args)
    kept = kept_of(args)
    layout: Layout = args.layout or "comfy"
    sides = [_side(paths) for paths in _sides(args.adapters, args.pair)]
    experts: list[Expert | None] = [_common_expert([part.file for part in side]) for side in sides]
    if args.into is not None:
        changes = [[(part.file, part.strength) for part in side] for side in sides]
        groups = list(zip(experts, changes, strict=True))
        print("\n".join(merge_into_models(args.into, groups, args.out)))
        return
    name = args.name or "+".join(dict.fromkeys(bare_name(part.file.path) for part in sides[0]))
    targets = [new_file(args.out, name, expert, layout) for expert in experts]
    written: list[Path] = []
    for side, target in zip(sides, targets, strict=True):
        dtype = common_dtype([part.file for part in side], args.dtype)
        modules = merged(side, kept, dtype)
        output = Output(args.out, layout, dtype, args.outside_blocks)
        written.append(write_made(target, modules, merged_metadata(side), output))
        told = " + ".join(f"{part.strength:g} x {part.file.path.stem}" for part in side)
        print("\n".join([f"{target.name} = {told}", *kind_table(modules), ""]))
    base_model = merged_metadata(sides[0]).get("ss_base_model_version", "")
    print("\n".join(how_to_load(written, layout, base_model)))


def resize(args: argparse.Namespace) -> None:
    """Write each adapter in a smaller rank and say what it lost."""
    kept = kept_of(args)
    if kept.is_all:
        raise ModelError("resize needs --rank, --energy or both: how much is to be kept")
    paths = [p for path in args.files for p in (pair_paths(path).values() if args.pair else [path])]
    files = [read_finite(path) for path in dict.fromkeys(paths)]
    layouts: set[Layout] = {file.layout for file in files}
    layout: Layout = args.layout or (next(iter(layouts)) if len(layouts) == 1 else "comfy")
    targets = [new_file(args.out, bare_name(f.path), expert_of(f), layout) for f in files]
    written: list[Path] = []
    for file, target in zip(files, targets, strict=True):
        dtype = common_dtype([file], args.dtype)
        modules = {name: made(f, resized(f, kept), dtype) for name, f in file.modules.items()}
        output = Output(args.out, layout, dtype, args.outside_blocks)
        written.append(write_made(target, modules, file.metadata, output))
        print("\n".join([f"{target.name}:", *kind_table(modules), ""]))
    base_model = files[0].metadata.get("ss_base_model_version", "")
    print("\n".join(how_to_load(written, layout, base_model)))


def merged(side: Sequence[Part], kept: Kept, dtype: torch.dtype) -> dict[str, Made]:
    """The sum of strength * dW, module by module, in the rank and dtype that are asked for."""
    modules: dict[str, Made] = {}
    for module in dict.fromkeys(name for part in side for name in part.file.modules):
        having = [part for part in side if module in part.file.modules]
        total = weighted_sum([(part.file.modules[module], part.strength) for part in having])
        modules[module] = made(total, resized(total, kept), dtype)
    return modules


def merged_metadata(side: Sequence[Part]) -> dict[str, str]:
    """What holds of the sum: what all files say alike, which model it is for, where it is from.

    The two experts of a pair get one pair id, told from theirs and from the strengths.
    """
    told = [part.file.metadata for part in side]
    entries = {k: v for k, v in told[0].items() if all(other.get(k) == v for other in told)}
    ours = [other for other in told if f"{OURS}expert" in other]
    entries |= {key: ours[0][key] for key in IDENTITY if ours and key in ours[0]}
    titles = [part.file.metadata.get(TITLE) or bare_name(part.file.path) for part in side]
    entries[TITLE] = " + ".join(dict.fromkeys(titles))
    entries[MERGED_FROM] = ", ".join(f"{p.file.path.stem}:{p.strength:g}" for p in side)
    if triggers := dict.fromkeys(other[TRIGGER] for other in told if TRIGGER in other):
        entries[TRIGGER] = ", ".join(triggers)
    if all(PAIR_ID in other for other in told):
        pairs = [f"{part.file.metadata[PAIR_ID]}:{part.strength!r}" for part in side]
        entries[PAIR_ID] = hashlib.sha256("\n".join(pairs).encode()).hexdigest()[:16]
    if any("ss_network_dim" in other for other in told):
        entries["ss_network_dim"] = ""  # the writer puts in the new rank
    return entries


def _sides(texts: Sequence[str], pair: bool) -> list[list[tuple[Path, float]]]:
    """Files with their strengths: one list, or that of the high expert and that of the low one."""
    given = [_with_strength(text) for text in texts]
    if not pair:
        return [given]
    pairs = [(pair_paths(path), strength) for path, strength in given]
    experts: tuple[Expert, Expert] = ("high", "low")
    return [[(paths[expert], strength) for paths, strength in pairs] for expert in experts]


def _with_strength(text: str) -> tuple[Path, float]:
    """(file, strength) of "fox.safetensors:0.8"; the strength is 1 if there is none."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        if not Path(name).exists():  # a colon of the path itself
            return Path(text), 1.0
        strength = math.nan
    if not math.isfinite(strength) or not strength:
        raise ModelError(
            f"{text}: {number!r} is no strength; expected a number other than 0, such as {name}:0.8"
        )
    return Path(name), strength


def _side(given: Sequence[tuple[Path, float]]) -> list[Part]:
    """The adapters of a sum; `ModelError` if two of them are not for one model."""
    side = [Part(read_finite(path), strength) for path, strength in given]
    widths: dict[str, tuple[Path, tuple[int, int]]] = {}
    variants: dict[str, Path] = {}
    for file in (part.file for part in side):
        if variant := file.metadata.get(f"{OURS}variant"):
            variants[variant] = file.path
        for module, factors in file.modules.items():
            width = (factors.b.shape[0], factors.a.shape[1])
            first, expected = widths.setdefault(module, (file.path, width))
            if width != expected:
                raise ModelError(
                    f"{file.path} and {first} are for two models: {module} is {width} in the one "
                    f"and {expected} in the other (out, in); merge adapters of one model"
                )
    if len(variants) > 1:
        found = " and ".join(f"{path} is for {variant}" for variant, path in variants.items())
        raise ModelError(f"{found}: merge adapters of one model")
    return side


def _common_expert(files: Sequence[AdapterFile]) -> Expert | None:
    """The expert that the files tell; `ModelError` if they tell two."""
    told: dict[Expert, Path] = {e: file.path for file in files if (e := expert_of(file))}
    if len(told) > 1:
        found = " and ".join(f"{path} is of {expert} noise" for expert, path in told.items())
        raise ModelError(
            f"{found}: each expert needs its own file; merge high with high and low with low"
        )
    return next(iter(told), None)


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """A model keeps its own layout, names and dtype, and takes all of an adapter."""
    given = {
        "--to": args.layout,
        "--dtype": args.dtype,
        "--rank": args.rank,
        "--energy": args.energy,
        "--name": args.name,
        "--outside-blocks": args.outside_blocks or None,
    }
    if useless := [option for option, value in given.items() if value is not None]:
        raise ModelError(
            f"{', '.join(useless)} has no effect with --into: the model keeps its layout, names "
            "and dtype, and takes the whole adapter; leave it out"
        )
