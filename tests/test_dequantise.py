"""What is stored in fewer bits stands for what its format says, and can be trained upon."""

import json
from functools import partial
from pathlib import Path

import gguf
import layouts
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from diffusers.quantizers.quantization_config import GGUFQuantizationConfig
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from tests.processes import loading_bytes
from wan import dequantise
from wan.dequantise import dequantise_fp8
from wan.frozen_linear import FrozenLinear
from wan.key_names import transformer_name
from wan.lora import adapter_parameters, attach
from wan.recognise import Part, Weights
from wan.weights import build_text_encoder, build_transformer, parameter_count, read_tensors

QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
KEPT_IN_FP32 = ("time_embedder", "scale_shift_table", "norm2")
SLACK = 2**24  # bytes: modules of the text encoder that are imported meanwhile
pytestmark = pytest.mark.usefixtures("no_network")


def gguf_weights(part: Part, file: Path, folder: Path) -> Weights:
    """What recognition would say of a GGUF whose library's config lies in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    return Weights(part, (file,), "llama" if part == "text_encoder" else "official", "", "", config)


def toy_gguf(
    model: Path, tmp_path: Path, kind: str, reshaped: bool = False
) -> tuple[Weights, dict[str, Tensor]]:
    """The high-noise transformer of a diffusers folder as a GGUF, and its values."""
    folder, file = model / "transformer", tmp_path / "model.gguf"
    values = layouts.write_gguf_transformer(folder, file, kind, reshaped)
    return gguf_weights("high", file, folder), values


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timestep and text for a toy transformer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 2, 4, 4, generator=generator).to(dtype)
    return x, torch.tensor([625.0]), torch.randn(1, 8, 32, generator=generator).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize("kind", [*QUANTISED, "F16"])
def test_a_gguf_transformer_stands_for_its_values(
    toy_t2v_model: Path, tmp_path: Path, kind: str
) -> None:
    weights, values = toy_gguf(toy_t2v_model, tmp_path, kind, reshaped=True)
    model = build_transformer(weights, torch.bfloat16, "cpu")
    assert parameter_count(model) == sum(tensor.numel() for tensor in values.values())
    packed = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    assert len(packed) == (0 if kind == "F16" else 2 * 10)  # the linears of both blocks
    for name, linear in packed.items():
        assert linear.format == kind
        whole = dequantise.gguf_rows(linear.qweight, kind, torch.float32)
        assert torch.equal(whole, values[f"{name}.weight"]), name
        assert torch.equal(linear.weight, whole.bfloat16()), name
    parameters = dict(model.named_parameters())
    assert parameters.keys() == values.keys() - {f"{name}.weight" for name in packed}
    for name, parameter in parameters.items():
        is_kept = any(part in name for part in KEPT_IN_FP32)
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
        assert torch.equal(parameter, values[name].to(parameter.dtype)), name


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_gguf_transformer_is_as_diffusers_loads_it(
    toy_t2v_model: Path, tmp_path: Path, kind: str
) -> None:
    """The same modules and bytes; diffusers makes them whole in fp16, which rounds once more."""
    weights, _ = toy_gguf(toy_t2v_model, tmp_path, kind)
    ours = build_transformer(weights, torch.bfloat16, "cpu")
    library = WanTransformer3DModel.from_single_file(
        str(weights.files[0]),
        config=str(toy_t2v_model),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    ).eval()
    modules = dict(ours.named_modules())
    for name, module in library.named_modules():
        found = modules[name]
        assert isinstance(module, GGUFLinear) == isinstance(found, FrozenLinear), name
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, GGUFParameter):
                assert torch.equal(found.get_buffer("qweight"), parameter.as_tensor()), name
            else:
                value = found.get_parameter(leaf)
                assert torch.equal(value.to(parameter.dtype), parameter), (name, leaf)
    with torch.no_grad():
        x = ours(*inputs(torch.bfloat16))[0]
        assert relative(x, library(*inputs(torch.bfloat16))[0]) < 1e-2


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_an_adapter_trains_on_a_gguf_transformer(
    toy_t2v_model: Path, tmp_path: Path, kind: str
) -> None:
    weights, _ = toy_gguf(toy_t2v_model, tmp_path, kind)
    model = build_transformer(weights, torch.bfloat16, "cpu")
    attach(model, rank=4, alpha=4, targets=["attn1.to_q", "ffn.net.0.proj"], dropout=0, seed=0)
    x, t, text = inputs(torch.bfloat16)
    x.requires_grad_()
    before = model(x, t, text)[0]
    before.float().square().mean().backward()
    parameters = adapter_parameters(model)
    assert len(parameters) == 2 * 2 * 2  # A and B of two linears in two blocks
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(b.grad is not None and b.grad.abs().sum() > 0 for b in parameters[1::2])
    assert all(p.grad is None for p in {*model.parameters()} - {*parameters})
    torch.optim.SGD(parameters, lr=100.0).step()
    assert not torch.equal(model(x, t, text)[0], before)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_text_encoder_is_made_whole(
    toy_t2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(dequantise, "ROWS", 7)  # rows that do not divide any tensor
    file = tmp_path / "umt5.gguf"
    values = layouts.write_gguf_text_encoder(toy_t2v_model, file, kind)
    weights = gguf_weights("text_encoder", file, toy_t2v_model / "text_encoder")
    encoder = build_text_encoder(weights, dtype, "cpu")
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    state = encoder.state_dict()
    state.pop("encoder.embed_tokens.weight")
    assert state.keys() == values.keys()
    assert all(torch.equal(state[name], values[name].to(dtype)) for name in values)


def test_a_gguf_in_bf16_and_without_its_fifth_dimension_is_read(tmp_path: Path) -> None:
    tensor = torch.randn(8, 4, 1, 2, 2).bfloat16()
    file, name = tmp_path / "model.gguf", "patch_embedding.weight"
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
    stored = tensor.flatten(1).view(torch.uint8).numpy()
    writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = Weights("high", (file,), "official", "", "gguf BF16", {})
    ((found, read),) = read_tensors(weights)
    assert found == transformer_name(name)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, tensor)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (6, 4, 1)])
def test_fp8_is_its_weight_times_its_scale(shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(6, 32).to(torch.float8_e4m3fn), torch.rand(shape)
    factors = scale.reshape(-1, scale.shape[1] if scale.ndim == 3 else 1)  # (1 or 6, 1 or 4)
    factors = factors.repeat_interleave(32 // factors.shape[1], dim=1).expand(6, 32)
    assert torch.equal(dequantise_fp8(weight, scale), weight.float() * factors)


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 2), (6, 5, 1)])
def test_a_scale_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit a weight"):
        dequantise_fp8(torch.ones(6, 32).to(torch.float8_e4m3fn), torch.rand(shape))


def test_a_text_encoder_is_made_whole_with_no_copy_of_it(tmp_path: Path) -> None:
    """Beside the finished model there is the stored embedding, and a few of its rows in fp32."""
    config = UMT5Config(vocab_size=131072, d_model=256, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "umt5.gguf"
    layouts.write_gguf_text_encoder(tmp_path, file, "Q8_0")
    settings = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    weights = Weights("text_encoder", (file,), "llama", "", "", settings)
    beside, _ = loading_bytes(partial(build_text_encoder, weights, torch.bfloat16, "cpu"))
    assert file.stat().st_size > 3e7
    assert beside < 1.2 * file.stat().st_size + SLACK < 67e6  # the finished embedding
