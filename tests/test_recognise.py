"""What lies in a file, told by its header: kind, naming, prefix, storage, family and expert."""

import json
import os
from pathlib import Path

import pytest
import torch
from layouts import (
    COMFY_PREFIX,
    WEIGHTS,
    official_text_encoder,
    official_transformer,
    official_vae,
    write_comfy_text_encoder,
    write_comfy_transformer,
    write_gguf_text_encoder,
    write_gguf_transformer,
)
from quantised import FP8_FLAVOURS
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.headers import ModelError
from wan.key_names import text_encoder_config, transformer_config, vae_config
from wan.recognise import expert_by_name, is_adapter, is_called_wan_21, recognise
from wan.variants import VARIANTS
from wan.weights import empty_text_encoder, empty_transformer, empty_vae


@pytest.fixture
def transformer(toy_t2v_model: Path) -> dict[str, Tensor]:
    """Under its official names."""
    return official_transformer(load_file(toy_t2v_model / "transformer" / WEIGHTS))


@pytest.mark.parametrize("prefix", ["", COMFY_PREFIX, "diffusion_model."])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16", *FP8_FLAVOURS])
def test_single_files_of_a_transformer(
    toy_t2v_model: Path, tmp_path: Path, storage: str, prefix: str
) -> None:
    file = tmp_path / "model.safetensors"
    expected = write_comfy_transformer(toy_t2v_model / "transformer", file, storage, prefix)
    found = recognise([file])
    plain = "fp8_scaled" if storage.startswith("fp8_") else storage
    assert (found.kind, found.naming, found.prefix) == ("transformer", "official", prefix)
    assert found.storage == plain
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}


@pytest.mark.parametrize("reshaped", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q4_K", "Q6_K"])
def test_gguf_of_a_transformer(
    toy_t2v_model: Path, tmp_path: Path, kind: str, reshaped: bool
) -> None:
    file = tmp_path / "model.gguf"
    expected = write_gguf_transformer(toy_t2v_model / "transformer", file, kind, reshaped)
    found = recognise([file])
    assert (found.kind, found.naming, found.storage) == ("transformer", "official", f"gguf {kind}")
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}


@pytest.mark.parametrize("storage", ["fp16", "fp8", "fp8_comfy", "fp8_comfy_new"])
def test_single_files_of_a_text_encoder(toy_t2v_model: Path, tmp_path: Path, storage: str) -> None:
    file = tmp_path / "umt5.safetensors"
    expected = write_comfy_text_encoder(toy_t2v_model, file, storage)
    found = recognise([file])
    assert (found.kind, found.naming) == ("text_encoder", "transformers")
    assert found.storage == ("fp8_scaled" if storage.startswith("fp8_") else storage)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def test_gguf_of_a_text_encoder(toy_t2v_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "umt5.gguf"
    expected = write_gguf_text_encoder(toy_t2v_model, file)
    found = recognise([file])
    assert (found.kind, found.naming, found.storage) == ("text_encoder", "llama", "gguf Q8_0")
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}


@pytest.mark.parametrize("model", ["toy_t2v_model", "toy_ti2v_model"])
def test_official_and_library_names_give_the_same_shapes(
    request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    vae = recognise([folder / "vae" / WEIGHTS])
    assert (vae.kind, vae.naming) == ("vae", "diffusers")
    torch.save(official_vae(load_file(folder / "vae" / WEIGHTS)), tmp_path / "vae.pth")
    official = recognise([tmp_path / "vae.pth"])
    assert (official.kind, official.naming, official.storage) == ("vae", "official", "fp32")
    assert official.shapes == vae.shapes
    text = folder / "text_encoder" / "model.safetensors"
    torch.save(official_text_encoder(load_file(text)), tmp_path / "t5.pth")
    assert recognise([tmp_path / "t5.pth"]).shapes == recognise([text]).shapes
    assert recognise([tmp_path / "t5.pth"]).naming == "official"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("img_emb.proj.0.weight", "is an image-to-video model of Wan 2.1"),
        ("blocks.0.cross_attn.k_img.weight", "is an image-to-video model of Wan 2.1"),
        ("vace_blocks.0.self_attn.q.weight", "is a VACE model"),
        ("face_adapter.fuser_blocks.0.k.weight", "is Wan-Animate"),
        ("casual_audio_encoder.weights", "is a speech-to-video model"),
        ("ref_conv.weight", "is a Fun model"),
    ],
)
def test_relatives_of_wan_22_are_refused(
    transformer: dict[str, Tensor], tmp_path: Path, name: str, message: str
) -> None:
    save_file(transformer | {name: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        recognise([tmp_path / "model.safetensors"])


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "transformer.blocks.0.attn1.to_q.lora_B.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q.lokr_w1",
        "diffusion_model.blocks.0.self_attn.q.hada_w1_a",
        "diffusion_model.blocks.0.self_attn.q.diff_b",
        "blocks.0.self_attn.q.lora_magnitude_vector.weight",
    ],
)
def test_a_lora_is_no_model(tmp_path: Path, name: str) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.zeros(1)}, file)
    assert is_adapter(file)
    with pytest.raises(ModelError, match=r"holds a LoRA, not a model: .* tools/render.py"):
        recognise([file])


def test_a_model_is_no_lora(transformer: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(transformer, tmp_path / "model.safetensors")
    assert not is_adapter(tmp_path / "model.safetensors")


def test_other_models_are_told(toy_t2v_model: Path, tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(1)}, tmp_path / "f.safetensors")
    with pytest.raises(ModelError, match=r"no transformer, VAE or text encoder of Wan"):
        recognise([tmp_path / "f.safetensors"])
    text = load_file(toy_t2v_model / "text_encoder" / "model.safetensors")
    first_bias_only = {n: t for n, t in text.items() if "bias" not in n or "block.0." in n}
    save_file(first_bias_only, tmp_path / "t5xxl.safetensors")
    with pytest.raises(ModelError, match="is T5, as Flux and SD3 use it, and not UMT5-XXL"):
        recognise([tmp_path / "t5xxl.safetensors"])


def test_quantisations_that_nothing_reads_are_refused(
    toy_t2v_model: Path, transformer: dict[str, Tensor], tmp_path: Path
) -> None:
    eight = {n: t.to(torch.int8) if t.ndim == 2 else t for n, t in transformer.items()}
    save_file(eight, tmp_path / "int8.safetensors")
    with pytest.raises(ModelError, match="is stored as I8, a quantisation that is not read"):
        recognise([tmp_path / "int8.safetensors"])
    scale = {"blocks.0.ffn.0.weight_scale": torch.zeros(4, 4, dtype=torch.uint8)}
    save_file(transformer | scale, tmp_path / "mxfp8.safetensors")
    with pytest.raises(ModelError, match=r"scale blocks.0.ffn.0.weight_scale is stored as U8"):
        recognise([tmp_path / "mxfp8.safetensors"])
    file = tmp_path / "model.gguf"
    write_gguf_transformer(toy_t2v_model / "transformer", file, "TQ2_0")
    with pytest.raises(ModelError, match="is quantised as TQ2_0, which cannot be computed with"):
        recognise([file])


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high"),
        ("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "low"),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "high"),
        ("Wan2.2-T2V-A14B-LowNoise-Q8_0.gguf", "low"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_bf16.safetensors", "low"),
        ("high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "high"),
        ("LowNoise/model.gguf", "low"),
        ("transformer_2/diffusion_pytorch_model.safetensors", "low"),
        ("transformer/diffusion_pytorch_model.safetensors", None),
        ("low_noise_model/my_high_noise_merge.safetensors", "high"),
        ("highlights_follow.safetensors", None),
        ("lowvram_model.safetensors", None),
        ("wan2.2_low_vram.safetensors", None),
        ("wan2.2_high_quality_low.safetensors", "low"),
        ("low/model.gguf", "low"),
        ("my_low_budget_models/model.gguf", None),
        ("high_and_low.safetensors", None),
        ("wan2.2_ti2v_5B_fp16.safetensors", None),
    ],
)
def test_the_expert_by_name(tmp_path: Path, name: str, expert: str | None) -> None:
    assert expert_by_name(tmp_path / name) == expert


def test_a_transformer_beside_another_is_the_high_one(toy_model: Path) -> None:
    assert expert_by_name(toy_model / "transformer" / WEIGHTS) == "high"
    assert expert_by_name(toy_model / "transformer_2" / WEIGHTS) == "low"


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("wan2.1_t2v_14B_fp16.safetensors", True),
        ("Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", True),
        ("Wan2.1-T2V-14B/diffusion_pytorch_model-00001-of-00006.safetensors", True),
        (
            "hub/models--Wan-AI--Wan2.1-T2V-14B-Diffusers/snapshots/0/transformer/x.safetensors",
            True,
        ),
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", False),
        ("wan2.1/wan2.2_t2v_high_noise_14B_fp16.safetensors", False),
        ("wan_14B.safetensors", False),
    ],
)
def test_names_that_speak_of_wan_21(name: str, called: bool) -> None:
    assert is_called_wan_21(Path("/models") / name) == called


def test_a_full_size_header_is_enough(tmp_path: Path) -> None:
    """All four parts of T2V-A14B as files of 79 GB that take no room: no tensor can be read."""
    facts = VARIANTS["t2v_a14b"]
    whole = empty_transformer(transformer_config(facts)).state_dict()
    text = empty_text_encoder(text_encoder_config()).state_dict()
    text.pop("encoder.embed_tokens.weight")
    tensors = {
        "high_noise": official_transformer(whole),
        "low_noise": whole,
        "vae": official_vae(empty_vae(vae_config(facts)).state_dict()),
        "umt5": official_text_encoder(text),
    }
    for name, part in tensors.items():
        file = tmp_path / f"{name}.safetensors"
        write_hollow(file, part)
        assert file.stat().st_blocks * 512 < 1_000_000
        found = recognise([file])
        assert len(found.shapes) == len(part)
        assert found.storage == "bf16"
    assert (tmp_path / "high_noise.safetensors").stat().st_size > 28_000_000_000


def write_hollow(file: Path, tensors: dict[str, Tensor]) -> None:
    """A bf16 safetensors file with a header and a hole where its data belongs."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    content = json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(file, 8 + len(content) + end)
