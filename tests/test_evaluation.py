"""The figures and the table of a measurement."""

from dataclasses import asdict, replace

import pytest

from train.evaluation import Beside, Evaluated, figures, read_beside, table
from train.validate import HeldoutLoss

BASE = HeldoutLoss("low", 2.0, 0.2, [1.0, 3.0], [0.0, 0.5, 1.0], [1.5, 2.5])
NOW = replace(BASE, mean=1.5, bins=[0.5, 2.5])
TRAINED = replace(BASE, mean=0.9, standard_error=0.3, bins=[0.8, 1.0])
HEALTH = {"norm": 3.0, "update": 0.25, "effective_rank": 2.5, "dead": 0.125, "norm/block_00": 3.0}
FOUND = Evaluated(
    heldout=NOW,
    beside=Beside(steps=7, trained=TRAINED, drift=0.0625),
    base=BASE,
    base_trained=replace(BASE, mean=3.0),
    health=HEALTH,
    other=("ema", replace(BASE, mean=1.25)),
)


def test_the_gap_is_what_is_learned_by_heart_alone() -> None:
    assert FOUND.gap == pytest.approx(1.5 / 2.0 - 0.9 / 3.0)
    alike = replace(FOUND, beside=replace(FOUND.beside, trained=replace(TRAINED, mean=2.25)))
    assert alike.gap == pytest.approx(0)  # three quarters are left on both sides


def test_figures_are_named_by_expert() -> None:
    record = figures([FOUND])
    assert record["trained_on/low/loss"] == 0.9
    assert record["trained_on/low/standard_error"] == 0.3
    assert record["trained_on/low/bin_1"] == 1.0
    assert record["gap/low"] == FOUND.gap
    assert record["drift/low"] == 0.0625
    assert record["heldout_ema/low/loss"] == 1.25
    assert record["health/low/norm/block_00"] == 3.0
    assert not any(name.startswith("heldout/") for name in record)  # the tracker writes these
    assert not any("ema" in name for name in figures([replace(FOUND, other=None)]))


def test_the_table_tells_each_expert_against_its_base() -> None:
    lines = table(12, [FOUND, replace(FOUND, other=None)]).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("measured   after 12 steps")
    for words in ("1.5000 ± 0.2000 (-25.0%)", "gap +45.0%", "drift 6.25%", "norm 3 (+0.25)"):
        assert words in lines[1]
    assert "rank 2.5, 12% dead" in lines[1]
    assert "ema weights: 1.2500 ± 0.2000 (-37.5%)" in lines[2]


def test_what_was_measured_comes_back_from_json() -> None:
    written = {"low": asdict(FOUND.beside)}
    assert read_beside(written) == {"low": FOUND.beside}  # pyright: ignore[reportArgumentType]
