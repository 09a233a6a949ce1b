"""What an adapter file holds, module by module, without ever holding more than a few tensors.

Source: `spec/lora_formats.md` sections 1.3, 2 and 6.4.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wan.adapter_keys import Key, Style, understand
from wan.adapter_stream import Stored, read_strict_header, short, stream_tensors

MOST_FACTOR = 1 << 24  # values of a factor: at rank 1024, those of the widest layer are fewer


@dataclass(frozen=True)
class Module:
    """A linear (or the patch embedding) with both factors of a LoRA."""

    rank: int
    width: tuple[int, int]  # (out, in); of a convolution, in times its kernel
    alpha: float | None
    norm: float | None  # Frobenius norm of B @ A, without the scale; None if it was not computed

    @property
    def scale(self) -> float:
        """What a loader multiplies B @ A with at strength 1: alpha / rank, or 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Contents:
    """An adapter file, as it is. Names of lists are those in the file, fit to be printed."""

    path: Path
    size: int  # bytes
    header_size: int
    metadata: dict[str, str]
    tensors: int
    styles: Counter[Style]  # -> tensors
    spellings: frozenset[str]
    parts: dict[str, frozenset[str]]  # kind of tensor, as Key.part -> official modules that have it
    dtypes: Counter[str]  # -> tensors, those of alpha apart if there are others
    modules: dict[str, Module]  # by official name
    orphans: tuple[str, ...]  # modules with one factor, or an alpha and none
    unknown: tuple[str, ...]
    misshapen: tuple[str, ...]
    not_finite: tuple[str, ...]
    data_sha256: str
    file_sha256: str


@dataclass
class _Tally:
    """What was seen so far; factors wait here, reduced, for their partners."""

    styles: Counter[Style] = field(default_factory=Counter)
    spellings: set[str] = field(default_factory=set)
    parts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    dtypes: Counter[str] = field(default_factory=Counter)
    alpha_dtypes: Counter[str] = field(default_factory=Counter)
    shapes: dict[tuple[Style, str, str], tuple[int, int]] = field(default_factory=dict)
    grams: dict[tuple[Style, str], Tensor] = field(default_factory=dict)
    norms: dict[tuple[Style, str], float] = field(default_factory=dict)
    alphas: dict[tuple[Style, str], float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


def read_contents(path: Path) -> Contents:
    """All of an adapter file, read once. `ModelError` if it is no whole safetensors file."""
    header = read_strict_header(path)
    data, whole = hashlib.sha256(), hashlib.sha256(header.before)
    tally = _Tally()
    for stored, pieces in stream_tensors(header, (data, whole)):
        key = understand(stored.name)
        if key is None:
            tally.unknown.append(short(stored.name))
        else:
            _take(tally, key, stored, pieces)
    modules, orphans = _modules(tally)
    return Contents(
        path=path,
        size=header.size,
        header_size=len(header.before),
        metadata=header.metadata,
        tensors=len(header.tensors),
        styles=tally.styles,
        spellings=frozenset(tally.spellings),
        parts={part: frozenset(found) for part, found in tally.parts.items()},
        dtypes=tally.dtypes or tally.alpha_dtypes,
        modules=modules,
        orphans=orphans,
        unknown=tuple(tally.unknown),
        misshapen=tuple(tally.misshapen),
        not_finite=tuple(tally.not_finite),
        data_sha256=data.hexdigest(),
        file_sha256=whole.hexdigest(),
    )


def _take(tally: _Tally, key: Key, stored: Stored, pieces: Iterator[Tensor]) -> None:
    tally.styles[key.style] += 1
    tally.parts[key.part].add(key.module)
    (tally.alpha_dtypes if key.part == "alpha" else tally.dtypes)[stored.dtype] += 1
    if key.part == "alpha":
        _take_alpha(tally, key, stored, pieces)
    elif key.part in ("a", "b"):
        tally.spellings.add(key.spelling)
        _take_factor(tally, key, stored, pieces)
    elif not all(_is_finite(piece.float()) for piece in pieces):
        tally.not_finite.append(short(stored.name))


def _take_alpha(tally: _Tally, key: Key, stored: Stored, pieces: Iterator[Tensor]) -> None:
    values = [piece.float() for piece in pieces]
    if stored.shape not in ((), (1,)):
        tally.misshapen.append(f"{short(stored.name)} {stored.shape}")
        return
    alpha = float(values[0])
    tally.alphas[key.style, key.module] = alpha
    if not math.isfinite(alpha):
        tally.not_finite.append(short(stored.name))


def _take_factor(tally: _Tally, key: Key, stored: Stored, pieces: Iterator[Tensor]) -> None:
    """Note the shape, and keep no more of the values than the norm of B @ A needs."""
    shape = stored.shape
    place: tuple[Style, str] = (key.style, key.module)
    if len(shape) not in (2, 5) or not 0 < math.prod(shape) <= MOST_FACTOR:
        tally.misshapen.append(f"{short(stored.name)} {shape}")
        return
    rows, columns = shape[0], math.prod(shape[1:])
    tally.shapes[*place, key.part] = (rows, columns)
    is_a = key.part == "a"
    rank, width = (rows, columns) if is_a else (columns, rows)
    values = torch.cat(list(pieces)).view(rows, columns)
    if not _is_finite(values.float()):
        tally.not_finite.append(short(stored.name))
    elif rank <= width:  # else its Gram matrix would be larger than the factor
        _take_gram(tally, place, (values if is_a else values.T).double())


def _take_gram(tally: _Tally, place: tuple[Style, str], factor: Tensor) -> None:
    """The norm of B @ A from A @ A.T and B.T @ B, once both are known; `factor`: (rank, width)."""
    gram, other = factor @ factor.T, tally.grams.pop(place, None)  # (rank, rank)
    if other is None:
        tally.grams[place] = gram
    elif other.shape == gram.shape:
        tally.norms[place] = math.sqrt(max(float((gram * other).sum()), 0.0))


def _is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity: a NaN is both ends of its tensor."""
    return values.numel() == 0 or all(math.isfinite(end) for end in values.aminmax())


def _modules(tally: _Tally) -> tuple[dict[str, Module], tuple[str, ...]]:
    """Modules with both factors, and what lacks one."""
    modules: dict[str, Module] = {}
    orphans: list[str] = []
    factors: list[tuple[Style, str]] = [(style, module) for style, module, _ in tally.shapes]
    lokr = {m for part in ("lokr", "lokr_factored", "loha") for m in tally.parts.get(part, ())}
    for style, module in dict.fromkeys((*factors, *tally.alphas)):
        a, b = (tally.shapes.get((style, module, part)) for part in ("a", "b"))
        if a is None or b is None:
            if module not in lokr:  # their alphas belong to factors of another kind
                orphans.append(module)
        elif a[0] != b[1]:
            tally.misshapen.append(f"{module}: A {a} and B {b}, expected (rank, in), (out, rank)")
        else:
            alpha, norm = tally.alphas.get((style, module)), tally.norms.get((style, module))
            modules.setdefault(module, Module(a[0], (b[0], a[1]), alpha, norm))
    return modules, tuple(orphans)
