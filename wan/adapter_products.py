"""LoHa and LoKr in adapter files: written as LyCORIS names them, read as the plain LoRA they equal.

A Hadamard product of two products of rank r is a product of rank r^2, a Kronecker product with
w1 (p, q) one of rank q r: exactly, so that whatever reads plain LoRA can have these too. Shapes are
told in `wan.adapter_kinds`. Source: `spec/lora_formats.md` section 2.E.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from wan.adapter_values import DTYPES, Factors
from wan.headers import ModelError

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
PRODUCT = re.compile(r"(.+?)\.(?:lora_A\.)?((?:hada|lokr)_\w+)")  # module, part; in a state or file

MOST_RANK = 4096  # of the plain LoRA: a hostile file could ask for any


def written_products(
    parts: Mapping[str, Mapping[str, Tensor]], scale: float, dtype: torch.dtype
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module as a file holds them: the scale in the first, so no alpha.

    ComfyUI ignores an alpha where both factors of a LoKr are whole. `ModelError` for NaN, for
    infinity, and for what the dtype cannot hold.
    """
    written: dict[str, dict[str, Tensor]] = {}
    for module, found in parts.items():
        names = _checked_names(found, module)
        folded = {name: found[name].float() for name in names}
        folded[names[0]] = folded[names[0]] * scale
        for name, tensor in folded.items():
            cast = tensor.to("cpu", dtype, copy=True).contiguous()
            if not all(math.isfinite(end) for end in cast.aminmax()):
                raise ModelError(
                    f"{module}.{name} has NaN or infinite values in {dtype}: training diverged, or "
                    "the file needs export.dtype=bfloat16"
                )
            written.setdefault(module, {})[name] = cast
    return written


def product_factors(found: Mapping[str, Tensor], stem: str, alpha: float | None) -> Factors:
    """The plain LoRA that a module's LoHa or LoKr equals; `ModelError` if it is neither, or huge.

    The scale is alpha / rank, 1 without an alpha.
    """
    names = _checked_names(found, stem)
    tensors = [found[name] for name in names]
    if wrong := {t.dtype for t in tensors}.difference(DTYPES):
        raise ModelError(f"{stem} holds {wrong.pop()}; expected bf16, fp16 or fp32")
    shapes = [tuple(t.shape) for t in tensors]
    rank = shapes[-1][0] if len(shapes[-1]) == 2 else 0
    width = rank**2 if names == HADA else rank * shapes[0][-1] if shapes[0] else 0
    if not _fits(names, shapes) or not 0 < width <= MOST_RANK:
        raise ModelError(
            f"{stem}: {', '.join(names)} are {shapes}; expected matrices that multiply, of a rank "
            f"up to {MOST_RANK} together"
        )
    parts = [tensor.float() for tensor in tensors]
    a, b = (hadamard_factors if names == HADA else kronecker_factors)(*parts)
    return Factors(a, b, 1.0 if alpha is None else alpha / rank)


def hadamard_factors(
    w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor
) -> tuple[Tensor, Tensor]:
    """A (r r', in) and B (out, r r') with B A = (w1_a w1_b) * (w2_a w2_b), elementwise."""
    a = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
    b = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)
    return a, b


def kronecker_factors(w1: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """A (q rank, in) and B (out, q rank) with B A = kron(w1, w2_a w2_b)."""
    return torch.kron(torch.eye(w1.shape[1]).to(w1), w2_b), torch.kron(w1, w2_a)


def _checked_names(found: Mapping[str, Tensor], stem: str) -> tuple[str, ...]:
    kind, names = ("LoHa", HADA) if any(n in HADA for n in found) else ("LoKr", LOKR)
    if found.keys() - {"alpha"} != set(names):
        raise ModelError(
            f"has at {stem} {', '.join(sorted(found))}: this is {kind}, which is read as "
            f"{', '.join(names)} alone (no other part, none missing: a whole lokr_w2 has no small "
            "rank); take a file like that, or a plain LoRA"
        )
    return names


def _fits(names: tuple[str, ...], shapes: list[tuple[int, ...]]) -> bool:
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        return False
    if names == LOKR:
        return shapes[1][1] == shapes[2][0]
    (out, r), (r_b, wide), (out_2, r_2), (r_2b, wide_2) = shapes
    return r == r_b == r_2 == r_2b and (out, wide) == (out_2, wide_2)
