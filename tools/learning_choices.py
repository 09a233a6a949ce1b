"""What the study of `docs/learning.md` compares: choices that differ from the demo's in one thing.

A `Setting` is all that the training of one adapter depends on, apart from its expert and its seed;
a `Choice` is a pair of them. The experts learn independently, so an adapter of one serves every
choice that has it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from torch import Tensor

from wan.flow import SigmaRange, TimestepLaw, bin_edges
from wan.variants import EXPERTS, Expert

EMA_DECAY = 0.99
LAW_POINTS = 256  # equally probable noise levels that stand for a law


@dataclass(frozen=True)
class Setting:
    """How one adapter is trained; the defaults are those of conf/experiment/demo.yaml."""

    base: Literal["uniform", "logit_normal"] = "uniform"
    shift: float = 5.0  # that of the toy model's sampler
    truncated: bool = True  # to the expert's range; else noise levels of the other's too
    low_discrepancy: bool = True
    rank: int = 16  # alpha is equal to it
    learning_rate: float = 1e-3
    caption_dropout: float = 0.1
    bell: bool = False  # weight the loss by `bell`
    ema: float = 0.0  # decay of the average that is used; 0 = the live weights

    def law(self) -> TimestepLaw:
        """The law of noise levels, over both experts."""
        return TimestepLaw(self.base, self.shift)

    def range(self, own: SigmaRange) -> SigmaRange:
        """The noise levels that are drawn, for an expert with this range."""
        return own if self.truncated else SigmaRange(0.0, 1.0)


@dataclass(frozen=True)
class Choice:
    """One row of the study: a value of a factor, and the setting of each expert; None = no LoRA."""

    factor: str
    value: str
    settings: Mapping[Expert, Setting | None]

    @property
    def name(self) -> str:
        """Unique in the study."""
        return f"{self.factor}={self.value}"


DEFAULT = Choice("default", "", dict.fromkeys(EXPERTS, Setting()))


def bell(sigma: Tensor, law: TimestepLaw, drawn: SigmaRange) -> Tensor:
    """Weight (n,) of each noise level (n,): exp(-2 (sigma - 1/2)^2), less its value at both ends.

    So it is 0 at sigma 0 and 1. Its mean over the law is 1: a weight changes what counts, not how
    large steps are.
    """

    def raw(levels: Tensor) -> Tensor:
        return (-2 * (levels - 0.5).square()).exp() - math.exp(-0.5)

    edges = bin_edges(law, drawn, 2 * LAW_POINTS)
    mean = raw(edges[1::2]).mean().item()  # every other edge: the middle of each share of the law
    return raw(sigma) / mean


def choices() -> list[Choice]:
    """All rows; where one has the default's value, `DEFAULT` stands for it."""
    return [DEFAULT, *chain(_laws(), _sizes(), _rates(), _experts())]


def _both(factor: str, value: str, setting: Setting) -> Choice:
    return Choice(factor, value, dict.fromkeys(EXPERTS, setting))


def _laws() -> list[Choice]:
    default = Setting()
    rows = [
        _both("sigma", f"{base} shift {shift:g}", replace(default, base=base, shift=shift))
        for base, shift in (
            ("uniform", 1.0),
            ("uniform", 3.0),
            ("uniform", 12.0),
            ("logit_normal", 1.0),
            ("logit_normal", 3.0),
            ("logit_normal", 5.0),
        )
    ]
    return [
        *rows,
        _both("sigma", "uniform shift 5, not truncated", replace(default, truncated=False)),
        _both("draws", "random", replace(default, low_discrepancy=False)),
        _both("weighting", "bell", replace(default, bell=True)),
    ]


def _sizes() -> list[Choice]:
    default = Setting()
    return [
        *(_both("rank", str(rank), replace(default, rank=rank)) for rank in (2, 4, 8, 32)),
        *(_both("dropout", f"{p:g}", replace(default, caption_dropout=p)) for p in (0.0, 0.3)),
        _both("ema", f"{EMA_DECAY:g}", replace(default, ema=EMA_DECAY)),
    ]


def _rates() -> list[Choice]:
    rates = (1e-4, 3e-4, 3e-3, 1e-2)
    return [
        Choice(
            f"rate_{expert}",
            f"{rate:g}",
            {**DEFAULT.settings, expert: replace(Setting(), learning_rate=rate)},
        )
        for expert in EXPERTS
        for rate in rates
    ]


def _experts() -> list[Choice]:
    return [
        Choice("experts", "none", dict.fromkeys(EXPERTS)),
        Choice("experts", "high only", {"high": Setting(), "low": None}),
        Choice("experts", "low only", {"high": None, "low": Setting()}),
    ]
