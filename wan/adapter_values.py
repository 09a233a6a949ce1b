"""The factors of an adapter, and how they are brought into the form that every loader applies.

W_eff = W + scale * B @ A. In a file the scale is in B, all ranks are one, and every value is finite
(`spec/lora_formats.md` section 6.1).
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.adapter_names import block_linear
from wan.headers import ModelError

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MOST_ALPHA = 1e6  # section 6.4: diffusers hangs on a negative one
MOST_GROWTH = 100  # times the file: zeros that a few bytes of a hostile file could ask for

FP16_MAX = 65504.0
FP16_SMALL = 6e-5  # below it fp16 is subnormal and loses digits
FP16_SMALL_SHARE = 0.01


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one linear: scale * B @ A, the tensors as they are stored."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float  # alpha / rank; 1 where the file has no alpha

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.a.shape[0]


def check_factors(modules: Mapping[str, Factors]) -> None:
    """`ModelError` names the first module whose shapes, dtypes or scale no model can take."""
    widths: dict[str, tuple[int, int]] = {}
    for module, factors in modules.items():
        a, b = factors.a, factors.b
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.numel() * b.numel():
            raise ModelError(
                f"{module}: lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}; "
                "expected (rank, in) and (out, rank)"
            )
        if wrong := {a.dtype, b.dtype}.difference(DTYPES):
            raise ModelError(f"{module} holds {wrong.pop()}; expected bf16, fp16 or fp32")
        if not 0 < factors.scale < math.inf:
            raise ModelError(
                f"{module}: the scale alpha / rank of an adapter must be positive; "
                f"found {factors.scale}"
            )
        linear, width = _kind(module), (b.shape[0], a.shape[1])
        if widths.setdefault(linear, width) != width:
            raise ModelError(f"{module} is {width}, in other blocks {widths[linear]} (out, in)")


def check_growth(modules: Iterable[Factors], values: int) -> None:
    """`ModelError` if so many values to write are nearly all zeros that only fill up."""
    stored = sum(factors.a.numel() + factors.b.numel() for factors in modules)
    if values > MOST_GROWTH * stored:
        raise ModelError(
            f"the adapter's {stored:,} values would become {values:,}, nearly all zeros: its ranks "
            "or blocks are too different to be filled up to one shape"
        )


def checked_alpha(alpha: object, name: str) -> float:
    """An alpha as a file gives it; `ModelError` for one that no loader can take."""
    if not isinstance(alpha, int | float) or not 0 < alpha <= MOST_ALPHA:
        raise ModelError(f"says {name} is {alpha}; expected a number above 0, up to {MOST_ALPHA:g}")
    return float(alpha)


def written_factors(
    modules: Mapping[str, Factors], rank: int, dtype: torch.dtype, fold: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each module as a file holds them: contiguous, on the CPU, of one rank and dtype.

    With `fold` the scale goes into B in fp32 before the cast. Ranks below `rank` are filled up with
    zeros, which changes nothing in B @ A. `ModelError` for what loaders, or the dtype, cannot hold;
    a warning if some kind of linear was never trained.
    """
    if dtype not in DTYPES:
        raise ModelError(f"adapters are exported as bf16, fp16 or fp32; found {dtype}")
    check_factors(modules)
    check_growth(
        modules.values(), sum(rank * (f.a.shape[1] + f.b.shape[0]) for f in modules.values())
    )
    if dtype == torch.float16:
        _check_fp16(modules, fold)
    written: dict[str, tuple[Tensor, Tensor]] = {}
    for module, factors in modules.items():
        a, b = factors.a, factors.b
        if a.shape[0] > rank:
            raise ModelError(f"{module} has rank {a.shape[0]}, above the adapter's rank {rank}")
        padded_a, padded_b = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
        padded_a[: a.shape[0]] = a
        padded_b[:, : b.shape[1]] = b.float() * factors.scale if fold else b
        for name, tensor in (("lora_A", padded_a), ("lora_B", padded_b)):
            # A NaN is both ends of its tensor; isfinite() would make three temporaries of each.
            if not all(math.isfinite(end) for end in tensor.aminmax()):
                raise ModelError(f"{module}.{name} has NaN or infinite values: training diverged")
        written[module] = (padded_a.to(dtype), padded_b.to(dtype))
    _warn_if_untrained(written)
    return written


def _kind(module: str) -> str:
    """The name within its block, which modules of one shape share."""
    in_block = block_linear(module)
    return in_block[1] if in_block else module


def _warn_if_untrained(written: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """A warning if B @ A is surely 0, as A or B is, for every module of some kind."""
    live: dict[str, bool] = {}
    for module, (a, b) in written.items():
        kind = _kind(module)
        live[kind] = live.get(kind, False) or bool(a.any() and b.any())
    dead = sorted(kind for kind, is_live in live.items() if not is_live)
    if dead:
        what = "the adapter" if len(dead) == len(live) else ", ".join(dead)
        log.warning("%s has no effect in any block (B @ A is 0): was it trained?", what)


def _check_fp16(modules: Mapping[str, Factors], fold: bool) -> None:
    """`ModelError` if fp16 would overflow, or lose digits of many values (section 6.1 rule 2)."""
    largest, nonzero, small = 0.0, 0, 0
    for factors in modules.values():
        scale = factors.scale if fold else 1.0
        for tensor, factor in ((factors.a, 1.0), (factors.b, scale)):
            if tensor.dtype == torch.float16 and factor == 1:
                continue  # it is what it will be
            size = tensor.float().abs() * factor
            largest = max(largest, float(size.max()))
            nonzero += int(size.count_nonzero())
            small += int(((size > 0) & (size < FP16_SMALL)).sum())
    if (math.isfinite(largest) and largest > FP16_MAX) or small > FP16_SMALL_SHARE * nonzero:
        raise ModelError(
            f"the adapter does not fit into fp16: its largest value is {largest:.3g} (at most "
            f"{FP16_MAX:g}), {small / max(nonzero, 1):.1%} of its values are below {FP16_SMALL:g} "
            f"(at most {FP16_SMALL_SHARE:.0%}); export it as bf16 or fp32"
        )
