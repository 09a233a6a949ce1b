"""`export` of tools.lora: from the state of a checkpoint, every kind and layout, rounded once."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora_exports import comfy_change
from test_lora_kinds import ALPHA, RANK, seen_change, trained
from test_tools_lora import run

from tests.resumable_runs import config_of, make_data
from tests.resumable_runs import run as train
from train.checkpoint import write_checkpoint
from wan.adapter_choices import KINDS, Kind
from wan.adapter_kinds import base_linear
from wan.adapter_layouts import read_any
from wan.adapter_names import diffusers_name, read_stem
from wan.lora import adapter_layers, adapter_state, finished_state
from wan.lora_format import export_adapter
from wan.variants import VARIANTS

OTHERS = ["kohya", "diffusers", "peft", "official"]


def saved_run(folder: Path, kind: Kind, optimizer: str = "torch.optim.AdamW") -> tuple[
    Path, WanTransformer3DModel
]:  # fmt: skip
    """A finished run of one transformer, its files in bf16, with a state of fp32 and averages."""
    transformer = trained(kind)
    info = replace(INFO, variant=VARIANTS["ti2v_5b"], expert="single", kind=kind, rank=RANK,
                   alpha=float(ALPHA))  # fmt: skip
    state = finished_state(transformer)
    adapter = adapter_state(transformer)
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter.items()}
    tensors |= {f"ema.{name}": 0.5 * tensor for name, tensor in adapter.items()}
    config = f"name: fox\noptim:\n  name: {optimizer}\n"
    export_adapter(folder, "fox", state, info, torch.bfloat16)
    (folder / "config.yaml").write_text(config)
    write_checkpoint(
        folder / "checkpoints", 500, {"single": tensors}, {}, config,
        lambda to: export_adapter(to, "fox_000000500", state, info, torch.bfloat16),
    )  # fmt: skip
    return folder, transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [(), ("--step", "500")])
def test_comfy_holds_what_was_trained_and_not_the_files_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, step: tuple[str, ...]
) -> None:
    folder, transformer = saved_run(tmp_path / "run", kind)
    out = tmp_path / "out"
    assert run(monkeypatch, "export", folder, *step, "--dtype", "fp32", "--out", out) == 0
    (path,) = out.iterdir()
    assert path.name == ("fox_000000500.safetensors" if step else "fox.safetensors")
    tensors = load_file(path)
    for module, layer in adapter_layers(transformer).items():
        found = read_stem(module)
        assert found is not None
        weight = base_linear(layer).weight.detach()
        read = comfy_change(tensors, f"diffusion_model.{found[1]}", weight)
        torch.testing.assert_close(read, seen_change(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
@pytest.mark.parametrize("layout", OTHERS)
def test_other_layouts_hold_the_plain_lora_that_it_equals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, layout: str
) -> None:
    folder, transformer = saved_run(tmp_path / "run", kind)
    more = ("--layout", layout, "--dtype", "fp32", "--out", tmp_path / "out")
    assert run(monkeypatch, "export", folder, *more) == 0
    (path,) = (tmp_path / "out").iterdir()
    file = read_any(path)
    assert file.layout == layout
    assert file.metadata["wan_lora.kind"] == kind
    for official, factors in file.modules.items():
        layer = adapter_layers(transformer)[diffusers_name(official)]
        change = factors.scale * factors.b @ factors.a
        torch.testing.assert_close(change, seen_change(layer), rtol=1e-5, atol=1e-5)


def test_a_dora_goes_into_comfy_alone_and_as_it_was_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved_run(tmp_path / "run", "dora")
    out = ("--out", tmp_path / "out")
    for layout in OTHERS:
        assert run(monkeypatch, "export", folder, "--layout", layout, *out) == 2
        assert re.search(f"is a DoRA, .* layout {layout}; layout comfy", capsys.readouterr().err)
    assert run(monkeypatch, "export", folder, "--weights", "ema", *out) == 2
    assert "whose file needs the base model: the run exported no ema" in capsys.readouterr().err
    assert run(monkeypatch, "export", folder, *out) == 0
    said = capsys.readouterr().out
    assert "this is no plain LoRA: read by ComfyUI" in said
    assert "load_lora_weights" not in said
    made = tmp_path / "out" / "fox.safetensors"
    assert load_file(made).keys() == load_file(folder / "fox.safetensors").keys()
    assert run(monkeypatch, "info", made) == 0
    assert "DoRA" in capsys.readouterr().out
    assert run(monkeypatch, "convert", made, "--to", "comfy", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "fox.safetensors").read_bytes() == made.read_bytes()
    assert run(monkeypatch, "resize", made, "--rank", "1", "--out", tmp_path / "small") == 2
    assert "holds a DoRA, which is no plain LoRA" in capsys.readouterr().err


def test_averages_are_exported_if_asked_and_told_to_be_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, transformer = saved_run(tmp_path / "run", "rslora")
    more = ("--weights", "ema", "--dtype", "fp32", "--out", tmp_path / "out")
    assert run(monkeypatch, "export", folder, *more) == 0
    file = read_any(tmp_path / "out" / "fox_ema.safetensors")
    assert file.metadata["wan_lora.weights"] == "ema"
    assert "wan_lora.heldout_loss" not in file.metadata
    for official, factors in file.modules.items():
        layer = adapter_layers(transformer)[diffusers_name(official)]
        torch.testing.assert_close(4 * factors.b @ factors.a, seen_change(layer))


def test_a_schedule_free_run_gives_the_average_that_it_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved_run(tmp_path / "run", "lora", "schedulefree.AdamWScheduleFree")
    out = ("--out", tmp_path / "out")
    assert run(monkeypatch, "export", folder, "--weights", "ema", *out) == 2
    assert "no checkpoint has ema ones" in capsys.readouterr().err
    assert run(monkeypatch, "export", folder, *out) == 0
    made, own = (
        load_file(tmp_path / "out" / "fox.safetensors"),
        load_file(folder / "fox.safetensors"),
    )
    assert all(torch.equal(made[name], tensor) for name, tensor in own.items())


def test_a_damaged_checkpoint_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved_run(tmp_path / "run", "lora")
    state = folder / "checkpoints" / "step_000000500" / "state_single.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert run(monkeypatch, "export", folder, "--out", tmp_path / "out") == 2
    assert "is damaged: state_single.safetensors holds other" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of both experts, whose captions are secrets."""
    home = make_data(tmp_path_factory.mktemp("real"))
    for caption in (home / "data").glob("*.txt"):
        caption.write_text(f"zorbi, a private sentence about {caption.stem}")
    more = ["data.trigger=zorbi", "lora.ema=0.5", "export.weights=both", "export.author=Ann"]
    return train(config_of(home, Path("embedded"), "fox", *more))


def test_a_real_run_gives_its_pair_again_and_its_averages(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own files are fp32: what comes from the state is the same to the bit."""
    for weights in ("live", "ema"):
        out = tmp_path / weights
        assert run(monkeypatch, "export", real, "--weights", weights, "--out", out) == 0
        end = "_ema" if weights == "ema" else ""
        for expert in ("high", "low"):
            (made,) = out.glob(f"*{end}_{expert}_noise.safetensors")
            assert made.read_bytes() == (real / made.name).read_bytes()
    assert run(monkeypatch, "export", real, "--expert", "low", "--out", tmp_path / "low") == 0
    assert len(list((tmp_path / "low").iterdir())) == 1


def test_a_real_file_says_all_that_it_should_and_gives_nobody_away(real: Path) -> None:
    said: dict[str, dict[str, str]] = {}
    for expert in ("high", "low"):
        (path,) = (p for p in real.glob(f"*_{expert}_noise.safetensors") if "_ema" not in p.name)
        with safe_open(path, "pt") as file:
            said[expert] = file.metadata()
        text = json.dumps(said[expert])
        assert str(real.parent.parent) not in text
        assert not re.search(r"/(tmp|home|root)\b|private sentence|root@", text)
    records = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    for expert, timesteps in (("high", "875,1000"), ("low", "0,875")):
        entries = said[expert]
        own = {k.removeprefix("wan_lora."): v for k, v in entries.items() if "wan_lora." in k}
        assert (own["expert"], own["boundary"], own["shift"]) == (expert, "0.875", "3.0")
        assert entries["modelspec.timestep_range"] == timesteps
        assert (own["original_rank"], own["original_alpha"]) == ("2", "2.0")
        assert entries["modelspec.trigger_phrase"] == "zorbi"
        assert entries["modelspec.author"] == "Ann"
        assert entries["ss_steps"] == "5"
        for name in ("base_model_hash", "dataset_hash", "config_sha256", "pair_id"):
            assert re.fullmatch(r"[0-9a-f]{16,64}", own[name]), name
        losses = {r["step"]: r[f"heldout/{expert}/loss"] for r in records
                  if f"heldout/{expert}/loss" in r and r["step"]}  # fmt: skip
        assert float(own["best_heldout_loss"]) == pytest.approx(min(losses.values()))
        assert float(own["heldout_loss"]) == pytest.approx(losses[max(losses)])
        assert {f"{name}_version" for name in ("torch", "diffusers", "peft")} <= own.keys()
    assert said["high"]["wan_lora.pair_id"] == said["low"]["wan_lora.pair_id"]
