"""`diff` of tools.lora: how far two adapters are from each other, by block and by kind of linear.

    python -m tools.lora diff fox_high_noise.safetensors other_high_noise.safetensors
    python -m tools.lora diff fox_low_noise.safetensors other_low_noise.safetensors --pair --json

The cosine is that of the two changes dW as vectors; the difference is ||A - B|| / ||A||.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from tools.lora_changes import pair_paths, read_finite
from wan.adapter_algebra import inner_product, squared_distance
from wan.adapter_layouts import AdapterFile
from wan.adapter_names import block_linear
from wan.headers import ModelError

Row = dict[str, float | None]
OUTSIDE = "outside"  # of the blocks


@dataclass(frozen=True)
class Pairing:
    """The squared norms of one linear's two changes, of their difference, and their product."""

    first: float
    second: float
    distance: float
    product: float


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `diff` to tools.lora."""
    parser = subparsers.add_parser("diff", help="how far two adapters are from each other")
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--pair", action="store_true", help="also the other experts' files")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every module")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table of each two files, or one JSON object about all."""
    both = [(args.first, args.second)]
    if args.pair:
        firsts, seconds = pair_paths(args.first), pair_paths(args.second)
        both = [(firsts[expert], seconds[expert]) for expert in ("high", "low")]
    found: list[dict[str, object]] = []
    for first, second in both:
        files = read_finite(first), read_finite(second)
        pairings = compared(*files)
        if args.json:
            found.append(_as_json(*files, pairings))
        else:
            print("\n".join(_table(*files, pairings)))
    if args.json:
        print(json.dumps({"comparisons": found}, indent=2))


def compared(first: AdapterFile, second: AdapterFile) -> dict[str, Pairing]:
    """Each linear that one of the two changes; `ModelError` if they are not for one model."""
    pairings: dict[str, Pairing] = {}
    for module in dict.fromkeys([*first.modules, *second.modules]):
        a, b = first.modules.get(module), second.modules.get(module)
        if a and b:
            widths = [(f.b.shape[0], f.a.shape[1]) for f in (a, b)]
            if widths[0] != widths[1]:
                raise ModelError(
                    f"{first.path} and {second.path} are for two models: {module} is {widths[0]} "
                    f"in the one and {widths[1]} in the other (out, in); compare two of one model"
                )
            distance, product = squared_distance(a, b), inner_product(a, b)
            pairings[module] = Pairing(inner_product(a, a), inner_product(b, b), distance, product)
        else:
            norms = [inner_product(f, f) if f else 0.0 for f in (a, b)]
            pairings[module] = Pairing(norms[0], norms[1], sum(norms), 0.0)
    return pairings


def _row(pairings: Iterable[Pairing]) -> Row:
    """Of several linears as one vector; None for what a change of 0 has not."""
    listed = list(pairings)
    first, second = (
        max(sum(v), 0.0) for v in ([p.first for p in listed], [p.second for p in listed])
    )
    distance, product = sum(p.distance for p in listed), sum(p.product for p in listed)
    size = sqrt(first) * sqrt(second)
    return {
        "norm_a": sqrt(first),
        "norm_b": sqrt(second),
        "difference": sqrt(distance / first) if first else None,
        "cosine": max(-1.0, min(1.0, product / size)) if size else None,
    }


def _grouped(pairings: dict[str, Pairing], group: Callable[[str], str]) -> dict[str, Row]:
    groups: dict[str, list[Pairing]] = {}
    for module, pairing in pairings.items():
        groups.setdefault(group(module), []).append(pairing)
    return {name: _row(members) for name, members in groups.items()}


def _block(module: str) -> str:
    place = block_linear(module)
    return str(place[0]) if place else OUTSIDE


def _kind(module: str) -> str:
    place = block_linear(module)
    return place[1] if place else module


def _in_order(blocks: Iterable[str]) -> list[str]:
    return sorted(blocks, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))


def _as_json(
    first: AdapterFile, second: AdapterFile, pairings: dict[str, Pairing]
) -> dict[str, object]:
    blocks = _grouped(pairings, _block)
    return {
        "a": str(first.path),
        "b": str(second.path),
        "all": _row(pairings.values()),
        "kinds": _grouped(pairings, _kind),
        "blocks": {name: blocks[name] for name in _in_order(blocks)},
        "modules": _grouped(pairings, str),
        "only_in_a": sorted(first.modules.keys() - second.modules.keys()),
        "only_in_b": sorted(second.modules.keys() - first.modules.keys()),
    }


def _table(first: AdapterFile, second: AdapterFile, pairings: dict[str, Pairing]) -> list[str]:
    blocks = _grouped(pairings, _block)
    lines = [
        f"A {first.path}",
        f"B {second.path}",
        f"  {'':<18} {'norm A':>9} {'norm B':>9} {'difference':>11} {'cosine':>8}",
    ]
    lines += [_line(kind, row) for kind, row in _grouped(pairings, _kind).items()]
    lines += [_line(f"block {name}", blocks[name]) for name in _in_order(blocks)]
    lines.append(_line("all", _row(pairings.values())))
    for name, one, other in (("A", first, second), ("B", second, first)):
        if only := sorted(one.modules.keys() - other.modules.keys()):
            lines.append(f"  {len(only)} modules are in {name} alone, such as {only[0]}")
    return [*lines, ""]


def _line(name: str, row: Row) -> str:
    difference, cosine = row["difference"], row["cosine"]
    shares: Sequence[str] = (
        "-" if difference is None else f"{difference:.2%}",
        "-" if cosine is None else f"{cosine:.4f}",
    )
    norms = f"{row['norm_a']:>9.4g} {row['norm_b']:>9.4g}"
    return f"  {name:<18} {norms} {shares[0]:>11} {shares[1]:>8}"
