"""Every kind of adapter through the whole program, for a few steps."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.test_train import run
from wan.adapter_choices import KINDS, Kind

SETTINGS = [
    "experts=[low]",
    "steps=3",
    "lora.rank=2",
    r"lora.targets='blocks\.[01]\.(attn1|ffn)\..*'",
    "+lora.rank_pattern={blocks.1.*: 4}",
    "lora.ema=0.9",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def trained(folder: Path, cache: Path, *settings: str) -> Path:
    """The file of a run of the low expert, whose proof held."""
    summary = run(folder, cache, *SETTINGS, *settings)
    assert 0 < summary["reload_error"]["low"] < 0.02
    return folder / "out" / "demo_low_noise.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_and_its_file_is_what_was_trained(
    tmp_path: Path, cache: Path, kind: Kind
) -> None:
    weights = "ema" if kind == "loha" else "both"
    path = trained(tmp_path, cache, f"lora.kind={kind}", f"export.weights={weights}")
    with safe_open(path, "pt") as file:
        assert file.metadata()["wan_lora.kind"] == kind
        assert file.metadata()["wan_lora.weights"] == ("ema" if kind == "loha" else "live")
    beside = tmp_path / "out" / "demo_ema_low_noise.safetensors"
    assert beside.exists() == (kind != "loha")
    names = {name.rpartition(".")[2] for name in load_file(path)}
    assert (
        names
        == {
            "lora": {"weight"},
            "rslora": {"weight"},
            "dora": {"weight", "dora_scale"},
            "lokr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
            "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        }[kind]
    )


def test_a_run_starts_from_the_file_of_another(tmp_path: Path, cache: Path) -> None:
    first = trained(tmp_path / "one", cache, "optim.learning_rate=0.01")
    losses = json.loads((tmp_path / "one" / "out" / "summary.json").read_text())
    second = run(tmp_path / "two", cache, *SETTINGS, f"lora.init={first}", "steps=2",
                 "optim.learning_rate=1e-12")  # fmt: skip
    was, now = losses["heldout_adapters"]["low"]["mean"], second["heldout_adapters"]["low"]["mean"]
    assert now == pytest.approx(was, rel=1e-3)
    assert now != pytest.approx(second["heldout_base"]["low"]["mean"], rel=1e-5)
