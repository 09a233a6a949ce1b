"""Sums, ranks, norms and angles of adapters, against the same with the whole matrices."""

import pytest
import torch
from torch import Tensor

from wan import adapter_algebra
from wan.adapter_algebra import (
    Kept,
    inner_product,
    low_rank,
    resized,
    rounded,
    squared_distance,
    weighted_sum,
)
from wan.adapter_values import Factors
from wan.headers import ModelError

OUT, IN = 40, 24


def factors(seed: int, rank: int = 6, scale: float = 0.5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator)
    return Factors(a, b, scale)


def delta(f: Factors) -> Tensor:
    return f.scale * f.b.double() @ f.a.double()


def optimum(matrix: Tensor, rank: int) -> float:
    """||M - M'||^2 of the best M' of a rank."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum())


def test_a_sum_is_exact_whatever_the_ranks_scales_and_strengths() -> None:
    parts = [(factors(1), 0.8), (factors(2, 3, 2.0), -0.5), (factors(3, 1, 1.0), 1.5)]
    found = weighted_sum(parts)
    expected = torch.stack([strength * delta(part) for part, strength in parts]).sum(0)
    assert found.rank == 10
    assert found.scale == 1
    assert (delta(found) - expected).norm() < 1e-7 * expected.norm()


def test_norms_and_angles_are_those_of_the_whole_matrices() -> None:
    x, y = factors(1), factors(2, 3, 2.0)
    expected = float((delta(x) * delta(y)).sum())
    assert inner_product(x, y) == pytest.approx(expected, rel=1e-12)
    distance = float((delta(x) - delta(y)).square().sum())
    assert squared_distance(x, y) == pytest.approx(distance, rel=1e-12)
    assert squared_distance(x, x) == 0


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_smaller_rank_is_as_near_as_any_of_that_rank(rank: int) -> None:
    whole = factors(1)
    found = resized(whole, Kept(rank=rank))
    assert found.rank == rank
    error = float((delta(found) - delta(whole)).square().sum())
    assert error == pytest.approx(optimum(delta(whole), rank), rel=1e-5)
    assert found.a.norm() == pytest.approx(float(found.b.norm()), rel=1e-5)


def test_factors_of_more_rank_than_their_linear_has() -> None:
    whole = factors(1, rank=64)
    found = resized(whole, Kept(rank=30))
    assert found.rank == IN
    assert (delta(found) - delta(whole)).norm() < 1e-6 * delta(whole).norm()


def test_an_energy_takes_the_least_rank_that_holds_it() -> None:
    whole = factors(1)
    values = torch.linalg.svdvals(delta(whole)).square()
    for rank in (1, 2, 4):
        share = float(values[:rank].sum() / values.sum())
        assert resized(whole, Kept(energy=share - 1e-6)).rank == rank
        assert resized(whole, Kept(energy=share + 1e-6)).rank == rank + 1
        assert resized(whole, Kept(rank=1, energy=share)).rank == 1
    assert resized(whole, Kept(energy=1.0)).rank == 6
    nothing = Factors(torch.zeros(4, IN), torch.zeros(OUT, 4), 1.0)
    assert resized(nothing, Kept(energy=0.9)).rank == 1
    assert not delta(resized(nothing, Kept(energy=0.9))).any()


def test_what_is_no_smaller_stays_as_it_is() -> None:
    whole = factors(1)
    assert resized(whole, Kept(rank=6)) is whole
    assert resized(whole, Kept(rank=99)) is whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_once_with_the_scale_in_b(dtype: torch.dtype) -> None:
    whole = factors(1, scale=0.3)
    found = rounded(whole, dtype)
    assert torch.equal(found.a, whole.a.to(dtype).float())
    assert torch.equal(found.b, (whole.b * 0.3).to(dtype).float())


def spectrum(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=generator)).Q
    return (u * values) @ v.T


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
@pytest.mark.parametrize("name", ["low rank", "power law", "flat"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_change_is_factored_as_well_as_its_svd_can(
    shape: tuple[int, int], name: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_algebra, "EXACT_BELOW", 1024 if exact else 8)
    numbers = torch.arange(1, 301.0)
    values = {
        "low rank": (numbers <= 10) / numbers,
        "power law": 1 / numbers,
        "flat": 1 + 0 * numbers,
    }
    change = spectrum(values[name], *shape)
    total = float(change.double().square().sum())
    found = low_rank(change, Kept(rank=12))
    error = float((change.double() - delta(found)).square().sum())
    assert found.rank == 12
    slack = 1e-9 if exact else 1e-4
    assert optimum(change, 12) * (1 - 1e-6) - 1e-9 <= error
    assert error <= optimum(change, 12) + slack * total


def test_an_energy_is_looked_for_in_growing_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_algebra, "EXACT_BELOW", 8)
    monkeypatch.setattr(adapter_algebra, "FIRST_WIDTH", 4)
    values = 0.9 ** torch.arange(100.0)
    change = spectrum(values, 300, 200)
    energies = values.double().square().cumsum(0) / values.double().square().sum()
    for share in (0.5, 0.9, 0.99):
        expected = int((energies < share).sum()) + 1
        assert low_rank(change, Kept(energy=share)).rank == expected
    assert low_rank(change, Kept(rank=7, energy=0.99)).rank == 7
    assert not delta(low_rank(torch.zeros(30, 20), Kept(rank=2))).any()


def test_a_change_is_factored_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_algebra, "EXACT_BELOW", 8)
    change = torch.randn(100, 90, generator=torch.Generator().manual_seed(0))
    first = low_rank(change, Kept(rank=4))
    torch.randn(7)
    again = low_rank(change, Kept(rank=4))
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)


@pytest.mark.parametrize(
    ("rank", "energy", "option"),
    [(0, None, "--rank"), (-3, None, "--rank"), (None, 0.0, "--energy"), (None, 1.1, "--energy"),
     (None, float("nan"), "--energy")],
)  # fmt: skip
def test_what_no_adapter_can_keep(rank: int | None, energy: float | None, option: str) -> None:
    with pytest.raises(ModelError, match=option):
        Kept(rank, energy)
