"""What merge, resize and extract share: how much is kept, what was lost, and how it is written."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import get_args

import torch

from tools.lora_files import DTYPES, convert_file
from wan.adapter_algebra import Kept, inner_product, rounded, squared_distance
from wan.adapter_layouts import PEFT_WEIGHTS, AdapterFile, pair_of, read_any
from wan.adapter_names import Layout, block_linear
from wan.adapter_values import Factors
from wan.headers import ModelError
from wan.lora_format import SUFFIX_OF_EXPERT, checked_name
from wan.lora_metadata import OURS
from wan.recognise import expert_by_name
from wan.variants import Expert

MERGED_FROM = "modelspec.merged_from"
STALE = (
    f"{OURS}heldout_loss",
    f"{OURS}best_heldout_loss",
    "modelspec.thumbnail",
)  # of what the file was before


@dataclass(frozen=True)
class Output:
    """How a new adapter is written."""

    folder: Path
    layout: Layout
    dtype: torch.dtype
    outside_blocks: bool


@dataclass(frozen=True)
class Made:
    """One module of a new adapter, and how far it is from what it stands for."""

    factors: Factors
    wanted: float  # ||dW||^2 of what it stands for
    error: float  # ||dW - dW'||^2, with the rounding of the file


def made(wanted: Factors, found: Factors, dtype: torch.dtype) -> Made:
    """`found` as a file of `dtype` holds it, measured against what it stands for."""
    error = squared_distance(wanted, rounded(found, dtype))
    return Made(held(found, dtype), inner_product(wanted, wanted), error)


def held(factors: Factors, dtype: torch.dtype) -> Factors:
    """The same with scale 1, in as little memory as a file of `dtype` needs."""
    # But fp16 as fp32: what writes the file tells what fp16 cannot hold.
    small = torch.float32 if dtype == torch.float16 else dtype
    whole = rounded(factors, small)
    return Factors(whole.a.to(small), whole.b.to(small), 1.0)


def add_kept(parser: argparse.ArgumentParser) -> None:
    """--rank and --energy."""
    parser.add_argument("--rank", type=int, help="the largest rank of a module")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="such as 0.99 of the square of each module's norm, in the least rank that holds it; "
        "a file has one rank, the largest of its modules'",
    )


def add_output(parser: argparse.ArgumentParser, layout: str) -> None:
    """--to, --dtype, --outside-blocks and --out; `layout` says which it is by default."""
    parser.add_argument(
        "--to",
        choices=get_args(Layout),
        dest="layout",
        help=f"{layout} by default",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="that of the files, if not given")
    parser.add_argument(
        "--outside-blocks",
        action="store_true",
        help="keep adapters on text, time and head linears, which some loaders skip",
    )
    parser.add_argument("--out", required=True, type=Path, help="a folder")


def kept_of(args: argparse.Namespace) -> Kept:
    """What --rank and --energy say; `ModelError` if they cannot be."""
    return Kept(args.rank, args.energy)


def read_finite(path: Path) -> AdapterFile:
    """The adapter in a file; `ModelError` if a value is NaN or infinite."""
    file = read_any(path)
    for module, factors in file.modules.items():
        for tensor in (factors.a, factors.b):
            if not all(isfinite(end) for end in tensor.float().aminmax()):
                raise ModelError(f"{path}: {module} has NaN or infinite values: training diverged")
    return file


def pair_paths(path: Path) -> dict[Expert, Path]:
    """Both files of a pair, by one of them; `ModelError` if the other is not there."""
    pair = pair_of(path)
    if len(pair) < 2:
        raise ModelError(
            f"{path}: the other expert's file is not beside it; expected names that differ in "
            "high_noise and low_noise alone. Do each file by itself, without --pair"
        )
    return pair


def expert_of(file: AdapterFile) -> Expert | None:
    """The expert by the metadata, else by the name; `ModelError` if the two contradict."""
    told, by_name = file.metadata.get(f"{OURS}expert"), expert_by_name(file.path)
    if told in ("high", "low") and by_name not in (None, told):
        raise ModelError(
            f"{file.path} is of the {told} noise expert by its metadata and of {by_name} noise by "
            "its name: were two files swapped? Give it its right name"
        )
    experts: dict[str | None, Expert] = {expert: expert for expert in SUFFIX_OF_EXPERT}
    return experts.get(told) or by_name


def common_dtype(files: Sequence[AdapterFile], asked: str | None) -> torch.dtype:
    """That which was asked for, or the one of all tensors; fp32 if they have several."""
    if asked:
        return DTYPES[asked]
    found = {t.dtype for file in files for f in file.modules.values() for t in (f.a, f.b)}
    return found.pop() if len(found) == 1 else torch.float32


def bare_name(path: Path) -> str:
    """What an adapter is called, without its expert."""
    name = path.absolute().parent.name if path.name == PEFT_WEIGHTS else path.stem
    name = path.name if path.is_dir() else name
    return re.sub(r"[-_. ]?(high|low)[-_ ]?noise", "", name, flags=re.IGNORECASE) or name


def new_file(folder: Path, name: str, expert: Expert | None, layout: Layout) -> Path:
    """Where a new adapter goes; `ModelError` if something is there, or the name cannot be."""
    stem = checked_name(f"{name}{SUFFIX_OF_EXPERT[expert or 'single']}")
    target = folder / stem / PEFT_WEIGHTS if layout == "peft" else folder / f"{stem}.safetensors"
    if target.exists():
        raise ModelError(f"{target} exists; choose another folder with --out")
    return target


def write_made(
    target: Path, modules: Mapping[str, Made], metadata: Mapping[str, str], output: Output
) -> Path:
    """Write a new adapter at a place of `new_file`."""
    factors = {module: found.factors for module, found in modules.items()}
    entries = {name: value for name, value in metadata.items() if name not in STALE}
    file = AdapterFile(target, output.layout, factors, entries)
    return convert_file(file, output.folder, output.layout, output.dtype, output.outside_blocks)


def kind_table(modules: Mapping[str, Made]) -> list[str]:
    """Rank, norm and error by kind of linear, and of all together."""
    kinds: dict[str, list[Made]] = {}
    for module, found in modules.items():
        place = block_linear(module)
        kinds.setdefault(place[1] if place else module, []).append(found)
    lines = [f"  {'kind':<18} {'modules':>7}  {'rank':<10} {'norm':>9}  {'error':>8}"]
    lines += [_row(kind, found) for kind, found in kinds.items()]
    return [*lines, _row("all", list(modules.values()))]


def _row(kind: str, found: Sequence[Made]) -> str:
    ranks = [one.factors.rank for one in found]
    span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    wanted, error = sum(one.wanted for one in found), sum(one.error for one in found)
    share = f"{sqrt(error / wanted):.2%}" if wanted else "-"
    return f"  {kind:<18} {len(found):>7}  {span:<10} {sqrt(max(wanted, 0)):>9.4g}  {share:>8}"
