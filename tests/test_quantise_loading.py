"""Transformers whose blocks are packed while they are read, and what trains on them."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from layouts import write_gguf_transformer
from safetensors.torch import save_file
from stored_weights import transformer_weights, weights_of
from torch import Tensor

from tests.processes import loading_bytes
from tests.toy_runs import batch_of
from train.step import draw_noise, velocity_error
from wan.adapter_choices import BLOCK_LINEARS, target_modules
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.experts import load_experts
from wan.flow import TimestepLaw, expert_range
from wan.frozen_linear import FrozenLinear
from wan.headers import ModelError
from wan.lora import adapter_parameters, attach
from wan.quantise import quantise_blocks
from wan.quantised_weight import ROWS, pack
from wan.recognise import Weights
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import FrozenFormat, Keep
from wan.transformer import predict_velocity
from wan.variants import EXPERTS, variant
from wan.weights import build_transformer, empty_transformer, parameter_count

FORMATS: tuple[FrozenFormat, ...] = ("fp8", "fp8_weights", "int8", "nf4")
LAYOUTS = ("diffusers", "official", "fp16", "bf16", "fp8_musubi_blocks", "Q8_0", "Q4_K")
ONE_SCALE = ("fp8", "fp8_comfy", "fp8_comfy_new", "fp8_lightx2v", "fp8_musubi", "fp8_musubi_rows")
# Cosine of all adapters' gradients with those on the whole weights, of the toy model.
COSINES = {"fp8": 0.995, "fp8_weights": 0.997, "int8": 0.9995, "nf4": 0.97}


def frozen_linears(model: WanTransformer3DModel) -> dict[str, FrozenLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}


def stored(source: Path, tmp_path: Path, layout: str) -> tuple:
    """What recognition says of the high-noise transformer in a layout, and its values in fp32."""
    if not layout.startswith("Q"):
        return transformer_weights(source, tmp_path, layout)
    folder, file = source / "transformer", tmp_path / "model.gguf"
    values = write_gguf_transformer(folder, file, layout)
    return weights_of("high", file, "official", folder / "config.json"), values


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_packed_alike_from_every_layout(
    toy_t2v_model: Path, tmp_path: Path, layout: str, format: FrozenFormat
) -> None:
    weights, values = stored(toy_t2v_model, tmp_path, layout)
    model = build_transformer(weights, torch.bfloat16, "cpu", format)
    packed = frozen_linears(model)
    assert packed.keys() == {f"blocks.{i}.{name}" for i in range(2) for name in BLOCK_LINEARS}
    for name, linear in packed.items():
        expected = pack(values[f"{name}.weight"].float(), format)
        assert linear.format == format
        assert torch.equal(linear.qweight.view(torch.uint8), expected.data.view(torch.uint8)), name
        assert torch.equal(linear.scale, expected.scale), name
        assert linear.weight.dtype == torch.bfloat16
    assert parameter_count(model) == sum(tensor.numel() for tensor in values.values())


@pytest.mark.parametrize("format", FORMATS)
def test_everything_else_keeps_its_precision(
    toy_t2v_model: Path, tmp_path: Path, format: FrozenFormat
) -> None:
    weights, _ = transformer_weights(toy_t2v_model, tmp_path, "diffusers")
    model = build_transformer(weights, torch.bfloat16, "cpu", format)
    plain = build_transformer(weights, torch.bfloat16, "cpu")
    kept = dict(model.named_parameters())
    linears = {f"{name}.weight" for name in frozen_linears(model)}
    expected = {n: p for n, p in plain.named_parameters() if n not in linears}
    assert kept.keys() == expected.keys()  # embeddings, time, head, norms, modulation, all biases
    for name, parameter in kept.items():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter, expected[name]), name
        assert not parameter.requires_grad
    assert model.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize("format", ["fp8", "fp8_weights"])
@pytest.mark.parametrize("layout", ONE_SCALE)
def test_fp8_with_a_scale_for_each_row_stays_as_it_is_stored(
    toy_t2v_model: Path, tmp_path: Path, layout: str, format: FrozenFormat
) -> None:
    weights, values = transformer_weights(toy_t2v_model, tmp_path, layout)
    model = build_transformer(weights, torch.float32, "cpu", format)
    for name, linear in frozen_linears(model).items():
        assert linear.format == format
        assert linear.scale.shape == (linear.out_features, 1)
        assert torch.equal(linear.weight, values[f"{name}.weight"]), name
    content = weights.files[0].read_bytes()
    with weights.files[0].open("r+b") as file:  # overwritten in place
        file.write(bytes(len(content)))
    for name, linear in frozen_linears(model).items():
        assert torch.equal(linear.weight, values[f"{name}.weight"]), name


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_model_can_be_packed_too(toy_model: Path, format: FrozenFormat) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    expected = load_transformer(folder, "low", torch.float32, "cpu", format)
    model = load_transformer(folder, "low", torch.float32, "cpu")
    quantise_blocks(model, format)
    found = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_without_a_format_nothing_is_packed(toy_model: Path) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    for expert in EXPERTS:
        assert not frozen_linears(load_transformer(folder, expert, torch.float32, "cpu"))


def test_both_experts_are_packed(toy_model: Path) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    experts = load_experts(folder, torch.float32, torch.device("cpu"), frozen="fp8_weights")
    for expert in EXPERTS:
        assert {m.format for m in frozen_linears(experts[expert]).values()} == {"fp8_weights"}


def test_a_format_that_cannot_be_had_is_told_before_reading(
    toy_t2v_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = transformer_weights(toy_t2v_model, tmp_path, "bf16")
    weights.files[0].unlink()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes"):
        build_transformer(weights, torch.bfloat16, "cpu", "nf4")


def gradients(model: WanTransformer3DModel) -> tuple[Tensor, Tensor]:
    """The error of a step, and the gradients of an adapter that does something, in a row."""
    attach(model, 4, 4.0, target_modules("all"), 0.0, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    latents = torch.randn(2, 16, 3, 6, 4, generator=generator)
    batch = batch_of(latents, [torch.randn(6, 32, generator=generator)] * 2)
    law, levels = TimestepLaw("logit_normal", shift=3.0), expert_range(0.875, "high")
    draw = draw_noise(law, levels, tuple(batch.latents.shape), 5, 0, True)
    error = velocity_error(model, batch, draw, variant("tiny"))
    error.sum().backward()
    grads = [p.grad for p in adapter_parameters(model)]
    return error.detach(), torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_learn_nearly_the_same_on_packed_weights(
    toy_model: Path, format: FrozenFormat
) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    plain = gradients(load_transformer(folder, "high", torch.float32, "cpu"))
    error, found = gradients(load_transformer(folder, "high", torch.float32, "cpu", format))
    assert found.shape == plain[1].shape
    assert COSINES[format] < torch.cosine_similarity(found, plain[1], dim=0) < 0.999999
    torch.testing.assert_close(error, plain[0], rtol=0.02, atol=0)


def test_a_recomputed_step_is_the_same(toy_model: Path) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    found = []
    keeps: tuple[Keep, ...] = ("everything", "nothing")
    for keep in keeps:
        model = load_transformer(folder, "high", torch.float32, "cpu", "fp8")
        prepare_blocks(model, (keep,) * len(blocks_of(model)), False, torch.device("cpu"))
        found.append(gradients(model))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("format", FORMATS)
def test_the_base_beneath_an_adapter_is_the_packed_one(
    toy_model: Path, format: FrozenFormat
) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    model = load_transformer(folder, "low", torch.float32, "cpu", format)
    x, t, text = torch.randn(1, 16, 1, 4, 4), torch.tensor([625.0]), torch.randn(1, 512, 32)
    with torch.no_grad():
        before = predict_velocity(model, x, t, text)
        attach(model, 2, 2.0, target_modules("all"), 0.0, 0)
        assert torch.equal(predict_velocity(model, x, t, text), before)


def test_packing_takes_little_more_than_the_packed_model(tmp_path: Path) -> None:
    """130 MB in bf16 into fp8, in a process of its own: there is never a whole model in bf16."""
    config = {"num_attention_heads": 4, "num_layers": 10, "ffn_dim": 4096, "text_dim": 256}
    shapes = {name: t.shape for name, t in empty_transformer(config).state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file({n: torch.ones(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}, file)
    weights = Weights("high", (file,), "diffusers", "", "bf16", config)
    load = partial(build_transformer, weights, torch.bfloat16, "cpu", "fp8")
    beside, held = loading_bytes(load)
    assert held < 0.62 * file.stat().st_size
    largest = max(shape.numel() for shape in shapes.values())
    # The tensor in bf16, its packed parts twice as they are joined, and rows of it in fp32.
    assert beside < 4 * largest + 5 * 4 * ROWS * 4096 + 8 * 2**20 < 0.3 * file.stat().st_size
