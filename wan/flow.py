"""Flow matching: the path, the timestep law, the experts' ranges and the sampling grid.

Training, validation, sampling and the metadata of exports all call this file: there is one law.
sigma in [0, 1] is the noise level (1 is pure noise); timestep = 1000 sigma, always in fp32.
Source: `spec/wan22.md` sections 3.1, 3.2 and 6.2.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from wan.variants import EXPERTS, TRAIN_TIMESTEPS, Expert

Sigma = TypeVar("Sigma", float, Tensor, np.ndarray)

# Weyl sequence in integers modulo 2^64: the golden ratio's fraction, free of rounding at any index.
GOLDEN_STEP = 0x9E3779B97F4A7C15


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """S_s(sigma) = s sigma / (1 + (s - 1) sigma): more noise for s > 1, the ends stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """The inverse of `shift_sigma`."""
    return shift_sigma(sigma, 1 / shift)


def timestep_of(sigma: Tensor) -> Tensor:
    """1000 sigma in fp32, whatever the dtype of the model: in bf16, 833 would become 832."""
    return TRAIN_TIMESTEPS * sigma.float()


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, for x0 and noise (B, ...) and sigma (B,)."""
    sigma = sigma.view(-1, *[1] * (x0.ndim - 1))  # (B, 1, ...)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The slope of the path, d x_sigma / d sigma = noise - x0: what the model predicts."""
    return noise - x0


@dataclass(frozen=True)
class SigmaRange:
    """Noise levels low <= sigma < high; a `high` of 1 belongs to the range."""

    low: float
    high: float


def expert_range(boundary: float | None, expert: Expert) -> SigmaRange:
    """The noise levels that `expert` is trained on and used for; `boundary` None: it is alone."""
    if boundary is None:
        return SigmaRange(0.0, 1.0)
    return SigmaRange(boundary, 1.0) if expert == "high" else SigmaRange(0.0, boundary)


def expert_for(timestep: float, boundary: float | None) -> Expert:
    """The expert of a (shifted) timestep; at the boundary itself it is the high-noise one."""
    if boundary is None:
        return "single"
    return "high" if timestep >= boundary * TRAIN_TIMESTEPS else "low"


@dataclass(frozen=True)
class TimestepLaw:
    """The distribution of sigma in training: a base on [0, 1] whose samples are then shifted.

    `scale` is that of the logit-normal (the standard deviation of the logit before the shift).
    """

    base: Literal["uniform", "logit_normal"]
    shift: float
    scale: float = 1.0

    def cdf(self, sigma: Tensor) -> Tensor:
        """P(draw <= sigma) of the law over all of [0, 1], in fp64."""
        u = unshift_sigma(sigma.double(), self.shift).clamp(0, 1)  # rounding may overshoot 1
        return u if self.base == "uniform" else torch.special.ndtr(torch.logit(u) / self.scale)

    def quantile(self, u: Tensor) -> Tensor:
        """The sigma below which a share `u` of the draws falls, in fp64: the inverse of `cdf`."""
        u = u.double()
        if self.base == "logit_normal":
            u = torch.sigmoid(self.scale * torch.special.ndtri(u))
        return shift_sigma(u, self.shift)

    def share(self, sigma_range: SigmaRange) -> float:
        """The share of draws of the law over all of [0, 1] that fall into the range."""
        low, high = self._cdf_ends(sigma_range)
        return (high - low).item()

    def draw(self, u: Tensor, sigma_range: SigmaRange) -> Tensor:
        """The law truncated to the range, by inverse CDF: uniforms u (n,) to sigma (n,) in fp32.

        Clamped in fp32, so that rounding never hands a sample to the other expert.
        """
        low, high = self._cdf_ends(sigma_range)
        sigma = self.quantile(low + u.double() * (high - low)).float()
        return sigma.clamp(_first_in(sigma_range), _last_in(sigma_range))

    def _cdf_ends(self, sigma_range: SigmaRange) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([sigma_range.low, sigma_range.high], dtype=torch.float64)
        low, high = self.cdf(ends)
        return low, high


def _first_in(sigma_range: SigmaRange) -> Tensor:
    """The smallest fp32 sigma whose fp32 timestep is in the range."""
    sigma = torch.tensor(sigma_range.low, dtype=torch.float32)
    while timestep_of(sigma).item() < TRAIN_TIMESTEPS * sigma_range.low:
        sigma = torch.nextafter(sigma, torch.ones(()))
    return sigma


def _last_in(sigma_range: SigmaRange) -> Tensor:
    """The greatest fp32 sigma whose fp32 timestep is in the range."""
    sigma = torch.tensor(sigma_range.high, dtype=torch.float32)
    while sigma_range.high < 1 and timestep_of(sigma).item() >= TRAIN_TIMESTEPS * sigma_range.high:
        sigma = torch.nextafter(sigma, torch.zeros(()))
    return sigma


def bin_edges(law: TimestepLaw, sigma_range: SigmaRange, bins: int) -> Tensor:
    """(bins + 1,) fp64 edges that cut the truncated law into bins of equal probability."""
    low, high = law._cdf_ends(sigma_range)
    edges = law.quantile(low + torch.linspace(0, 1, bins + 1, dtype=torch.float64) * (high - low))
    edges[0], edges[-1] = sigma_range.low, sigma_range.high
    return edges


def bin_of(sigma: Tensor, edges: Tensor) -> Tensor:
    """The bin (n,) of each sigma (n,), 0 the least noisy; an edge belongs to the bin above."""
    return torch.bucketize(sigma.double(), edges[1:-1].to(sigma.device), right=True)


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts and of nothing else, on any machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def uniforms(seed: int, first: int, count: int, low_discrepancy: bool) -> Tensor:
    """The uniform numbers of samples `first` to `first + count - 1`: (count,) fp64 in (0, 1).

    Each is a function of (seed, index) alone, so any can be recomputed without the others. With
    `low_discrepancy` consecutive ones fill the interval evenly (golden ratio sequence), else they
    are independent.
    """
    indices = range(first, first + count)
    if low_discrepancy:
        offset = mix_seed(seed, "offset") << 1
        words = [(offset + index * GOLDEN_STEP) % 2**64 for index in indices]
    else:
        words = [mix_seed(seed, "uniform", index) << 1 for index in indices]
    # 52 bits and a half: the largest is still below 1 in fp64, the smallest above 0.
    return torch.tensor([((word >> 12) + 0.5) / 2**52 for word in words], dtype=torch.float64)


def binned_uniforms(seed: int, bins: int, draws: int) -> Tensor:
    """(draws * bins,) numbers in (0, 1): in each draw one for each of the equal bins, in order.

    Within a bin they are spread evenly over the draws; a draw is the same however many follow.
    """
    # One sequence through all bins would come back to each at almost the same place.
    each = [uniforms(mix_seed(seed, "bin", number), 0, draws, True) for number in range(bins)]
    within = torch.stack(each, dim=1)  # (draws, bins)
    return ((torch.arange(bins) + within) / bins).flatten()


def noise_like(shape: Sequence[int], seed: int, place: int | str) -> Tensor:
    """N(0, 1) of `shape`, fp32 on the CPU: a function of (seed, place), whatever the device."""
    generator = torch.Generator().manual_seed(mix_seed(seed, place))
    return torch.randn(*shape, generator=generator)


def sampling_grid(steps: int) -> np.ndarray:
    """Official UniPC's noise levels before the shift, (steps,): what `set_timesteps` takes.

    diffusers' own grid differs from it, and so do its samples (wan22.md, trap 4).
    """
    return np.linspace(0.999, 0, steps + 1)[:-1]


def sampling_sigmas(steps: int, shift: float) -> np.ndarray:
    """The noise level at which each step of official UniPC starts, (steps,), falling."""
    return shift_sigma(sampling_grid(steps), shift)


def sampling_timesteps(steps: int, shift: float) -> list[int]:
    """The timesteps of official sampling: truncated to integers, as the model is given them."""
    return [int(TRAIN_TIMESTEPS * sigma) for sigma in sampling_sigmas(steps, shift)]


def steps_of_experts(steps: int, shift: float, boundary: float) -> dict[Expert, int]:
    """How many of the sampling steps each expert does."""
    turns = [expert_for(timestep, boundary) for timestep in sampling_timesteps(steps, shift)]
    return {expert: turns.count(expert) for expert in EXPERTS}
