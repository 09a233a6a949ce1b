"""The path, the timestep law and the sampling grid."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wan import flow
from wan.flow import SigmaRange, TimestepLaw, expert_for, expert_range
from wan.variants import EXPERTS, VARIANTS, Expert

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden.json").read_text())
LAWS = [
    TimestepLaw("uniform", 1.0),
    TimestepLaw("uniform", 5.0),
    TimestepLaw("logit_normal", 1.0),
    TimestepLaw("logit_normal", 3.0, scale=1.5),
    TimestepLaw("logit_normal", 12.0),
]


def test_velocity_is_the_slope_of_the_path() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 6, 6, dtype=torch.float64, generator=_generator())
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.functional.jvp(
        lambda s: flow.add_noise(x0, noise, s), sigma, torch.ones_like(sigma)
    )[1]
    torch.testing.assert_close(slope, flow.velocity(x0, noise))


def test_the_path_runs_from_data_to_noise() -> None:
    x0, noise = torch.randn(2, 2, 4, 1, 2, 2, generator=_generator())
    noisy = flow.add_noise(x0, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], x0[0])
    assert torch.equal(noisy[1], noise[1])


def test_noise_levels_keep_fp32_beside_bf16_latents() -> None:
    x0 = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    noisy = flow.add_noise(x0, torch.zeros_like(x0), torch.tensor([0.833]))
    assert noisy.item() == pytest.approx(1 - 0.833, abs=1e-7)


def test_shifts_compose_and_invert() -> None:
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    composed = flow.shift_sigma(flow.shift_sigma(sigma, 2.0), 3.0)
    torch.testing.assert_close(composed, flow.shift_sigma(sigma, 6.0))
    torch.testing.assert_close(flow.unshift_sigma(composed, 6.0), sigma)
    assert flow.unshift_sigma(0.875, 12.0) == pytest.approx(0.36842, abs=1e-5)


@pytest.mark.parametrize("sigma_dtype", [torch.float32, torch.float64])
def test_833_stays_833(sigma_dtype: torch.dtype) -> None:
    timestep = flow.timestep_of(torch.tensor([0.833], dtype=sigma_dtype))
    assert timestep.dtype == torch.float32
    assert timestep.item() == 833
    assert timestep.bfloat16().item() == 832  # what the rule guards against


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_the_boundary_itself_belongs_to_high(boundary: float) -> None:
    assert expert_for(1000 * boundary, boundary) == "high"
    assert expert_for(1000 * boundary - 1e-3, boundary) == "low"
    assert expert_range(boundary, "low").high == expert_range(boundary, "high").low == boundary


@pytest.mark.parametrize("law", LAWS)
def test_quantile_inverts_cdf(law: TimestepLaw) -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(law.cdf(law.quantile(u)), u)
    assert law.quantile(u)[[0, -1]].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("base", "shift", "above_875", "above_9", "median"),
    [
        ("uniform", 1, 0.125, 0.100, 0.500),
        ("logit_normal", 1, 0.026, 0.014, 0.500),
        ("uniform", 3, 0.300, 0.250, 0.750),
        ("uniform", 5, 0.417, 0.357, 0.834),
        ("uniform", 12, 0.632, 0.572, 0.923),
        ("logit_normal", 2, 0.105, 0.066, 0.666),
        ("logit_normal", 3, 0.198, 0.136, 0.749),
        ("logit_normal", 5, 0.368, 0.278, 0.833),
        ("logit_normal", 12, 0.705, 0.613, 0.923),
    ],
)
def test_shares_of_the_specification(
    base: str, shift: float, above_875: float, above_9: float, median: float
) -> None:
    law = TimestepLaw("uniform" if base == "uniform" else "logit_normal", shift)
    # The table was estimated by sampling: its third digit is good to one.
    assert law.share(expert_range(0.875, "high")) == pytest.approx(above_875, abs=1.1e-3)
    assert law.share(expert_range(0.9, "high")) == pytest.approx(above_9, abs=1.1e-3)
    assert law.quantile(torch.tensor(0.5)).item() == pytest.approx(median, abs=1.1e-3)
    both = [law.share(expert_range(0.875, expert)) for expert in EXPERTS]
    assert sum(both) == pytest.approx(1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("expert", EXPERTS)
def test_truncation_is_rejection_without_the_waste(law: TimestepLaw, expert: Expert) -> None:
    sigma_range = expert_range(0.875, expert)
    u = torch.rand(400_000, dtype=torch.float64, generator=_generator())
    everywhere = law.quantile(u).float()
    accepted = everywhere[(everywhere >= sigma_range.low) & (everywhere < sigma_range.high)]
    drawn = law.draw(u, sigma_range)
    levels = torch.linspace(0.05, 0.95, 19)
    # The rarest range has about 10,000 accepted samples: their quantiles are good to 1 %.
    width = accepted.max() - accepted.min()
    error = (drawn[:200_000].quantile(levels) - accepted[:200_000].quantile(levels)).abs().max()
    assert error < 0.015 * width


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.417])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("law", LAWS)
def test_rounding_never_changes_the_expert(
    law: TimestepLaw, expert: Expert, boundary: float
) -> None:
    extremes = torch.tensor([0, 1e-300, 1e-17, 1e-9, 1 - 1e-9, 1 - 1e-16, 1], dtype=torch.float64)
    sigma = law.draw(extremes, expert_range(boundary, expert))
    assert sigma.dtype == torch.float32
    assert {expert_for(t, boundary) for t in flow.timestep_of(sigma).tolist()} == {expert}


@pytest.mark.parametrize("law", LAWS)
def test_bins_are_equally_likely(law: TimestepLaw) -> None:
    sigma_range = expert_range(0.875, "low")
    edges = flow.bin_edges(law, sigma_range, 8)
    assert edges[0] == 0
    assert edges[-1] == 0.875
    sigma = law.draw(flow.uniforms(3, 0, 8_000, low_discrepancy=True), sigma_range)
    counts = flow.bin_of(sigma, edges).bincount(minlength=8)
    assert counts.shape == (8,)
    assert ((counts - 1000).abs() <= 3).all()


def test_an_edge_belongs_to_the_bin_above() -> None:
    edges = flow.bin_edges(TimestepLaw("uniform", 1.0), SigmaRange(0.0, 1.0), 4)
    assert flow.bin_of(torch.tensor([0, 0.25, 0.2499, 0.75, 1]), edges).tolist() == [0, 1, 0, 3, 3]


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_low_discrepancy_visits_bins_evenly(seed: int) -> None:
    u = flow.uniforms(seed, 0, 2_000, low_discrepancy=True)
    visits = torch.nn.functional.one_hot((u * 8).long(), 8).cumsum(0)
    for window, allowed in [(8, 2), (16, 2), (32, 2), (55, 2), (64, 3), (500, 3)]:
        counts = visits[window:] - visits[:-window]  # of any run of consecutive indices
        assert (counts.max(1).values - counts.min(1).values).max() <= allowed
    independent = flow.uniforms(seed, 0, 500, low_discrepancy=False)
    counts = (independent * 8).long().bincount(minlength=8)
    assert counts.max() - counts.min() > 3


@pytest.mark.parametrize("draws", [2, 3, 4, 8])
def test_draws_within_a_bin_lie_apart(draws: int) -> None:
    u = flow.binned_uniforms(7, 8, draws).view(draws, 8)
    assert torch.equal((8 * u).floor(), torch.arange(8, dtype=u.dtype).expand(draws, 8))
    within = (8 * u % 1).sort(0).values
    around = torch.cat([within[1:], within[:1] + 1]) - within  # gaps, that over the end too
    assert around.min() > 0.4 / draws  # 1 / draws would be even


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_each_uniform_is_recomputable_alone(low_discrepancy: bool) -> None:
    together = flow.uniforms(7, 1000, 50, low_discrepancy)
    alone = torch.cat([flow.uniforms(7, 1000 + i, 1, low_discrepancy) for i in range(50)])
    assert torch.equal(together, alone)
    assert together.dtype == torch.float64
    assert ((together > 0) & (together < 1)).all()
    assert together.unique().numel() == 50
    assert not torch.equal(together, flow.uniforms(8, 1000, 50, low_discrepancy))


def test_independent_uniforms_are_uniform() -> None:
    u = flow.uniforms(0, 0, 4_000, low_discrepancy=False).sort().values
    ideal = (torch.arange(4_000, dtype=torch.float64) + 0.5) / 4_000
    assert (u - ideal).abs().max() < 1.63 / 4_000**0.5  # Kolmogorov-Smirnov at 1 %


def test_noise_is_a_function_of_seed_and_place() -> None:
    noise = flow.noise_like((2, 3, 4), seed=1, place=5)
    torch.rand(3)  # the global generator has no say
    assert torch.equal(noise, flow.noise_like((2, 3, 4), seed=1, place=5))
    for seed, place in [(1, 6), (2, 5), (5, 1), (1, "5")]:
        assert not torch.equal(noise, flow.noise_like((2, 3, 4), seed, place))
    many = flow.noise_like((100_000,), seed=1, place=0)
    assert many.dtype == torch.float32
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_mixed_seeds_are_pinned() -> None:
    # A change here changes every run that anyone wants to repeat.
    assert flow.mix_seed(0, "high", 1) == 5694438486738503463
    assert flow.mix_seed("a", "bc") != flow.mix_seed("ab", "c")
    assert all(0 <= flow.mix_seed(seed) < 2**63 for seed in range(1000))


@pytest.mark.parametrize("name", ["t2v_A14B", "i2v_A14B", "i2v_A14B_480p", "ti2v_5B"])
def test_official_grid(name: str) -> None:
    golden = GOLDEN[name]
    sigmas = flow.sampling_sigmas(golden["steps"], golden["shift"])
    np.testing.assert_allclose(sigmas, golden["unipc_sigmas"][:-1], atol=1e-7)
    timesteps = flow.sampling_timesteps(golden["steps"], golden["shift"])
    assert timesteps == golden["unipc_timesteps"]


def test_steps_of_experts() -> None:
    t2v = VARIANTS["t2v_a14b"]
    steps = flow.steps_of_experts(t2v.sample_steps, t2v.sample_shift, t2v.boundary)
    assert steps == {"high": 26, "low": 14}
    assert flow.steps_of_experts(40, 3.0, 0.9) == {"high": 10, "low": 30}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
