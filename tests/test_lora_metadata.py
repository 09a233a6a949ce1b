import json
import re
from dataclasses import replace
from importlib.metadata import version

import pytest
from adapter_examples import INFO

from wan.headers import ModelError
from wan.lora_metadata import metadata
from wan.variants import VARIANTS, Expert

HASH = "a" * 64


def test_the_entries_are_exactly_these() -> None:
    own = {
        "format_version": "1",
        "variant": "t2v_a14b",
        "expert": "high",
        "boundary": "0.875",
        "shift": "12.0",
        "timestep_law": "uniform, shift 12",
        "original_alpha": "2.0",
        "original_rank": "4",
        "kind": "lora",
        "rslora": "false",
        "weights": "live",
        "heldout_loss": "0.125",
        "best_heldout_loss": "0.0625",
        "config_sha256": "c" * 64,
        "base_model_hash": "b" * 16,
        "dataset_hash": "d" * 16,
        "pair_id": "0123abcd",
        **{f"{name}_version": version(name) for name in ("torch", "diffusers", "peft")},
    }
    assert metadata(INFO, HASH) == {f"wan_lora.{key}": value for key, value in own.items()} | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "wan2.2-t2v-a14b/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "modelspec.title": "Blue Fox (high noise)",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.resolution": "832x480",
        "modelspec.trigger_phrase": "bluefox",
        "modelspec.usage_hint": "load in the HIGH-noise model; strength 1.0",
        "modelspec.timestep_range": "875,1000",
        "modelspec.hash_sha256": f"0x{HASH}",
        "ss_base_model_version": "Wan Video 2.2 T2V-A14B",
        "ss_network_module": "wan.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_network_args": '{"targets": "all", "dropout": 0.0}',
        "ss_output_name": "Blue Fox",
        "ss_session_id": "0123abcd",
        "ss_training_finished_at": "1767323045.0",
        "ss_steps": "1500",
        "ss_max_train_steps": "1500",
        "ss_learning_rate": "0.0001",
        "ss_lr_warmup_steps": "0",
        "ss_optimizer": "torch.optim.AdamW",
        "ss_seed": "7",
        "ss_mixed_precision": "no",
        "ss_gradient_accumulation_steps": "1",
        "ss_num_train_items": "12",
        "ss_discrete_flow_shift": "12.0",
        "ss_timestep_sampling": "uniform, shift 12",
        "ss_datasets": '[{"resolution": [832, 480], "num_items": 12}]',
        "ss_tag_frequency": '{"12_bluefox": {"bluefox": 12}}',
        "sshs_model_hash": HASH,
    }


@pytest.mark.parametrize(
    ("name", "expert", "expected"),
    [
        ("t2v_a14b", "high", "875,1000"),
        ("t2v_a14b", "low", "0,875"),
        ("i2v_a14b", "high", "900,1000"),
        ("i2v_a14b", "low", "0,900"),
        ("tiny", "low", "0,875"),
    ],
)
def test_the_timestep_range_is_the_experts(name: str, expert: Expert, expected: str) -> None:
    entries = metadata(replace(INFO, variant=VARIANTS[name], expert=expert), HASH)
    assert entries["modelspec.timestep_range"] == expected


def test_one_transformer_has_no_range_and_no_boundary() -> None:
    entries = metadata(replace(INFO, variant=VARIANTS["ti2v_5b"], expert="single"), HASH)
    assert entries.keys().isdisjoint({"modelspec.timestep_range", "wan_lora.boundary"})
    assert entries["modelspec.title"] == "Blue Fox"
    assert entries["wan_lora.expert"] == "single"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_base_model_is_named_as_civitai_names_it(name: str) -> None:
    facts = VARIANTS[name]
    info = replace(INFO, variant=facts, expert=facts.experts[0])
    assert metadata(info, HASH)["ss_base_model_version"] == VARIANTS[name].base_model


def test_all_entries_are_text_and_no_loader_is_told_of_a_scale() -> None:
    full = replace(
        INFO,
        author="A. N. Other",
        tags="fox,blue",
        epoch=3,
        max_grad_norm=1.0,
        started=INFO.date,
        base_model_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        git_commit="f00",
        max_steps=3000,
    )
    entries = metadata(full, HASH)
    assert all(type(value) is str and value for value in entries.values())
    assert "lora_adapter_metadata" not in entries
    assert entries["ss_network_alpha"] == entries["ss_network_dim"]
    assert entries["ss_training_started_at"] == entries["ss_training_finished_at"]
    assert entries["ss_max_train_steps"] == "3000"
    assert all(json.loads(entries[key]) for key in ("ss_datasets", "ss_tag_frequency"))


def test_without_a_trigger_or_a_held_out_loss_there_are_no_such_entries() -> None:
    entries = metadata(replace(INFO, trigger="", heldout_loss=None), HASH)
    missing = {"modelspec.trigger_phrase", "ss_tag_frequency", "wan_lora.heldout_loss"}
    assert entries.keys() == metadata(INFO, HASH).keys() - missing


def test_a_date_without_a_zone_is_utc_wherever_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    entries = metadata(replace(INFO, date="2026-01-02T03:04:05"), HASH)
    assert entries["ss_training_finished_at"] == "1767323045.0"


@pytest.mark.parametrize("base", ["/home/me/wan", "./wan", "~/wan", "C:\\wan", "a/b/c", "../wan"])
def test_a_folder_of_this_machine_does_not_get_into_a_file(base: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"base_model_id={base!r} is not 'owner/name'")):
        replace(INFO, base_model_id=base)


@pytest.mark.parametrize("resolution", ["832", "832*480", "832x", "0x480", "a folder/832x480"])
def test_a_resolution_that_swarmui_cannot_parse_is_refused(resolution: str) -> None:
    with pytest.raises(ModelError, match="'<width>x<height>'"):
        replace(INFO, resolution=resolution)


def test_a_rank_or_alpha_that_cannot_be_is_refused() -> None:
    for change in ({"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}):
        with pytest.raises(ModelError, match="rank >= 1 and alpha > 0"):
            replace(INFO, **change)
