"""Files of every kind: what loaders make of them is what was trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO, predict, tiny_transformer
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from test_lora_kinds import ALPHA, RANK, seen_change, trained
from torch import Tensor

from wan.adapter_check import check_adapter
from wan.adapter_choices import KINDS, Kind, module_ranks, target_modules
from wan.adapter_kinds import base_linear, weight_change
from wan.adapter_layouts import read_any
from wan.adapter_names import diffusers_name, read_stem
from wan.adapter_writing import write_layout
from wan.checkpoints import ModelPaths, find_model
from wan.experts import Experts, load_experts
from wan.headers import ModelError
from wan.lora import (
    ADAPTER,
    adapter_layers,
    adapter_parameters,
    adapter_state,
    attach,
    finished_state,
)
from wan.lora_format import export_adapter, read_adapter
from wan.reload import TOLERANCE, reload_errors
from wan.strengths import load_adapter, set_strengths
from wan.variants import VARIANTS


def exported(
    folder: Path,
    transformer: WanTransformer3DModel,
    kind: Kind,
    dtype: torch.dtype = torch.float32,
) -> Path:
    info = replace(INFO, variant=VARIANTS["tiny"], kind=kind, rank=RANK, alpha=float(ALPHA))
    return export_adapter(folder, "fox", finished_state(transformer), info, dtype).path


def comfy_change(tensors: dict[str, Tensor], stem: str, weight: Tensor) -> Tensor:
    """What ComfyUI changes in a weight (out, in), by the keys of its module: its own arithmetic."""
    part = {
        name.removeprefix(f"{stem}."): t.float()
        for name, t in tensors.items()
        if name.startswith(f"{stem}.")
    }
    if "hada_w1_a" in part:
        return (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
    if "lokr_w1" in part:
        return torch.kron(part["lokr_w1"], part["lokr_w2_a"] @ part["lokr_w2_b"])
    product = part["lora_B.weight"] @ part["lora_A.weight"]
    if "dora_scale" not in part:
        return product
    norm = weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
    return (weight + product) * (part["dora_scale"] / norm) - weight


def official(module: str) -> str:
    """The official name of a diffusers module."""
    found = read_stem(module)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_makes_of_a_file_exactly_what_was_trained(tmp_path: Path, kind: Kind) -> None:
    transformer = trained(kind)
    tensors = load_file(exported(tmp_path, transformer, kind))
    assert not any(name.endswith(".alpha") for name in tensors)
    for module, layer in adapter_layers(transformer).items():
        weight = base_linear(layer).weight.detach()
        read = comfy_change(tensors, f"diffusion_model.{official(module)}", weight)
        torch.testing.assert_close(read, seen_change(layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dora_is_put_on_from_its_file_at_any_strength(tmp_path: Path, dtype: torch.dtype) -> None:
    """ComfyUI's arithmetic: strength times all that it changes in a weight."""
    transformer = trained("dora", dtype)
    path = exported(tmp_path, transformer, "dora")
    other = tiny_transformer().to(dtype).requires_grad_(False)  # pyright: ignore[reportArgumentType]
    load_adapter(other, read_adapter(path)[0], "fox")
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(predict(other), predict(transformer), rtol=tolerance, atol=tolerance)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    if dtype == torch.float32:
        tensors = load_file(path)
        for strength in (1.0, 0.5, 1.2):
            set_strengths(other, {"fox": strength})
            for module, layer in adapter_layers(other, "fox").items():
                stem, weight = f"diffusion_model.{official(module)}", base_linear(layer).weight
                told = strength * comfy_change(tensors, stem, weight)
                torch.testing.assert_close(seen_change(layer), told, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(weight_change(layer, "fox"), told, rtol=1e-4, atol=1e-5)
    set_strengths(other, {"fox": 0.0})
    assert torch.equal(predict(other), predict(tiny_transformer().to(dtype)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_a_file_is_read_as_the_plain_lora_that_it_equals(tmp_path: Path, kind: Kind) -> None:
    transformer = trained(kind)
    path = exported(tmp_path, transformer, kind)
    modules = read_any(path).modules
    layers = adapter_layers(transformer)
    assert {diffusers_name(official) for official in modules} == set(layers)
    for module, factors in modules.items():
        change = factors.scale * factors.b @ factors.a
        expected = seen_change(layers[diffusers_name(module)])
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    state, _, _ = read_adapter(path)
    load_adapter(other := tiny_transformer(), state, "fox")
    torch.testing.assert_close(predict(other), predict(transformer), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_diffusers_loads_the_converted_file(tmp_path: Path, kind: Kind) -> None:
    transformer = trained(kind)
    modules = read_any(exported(tmp_path, transformer, kind)).modules
    write_layout(tmp_path / "plain.safetensors", modules, "diffusers", torch.float32, {})
    pipeline = WanPipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=None,  # pyright: ignore[reportArgumentType]
        scheduler=UniPCMultistepScheduler(),  # pyright: ignore[reportArgumentType]
        transformer=tiny_transformer(),
        transformer_2=None,
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="plain.safetensors")
    torch.testing.assert_close(
        predict(pipeline.transformer), predict(transformer), rtol=1e-3, atol=1e-4
    )


def trained_pair(toy_model: Path, kind: Kind, dtype: torch.dtype = torch.float32) -> Experts:
    """The toy model with adapters that look trained."""
    pair = load_experts(find_model(ModelPaths(str(toy_model)), "tiny"), dtype, torch.device("cpu"))
    for expert in pair:
        attach(pair[expert], RANK, ALPHA, target_modules("all"), 0.0, 1, kind)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapter_parameters(pair[expert]):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_of_a_file_holds_and_finds_a_lost_scale(
    toy_model: Path, tmp_path: Path, kind: Kind, dtype: torch.dtype
) -> None:
    pair = trained_pair(toy_model, kind, dtype)
    path = exported(tmp_path, pair["low"], kind, torch.bfloat16)
    latents, text = torch.randn(16, 2, 4, 4), torch.randn(5, 32)
    output = adapter_state(pair["low"])

    def error() -> float:
        return reload_errors(pair, {"low": path}, VARIANTS["tiny"], latents, text)["low"]

    assert 0 < error() < TOLERANCE
    first = {"loha": "hada_w1_a", "lokr": "lokr_w1"}.get(kind, "lora_B.weight")
    wrong = {n: t * 1.5 if n.endswith(first) else t for n, t in load_file(path).items()}
    save_file(wrong, path)
    assert error() > 0.1
    now = adapter_state(pair["low"])
    assert all(torch.equal(tensor, now[name]) for name, tensor in output.items())


def test_scales_of_a_dora_stay_in_fp32(tmp_path: Path) -> None:
    tensors = load_file(exported(tmp_path, trained("dora"), "dora", torch.bfloat16))
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in tensors.items()}
    assert dtypes == {"weight": torch.bfloat16, "dora_scale": torch.float32}
    assert tensors["diffusion_model.blocks.0.ffn.0.dora_scale"].shape == (40, 1)


def test_ranks_by_pattern_are_filled_up_to_the_largest(tmp_path: Path) -> None:
    linears = [f"blocks.{i}.{linear}" for i in range(2) for linear in target_modules("all")]
    ranks = module_ranks(linears, target_modules("all"), RANK, {r"blocks\.1\.attn.*": 7})
    attach(transformer := tiny_transformer(), RANK, ALPHA, ranks, 0.0, 7)
    with torch.no_grad():
        for layer in adapter_layers(transformer).values():
            layer.lora_B.get_parameter(f"{ADAPTER}.weight").normal_()
    path = exported(tmp_path, transformer, "lora")
    file = read_any(path)
    assert {factors.rank for factors in file.modules.values()} == {7}
    assert file.metadata["ss_network_dim"] == "7"
    for official, factors in file.modules.items():
        expected = weight_change(adapter_layers(transformer)[diffusers_name(official)], ADAPTER)
        torch.testing.assert_close(factors.b @ factors.a, expected)


@pytest.mark.parametrize(
    ("kind", "diffusers", "wan2gp"),
    [
        ("lora", "yes", "yes"),
        ("rslora", "yes", "yes"),
        ("dora", "error", "yes"),
        ("lokr", "error", "error"),
        ("loha", "error", "error"),
    ],
)
def test_the_check_of_a_file_tells_which_loaders_take_it(
    tmp_path: Path, kind: Kind, diffusers: str, wan2gp: str
) -> None:
    facts = VARIANTS["tiny"].transformer
    transformer = WanTransformer3DModel(
        num_attention_heads=facts.heads,
        attention_head_dim=facts.dim // facts.heads,
        ffn_dim=facts.ffn_dim,
        num_layers=facts.layers,
        text_dim=8,
        freq_dim=8,
    )
    attach(transformer, RANK, ALPHA, target_modules("all"), 0.0, 1, kind)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter += 0.1
    check = check_adapter(exported(tmp_path, transformer, kind))
    assert not check.has_errors
    outcomes = {verdict.loader: verdict.outcome for verdict in check.verdicts}
    assert outcomes["ComfyUI"] == "yes"
    assert (outcomes["diffusers"], outcomes["Wan2GP"]) == (diffusers, wan2gp)


@pytest.mark.parametrize(
    ("kind", "lost", "message"),
    [
        ("loha", "hada_w2_b", "this is LoHa, which is read as hada_w1_a"),
        ("lokr", "lokr_w2_a", "this is LoKr, which is read as lokr_w1"),
    ],
)
def test_half_a_product_is_refused(tmp_path: Path, kind: Kind, lost: str, message: str) -> None:
    path = exported(tmp_path, trained(kind), kind)
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if not n.endswith(lost)}, path)
    with pytest.raises(ModelError, match=message):
        read_any(path)
    save_file({n: torch.ones(100, 100) for n in tensors}, path)
    with pytest.raises(ModelError, match="expected matrices that multiply, of a rank"):
        read_any(path)
