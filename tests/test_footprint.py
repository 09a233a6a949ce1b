"""What is predicted of memory is what was measured, and follows what it should depend on."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from wan import footprint
from wan.footprint import GIB, Load
from wan.key_names import transformer_config
from wan.speed_choices import KEEPS, FrozenFormat, InputPlace, Keep
from wan.variants import A14B, VARIANTS

MEASURED = Path(__file__).parent / "measured_memory.csv"
LINES = [line for line in MEASURED.read_text().splitlines() if not line.startswith("#")]
ROWS = list(csv.DictReader(LINES))
VIDEO = Load(A14B, tokens=32_760, batch=1, rank=16)


def predicted(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> float:
    """GiB."""
    variant = VARIANTS[row["variant"]]
    facts = replace(variant.transformer, layers=int(row["blocks"]))
    shape = variant.geometry.latent_shape(*(int(row[n]) for n in ("frames", "height", "width")))
    tokens = footprint.tokens_of(shape)
    monkeypatch.setattr(footprint, "FFN_TOKENS", int(row["parts"]) or tokens)
    config = transformer_config(replace(variant, transformer=facts))
    frozen = cast("FrozenFormat | None", row["frozen"] or None)
    weights = footprint.weights_of_config(config, torch.bfloat16, frozen)
    kinds: tuple[Keep, ...] = ("attention", "products", "everything", "nothing", "host")
    keep: list[Keep] = [kind for kind in kinds for _ in range(int(row[kind] or 0))]
    load = Load(facts, tokens, 1, 16, frozen, compiled=not row["eager"], inputs=inputs_of(row))
    adapters = facts.layers * 16 * (18 * facts.dim + 2 * facts.ffn_dim)
    adapters *= footprint.TRAINED if row["placement"] else 4
    resting = footprint.resting_bytes([weights], row["placement"] or "resident")
    resting += adapters + footprint.BESIDE
    return (resting + footprint.activation_bytes(load, keep)) / GIB


def inputs_of(row: dict[str, str]) -> InputPlace:
    return cast("InputPlace", row["inputs"] or "device")


@pytest.mark.parametrize("row", ROWS, ids=[LINES[1 + index] for index in range(len(ROWS))])
def test_the_peak_is_within_a_tenth_of_what_was_measured(
    row: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predicted(row, monkeypatch) == pytest.approx(float(row["gib"]), rel=0.1)


def test_at_least_eight_configurations_were_measured() -> None:
    assert len(ROWS) >= 8
    assert len([row for row in ROWS if row["fitted"] != "yes"]) >= 7


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", ["t2v_a14b", "ti2v_5b"])
def test_who_keeps_more_needs_more_but_for_one_block_alone(name: str, compiled: bool) -> None:
    facts = VARIANTS[name].transformer
    load = Load(facts, tokens=10_000, batch=1, rank=32, compiled=compiled)
    kept = [footprint.block_bytes(load, keep).kept for keep in KEEPS]
    assert kept == sorted(kept)
    assert len(set(kept)) == len(KEEPS)
    peaks = [footprint.activation_bytes(load, (keep,) * facts.layers) for keep in KEEPS]
    assert peaks == sorted(peaks)


def test_what_it_should_depend_on() -> None:
    keep: tuple[Keep, ...] = ("attention",) * 40
    once = footprint.activation_bytes(VIDEO, keep)
    assert footprint.activation_bytes(replace(VIDEO, batch=2), keep) == pytest.approx(
        2 * once, rel=1e-6
    )
    assert footprint.activation_bytes(replace(VIDEO, rank=128), keep) > once
    weights_only = replace(VIDEO, frozen="fp8_weights")
    assert footprint.activation_bytes(weights_only, keep) - once == 10 * 5120 * 13824


def test_inputs_that_wait_in_host_memory_make_room_for_as_much() -> None:
    keep: tuple[Keep, ...] = ("attention",) * 30 + ("products",) * 9 + ("everything",)
    host = replace(VIDEO, inputs="host")
    waiting = footprint.waiting_bytes(host, keep)
    assert waiting == 39 * 4 * 32_760 * 5120
    assert footprint.waiting_bytes(VIDEO, keep) == 0
    room = footprint.activation_bytes(VIDEO, keep) - footprint.activation_bytes(host, keep)
    assert room == pytest.approx(waiting, rel=0.06)
    budget = footprint.activation_bytes(VIDEO, keep)
    more = footprint.chosen_keep(host, "auto", 40, budget).count("products")
    assert more > footprint.chosen_keep(VIDEO, "auto", 40, budget).count("products") + 5


def test_processes_that_share_a_clip_divide_its_activations() -> None:
    keep: tuple[Keep, ...] = ("attention",) * 40
    once, shared = (replace(VIDEO, processes=count) for count in (1, 4))
    kept = [footprint.block_bytes(load, "attention").kept for load in (shared, once)]
    assert kept[0] == pytest.approx(kept[1] / 4, rel=0.05)  # each has all of the text
    most = [footprint.activation_bytes(load, keep) for load in (shared, once)]
    assert most[0] == pytest.approx(most[1] / 4, rel=0.1)  # the feed-forward goes in parts
    assert replace(VIDEO, processes=7).own_tokens == 4680  # of 32,760; the slices are uneven
    assert footprint.sample_bytes(shared, guided=True) < footprint.sample_bytes(once, guided=True)


def test_weights_are_counted_exactly() -> None:
    config = transformer_config(VARIANTS["t2v_a14b"])
    whole = footprint.weights_of_config(config, torch.float32, None).whole
    assert whole == 4 * 14_288_491_584  # wan22.md section 8.1
    packed = footprint.weights_of_config(config, torch.float32, "nf4").whole
    linears = 14_050_918_400
    assert packed == 4 * (14_288_491_584 - linears) + linears * 0.5625


def test_where_weights_are_is_what_the_placement_says() -> None:
    expert = footprint.ExpertWeights(layers=40, block=700, outside=500)
    pair, one = (expert, expert), expert.whole
    places = {
        place: (footprint.resting_bytes(pair, place), footprint.host_bytes(pair, place))
        for place in ("resident", "swap", "stream")
    }
    assert places == {
        "resident": (2 * one, 0),
        "swap": (one, 2 * one),
        "stream": (2 * 700 + 2 * 500, 2 * 40 * 700),
    }
    assert footprint.host_bytes((expert,), "swap") == 0  # 5B has nothing to swap with


def test_auto_keeps_what_the_card_has_room_for() -> None:
    resting = 27 * GIB
    keep = {
        gib: footprint.chosen_keep(
            VIDEO, "auto", 40, footprint.activation_budget(gib * GIB, resting, 300 * 2**20)
        )
        for gib in (40, 78, 139.8)
    }
    assert set(keep[40]) == {"host"}
    assert set(keep[78]) == {"attention"}
    assert 15 <= keep[139.8].count("products") <= 27  # 21 were measured
    assert footprint.chosen_keep(VIDEO, "everything", 3, 0) == ("everything",) * 3
