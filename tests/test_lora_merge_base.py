"""merge --into of tools.lora: the merged model is the base with its adapter, in every layout."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import layouts
import pytest
import torch
from adapter_sums import changed, run, trained_for
from quantised import FP8_FLAVOURS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools import lora_merge_base
from wan.adapter_layouts import read_any
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.lora_format import read_adapter
from wan.recognise import Weights, recognise
from wan.strengths import load_adapter, set_strengths
from wan.variants import VARIANTS, Expert
from wan.weights import build_transformer, read_tensors

FILE = "diffusion_pytorch_model.safetensors"
LAYOUTS = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2} | dict.fromkeys(FP8_FLAVOURS, 0.2)


def weights_of(place: Path, config: Path) -> Weights:
    """The transformer in a file, or in the shards of a folder."""
    found = recognise(sorted(place.glob("*.safetensors")) if place.is_dir() else [place])
    settings = json.loads(config.read_text())
    return Weights("high", found.files, found.naming, found.prefix, found.storage, settings)


def whole(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.float().clone() for name, tensor in read_tensors(weights)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def velocity(transformer: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(*s, generator=generator) for s in ((1, 16, 2, 4, 4), (1, 6, 32)))
    with torch.no_grad():
        return transformer(latents, torch.tensor([900.0]), text, return_dict=False)[0]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, "fp32+model.diffusion_model.", "fp8_comfy+diffusion_model."]
)
def test_the_merged_file_computes_what_base_and_adapter_do(
    toy_t2v_model: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, _, prefix = layout.partition("+")
    base, out = tmp_path / "wan_high_noise.safetensors", tmp_path / "merged.safetensors"
    layouts.write_comfy_transformer(toy_t2v_model / "transformer", base, storage, prefix)
    adapter = trained_for(tmp_path, toy_t2v_model)
    assert run(monkeypatch, "merge", f"{adapter}:0.7", "--into", base, "--out", out) == 0
    config = toy_t2v_model / "transformer" / "config.json"
    before, after = weights_of(base, config), weights_of(out, config)
    assert (after.naming, after.prefix, after.storage) == (before.naming, prefix, before.storage)
    transformer = build_transformer(before, torch.float32, "cpu")
    plain = velocity(transformer)
    load_adapter(transformer, read_adapter(adapter)[0], "fox")
    set_strengths(transformer, {"fox": 0.7})
    live, merged = velocity(transformer), velocity(build_transformer(after, torch.float32, "cpu"))
    assert (merged - live).norm() < LAYOUTS[storage] * (live - plain).norm()


@pytest.mark.parametrize("storage", LAYOUTS)
def test_each_weight_is_rounded_once_and_the_others_keep_their_bits(
    toy_t2v_model: Path, tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tmp_path / "wan_high_noise.safetensors", tmp_path / "merged.safetensors"
    layouts.write_comfy_transformer(toy_t2v_model / "transformer", base, storage)
    adapter = trained_for(tmp_path, toy_t2v_model)
    words = ("merge", f"{adapter}:0.7", f"{adapter}:-0.2", "--into", base, "--out", out)
    assert run(monkeypatch, *words) == 0
    stored, again = load_file(base), load_file(out)
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {
        n: (t.dtype, t.shape) for n, t in again.items()
    }
    official = {f"{module}." for module in read_any(adapter).modules}
    for name, tensor in stored.items():
        same = torch.equal(bits(tensor), bits(again[name]))
        assert same or name.startswith(tuple(official)), name
    config = toy_t2v_model / "transformer" / "config.json"
    before, after = (whole(weights_of(file, config)) for file in (base, out))
    for name, delta in changed(adapter).items():
        wanted = before[name] + 0.5 * delta
        if storage in layouts.DTYPES:
            kind = layouts.DTYPES[storage]
            off = (after[name] - wanted.to(kind).float()).abs() > 1e-6 * wanted.abs().max()
            assert off.float().mean() < 1e-3, name  # by the last bit of the sum in fp32
        # e4m3 has steps of 2^-3 at most, half of that either way; below 2^-6 steps of 2^-9.
        error = (after[name] - wanted).abs()
        scale = wanted.abs().max() / 448 if storage != "fp8" else 1.0
        assert (error <= 0.0626 * wanted.abs() + 2**-10 * 1.01 * scale).all(), name


def test_a_scale_grows_only_where_a_value_would_not_fit(
    toy_t2v_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "wan_high_noise.safetensors"
    layouts.write_comfy_transformer(toy_t2v_model / "transformer", base, "fp8_lightx2v")
    tensors = load_file(base)
    old, old_scale = (f"blocks.0.self_attn.q.{end}" for end in ("weight", "weight_scale"))
    tensors[old] = (tensors[old].float() / 2).to(torch.float8_e4m3fn)  # half of its range is free
    tensors[old_scale] = 2 * tensors[old_scale]
    save_file(tensors, base)
    name = "blocks.0.attn1.to_q.weight"
    place = lora_merge_base.stored_tensors(recognise([base]))[name]
    b, a = torch.zeros(256, 1), torch.zeros(1, 256)
    b[3], a[0, 5] = 10.0, 1.0
    weight, scale = lora_merge_base.merged_weight(place, [(Factors(a, b, 1.0), 1.0)])
    others = torch.arange(256) != 3
    assert scale is not None
    assert torch.equal(weight.view(torch.uint8)[others], tensors[old].view(torch.uint8)[others])
    assert torch.equal(scale[others], tensors[old_scale][others])
    assert scale[3] > 5 * tensors[old_scale][3]
    assert float(weight[3, 5].float() * scale[3]) == pytest.approx(10.0, rel=0.02)


def test_a_pair_goes_into_a_diffusers_folder_with_shards(
    toy_t2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = layouts.write_sharded_diffusers(toy_t2v_model, tmp_path / "base")
    high = trained_for(tmp_path, toy_t2v_model)
    low = trained_for(tmp_path, toy_t2v_model, "low", seed=1)
    out = tmp_path / "out"
    assert run(monkeypatch, "merge", low, "--pair", "--into", base, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"model.high={out / 'transformer'}\n" in said
    assert f"model.low={out / 'transformer_2'}\n" in said
    for folder in ("transformer", "transformer_2"):
        names = {file.name for file in (base / folder).iterdir()}
        assert {file.name for file in (out / folder).iterdir()} == names
        index = f"{FILE}.index.json"
        assert (out / folder / index).read_bytes() == (base / folder / index).read_bytes()
    paths = ModelPaths(
        str(toy_t2v_model), high=str(out / "transformer"), low=str(out / "transformer_2")
    )
    merged = find_model(paths, "t2v_a14b")
    plain = find_model(ModelPaths(str(toy_t2v_model)), "t2v_a14b")
    experts: dict[Expert, Path] = {"high": high, "low": low}
    for expert, adapter in experts.items():
        ours, base_state = (
            load_transformer(model, expert, torch.float32, "cpu").state_dict()
            for model in (merged, plain)
        )
        deltas = changed(adapter)
        for name, tensor in ours.items():
            expected = base_state[name] + deltas.get(name, torch.zeros(()))
            assert torch.allclose(tensor, expected, atol=1e-6), name
    with safe_open(out / "transformer" / f"{FILE[:-12]}-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata()["modelspec.merged_from"] == "fox_high_noise:1"
    assert run(monkeypatch, "merge", high, "--into", base, "--out", tmp_path / "one") == 0
    assert not (tmp_path / "one" / "transformer_2").exists()


@pytest.mark.parametrize("kind", ["official", "comfy"])
def test_a_pair_goes_into_the_folders_of_other_programs(
    toy_t2v_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, base, out = VARIANTS["t2v_a14b"], tmp_path / "base", tmp_path / "out"
    if kind == "official":
        layouts.write_official(toy_t2v_model, base, variant)
    else:
        layouts.write_comfy(toy_t2v_model, base, variant, "fp16")
    high = trained_for(tmp_path, toy_t2v_model)
    trained_for(tmp_path, toy_t2v_model, "low", seed=1)
    assert run(monkeypatch, "merge", high, "--pair", "--into", base, "--out", out) == 0
    made = {file.relative_to(out) for file in out.rglob("*.safetensors")}
    expected = {f.relative_to(base) for f in base.rglob("*.safetensors")}
    assert made == {f for f in expected if "vae" not in str(f) and "umt5" not in str(f)}
    again = tmp_path / "again"
    assert run(monkeypatch, "merge", high, "--pair", "--into", base, "--out", again) == 0
    assert all((again / file).read_bytes() == (out / file).read_bytes() for file in made)


def test_what_cannot_be_merged_is_one_sentence_and_leaves_nothing(
    toy_t2v_model: Path,
    toy_i2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, low = tmp_path / "wan_high_noise.safetensors", tmp_path / "wan_low_noise.safetensors"
    layouts.write_comfy_transformer(toy_t2v_model / "transformer", base)
    shutil.copyfile(base, low)
    quantised = tmp_path / "wan_high_noise_Q8_0.gguf"
    layouts.write_gguf_transformer(toy_t2v_model / "transformer", quantised)
    adapter = trained_for(tmp_path, toy_t2v_model)
    trained_for(tmp_path, toy_t2v_model, "low", seed=1)
    wide = tmp_path / "wide_high_noise.safetensors"
    modules = {"blocks.0.self_attn.q": Factors(torch.ones(1, 64), torch.ones(256, 1), 1.0)}
    write_layout(wide, modules, "comfy", torch.float32, {})
    huge = tmp_path / "huge_high_noise.safetensors"
    many = {m: replace(f, a=1e3 * f.a, scale=1e38) for m, f in read_any(adapter).modules.items()}
    write_layout(huge, many, "comfy", torch.float32, {})
    before = {file.name for file in tmp_path.iterdir()}
    out = ("--out", tmp_path / "out")
    for words, message in (
        ((adapter, "--into", tmp_path / "none", *out), "does not exist"),
        ((adapter, "--into", low, *out), "the adapter is of high noise.*give the model's file"),
        ((adapter, "--pair", "--into", base, *out), "the adapter is of low noise"),
        ((adapter, "--into", toy_i2v_model, *out), "is for Wan 2.2 T2V-A14B.*takes 36"),
        (
            (wide, "--into", base, *out),
            r"self_attn.q is \(256, 64\).*and \(256, 256\) in the model",
        ),
        ((huge, "--into", base, *out), "does not fit into torch.bfloat16|NaN or infinite"),
        ((adapter, "--into", quantised, *out), "is a GGUF .* which is read but not written"),
        ((adapter, "--into", adapter, *out), "holds a LoRA, not a model"),
        ((adapter, "--into", toy_t2v_model / "vae", *out), "holds no transformer"),
        ((adapter, "--into", base, "--out", tmp_path), "exists; choose another place"),
        ((adapter, "--into", base, "--rank", "4", *out), "--rank has no effect with --into"),
    ):
        assert run(monkeypatch, "merge", *words) == 2, message
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert re.search(message, said), said
    assert {file.name for file in tmp_path.iterdir()} == before


def test_a_full_disk_is_told_before_anything_is_written(
    toy_t2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = trained_for(tmp_path, toy_t2v_model)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    words = ("--into", toy_t2v_model, "--out", tmp_path / "out")
    assert run(monkeypatch, "merge", adapter, *words) == 2
    assert "GB free, the merged model needs" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == [adapter.name]
