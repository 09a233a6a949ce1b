"""extract of tools.lora: what was added to a model comes back out of it."""

import re
from pathlib import Path

import layouts
import pytest
import torch
from adapter_sums import RANK, apart, changed, run, total, trained_for
from safetensors.torch import load_file, save_file

from tools.lora_extract import variant_of
from wan.adapter_layouts import read_any
from wan.recognise import Found
from wan.variants import VARIANTS

FILE = "diffusion_pytorch_model.safetensors"


def tuned_model(model: Path, adapter: Path, file: Path, strength: float = 1.0) -> Path:
    """The high-noise transformer of a toy model with an adapter added by hand, as ComfyUI's."""
    tensors = load_file(model / "transformer" / FILE)
    for name, delta in changed(adapter).items():
        tensors[name] = tensors[name] + strength * delta
    save_file(layouts.official_transformer(tensors), file)
    return file


def test_what_was_added_comes_back_out_of_another_layout(
    toy_t2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = trained_for(tmp_path, toy_t2v_model)
    tuned = tuned_model(toy_t2v_model, adapter, tmp_path / "tuned_high_noise.safetensors")
    base = layouts.write_official(toy_t2v_model, tmp_path / "base", VARIANTS["t2v_a14b"])
    out = tmp_path / "out"
    words = ("--rank", RANK, "--dtype", "fp32", "--name", "back", "--out", out)
    assert run(monkeypatch, "extract", base, tuned, *map(str, words)) == 0
    said = capsys.readouterr().out
    assert "captured energy 100.000%" in said
    assert "not in the adapter" not in said
    made = out / "back_high_noise.safetensors"
    assert apart(total((made, 1)), total((adapter, 1))) < 1e-4
    entries = read_any(made).metadata
    assert entries["wan_lora.expert"] == "high"
    assert entries["ss_network_dim"] == str(RANK)
    again = tmp_path / "again"
    words = (*words[:-1], again)
    assert run(monkeypatch, "extract", base, tuned, *map(str, words)) == 0
    assert (again / made.name).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("words", [("--rank", "2"), ("--energy", "0.8")])
def test_the_energy_that_is_told_is_the_energy_that_is_held(
    toy_t2v_model: Path,
    tmp_path: Path,
    words: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = trained_for(tmp_path, toy_t2v_model)
    tuned = tuned_model(toy_t2v_model, adapter, tmp_path / "tuned_high_noise.safetensors")
    base, out = toy_t2v_model / "transformer", tmp_path / "out"
    assert run(monkeypatch, "extract", base, tuned, *words, "--out", out) == 0
    made = total((out / "extracted_high_noise.safetensors", 1))
    wanted = total((adapter, 1))
    lost = sum(float((made[m] - wanted[m]).square().sum()) for m in wanted)
    whole = sum(float(delta.square().sum()) for delta in wanted.values())
    printed = re.search(r"captured energy ([\d.]+)%", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(100 * (1 - lost / whole), abs=0.01)
    if words[0] == "--energy":
        assert all(
            (made[m] - d).square().sum() < 0.201 * d.square().sum() for m, d in wanted.items()
        )
    else:
        best = sum(float(torch.linalg.svdvals(d)[2:].square().sum()) for d in wanted.values())
        assert lost == pytest.approx(best, rel=1e-3)


def test_a_pair_of_pipelines_gives_two_files(
    toy_t2v_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    high = trained_for(tmp_path, toy_t2v_model)
    low = trained_for(tmp_path, toy_t2v_model, "low", seed=1)
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert run(monkeypatch, "merge", high, "--pair", "--into", toy_t2v_model, "--out", merged) == 0
    words = ("--rank", "4", "--dtype", "fp32", "--out", out)
    assert run(monkeypatch, "extract", toy_t2v_model, merged, *words) == 0
    for adapter in (high, low):
        found = out / adapter.name.replace("fox", "extracted")
        assert apart(total((found, 1)), total((adapter, 1))) < 1e-4


def test_quantised_models_are_read_and_their_rounding_is_told(
    toy_t2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = trained_for(tmp_path, toy_t2v_model)
    tuned = tuned_model(toy_t2v_model, adapter, tmp_path / "tuned_high_noise.safetensors")
    for name in ("base_Q8_0_high_noise.gguf", "base_fp8_high_noise.safetensors"):
        if name.endswith("gguf"):
            layouts.write_gguf_transformer(toy_t2v_model / "transformer", tmp_path / name)
        else:
            layouts.write_comfy_transformer(
                toy_t2v_model / "transformer", tmp_path / name, "fp8_comfy"
            )
        out = tmp_path / name[:8]
        words = ("--rank", "4", "--outside-blocks", "--out", out)
        assert run(monkeypatch, "extract", tmp_path / name, tuned, *words) == 0
        assert f"{name} is " in capsys.readouterr().out
        made, wanted = total((out / "extracted_high_noise.safetensors", 1)), total((adapter, 1))
        for module, delta in wanted.items():
            assert (made[module] - delta).norm() < 0.1 * delta.norm(), module


def test_what_an_adapter_cannot_hold_is_reported(
    toy_t2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = trained_for(tmp_path, toy_t2v_model)
    tuned = tuned_model(toy_t2v_model, adapter, tmp_path / "tuned_high_noise.safetensors")
    tensors = load_file(tuned)
    for name in ("blocks.0.norm3.weight", "blocks.1.norm3.weight", "head.head.weight"):
        tensors[name] = 1.5 * tensors[name]
    tensors["patch_embedding.weight"] += 1
    tensors["blocks.1.self_attn.q.bias"] += 1
    save_file(tensors, tuned)
    base, out = toy_t2v_model / "transformer", tmp_path / "out"
    assert run(monkeypatch, "extract", base, tuned, "--rank", "4", "--out", out) == 0
    said = capsys.readouterr().out
    assert re.search(r"not in the adapter: norm2\.weight, 2 tensors, .*\(50\.00% of it\)", said)
    assert "not in the adapter: patch_embedding.weight, 1 tensors" in said
    assert "not in the adapter: attn1.to_q.bias, 1 tensors" in said
    assert "not in the adapter: proj_out.weight, 1 tensors" in said
    more = ("--rank", "4", "--outside-blocks", "--out", tmp_path / "more")
    assert run(monkeypatch, "extract", base, tuned, *more) == 0
    assert "proj_out" not in capsys.readouterr().out
    assert "head.head" in read_any(next((tmp_path / "more").iterdir())).modules


@pytest.mark.parametrize(
    ("name", "folder"),
    [*((name, name) for name in ("t2v_a14b", "i2v_a14b", "ti2v_5b")), (None, "Wan2.1-T2V-14B")],
)
def test_the_model_is_told_by_its_shapes_and_wan_21_by_its_name(
    name: str | None, folder: str
) -> None:
    facts = VARIANTS[name or "t2v_a14b"]
    shapes = {f"blocks.{i}.norm2.weight": (1,) for i in range(facts.transformer.layers)}
    patch = (facts.transformer.dim, facts.in_channels, 1, 2, 2)
    files = (Path(folder) / "model.safetensors",)
    shapes_of_all = shapes | {"patch_embedding.weight": patch}
    found = variant_of(Found("transformer", files, "official", "", "bf16", shapes_of_all))
    assert (found.name if found else None) == name


def test_what_cannot_be_extracted_is_one_sentence(
    toy_t2v_model: Path,
    toy_i2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = toy_t2v_model / "transformer"
    low = tmp_path / "tuned_low_noise.safetensors"
    layouts.write_comfy_transformer(toy_t2v_model / "transformer_2", low)
    same = tmp_path / "same_high_noise.safetensors"
    save_file(load_file(base / FILE), same)
    damaged = tmp_path / "nan_high_noise.safetensors"
    tensors = load_file(same)
    save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"] * float("nan")}, damaged)
    out, rank = ("--out", tmp_path / "out"), ("--rank", "4")
    for words, message in (
        ((base, tmp_path / "none", *rank, *out), "does not exist"),
        ((base, low, *rank, *out), "has high; .* has low: give the same experts"),
        ((base, toy_i2v_model / "transformer", *rank, *out), "are of two models: patch_embedding"),
        ((base, same, *rank, *out), "differ in no linear"),
        ((base, damaged, *rank, *out), "proj_out.bias differs by NaN"),
        ((base, same, *out), "needs --rank, --energy or both"),
        ((base, same, "--rank", "0", *out), "--rank is 0"),
    ):
        assert run(monkeypatch, "extract", *words) == 2, message
        assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
