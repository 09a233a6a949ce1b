"""Writes a toy model in every layout that Wan 2.2 is published in, from its diffusers folder.

Names are translated from the library's to the official ones, the way that `wan/` never goes, so a
mistake in one direction is not hidden by the same mistake in the other. Source: `spec/wan22.md`
section 7.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from quantised import gguf_data, to_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.variants import FOLDER_OF_EXPERT, Expert, Variant

Tensors = dict[str, Tensor]

WEIGHTS = "diffusion_pytorch_model.safetensors"
SUBFOLDER_OF_EXPERT: dict[Expert, str] = {
    "high": "high_noise_model",
    "low": "low_noise_model",
    "single": ".",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMFY_PREFIX = "model.diffusion_model."

TRANSFORMER_NAMES = (
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
VAE_NAMES = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"\.conv_in\.", ".conv1."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.norm_out\.", ".head.0."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(resnets\.\d+|down_blocks\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"downsamples.\1.downsamples.\2"),
    (r"down_blocks\.(\d+)\.downsampler", r"downsamples.\1.downsamples.2"),
    (r"down_blocks\.", "downsamples."),
    (r"up_blocks\.(\d+)\.upsampler\.", r"upsamples.\1.upsamples.3."),
)
TEXT_NAMES = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)
LLAMA_NAMES = (
    (r"^token_embedding\.", "token_embd."),
    (r"^norm\.", "enc.output_norm."),
    (r"^blocks\.", "enc.blk."),
    (r"\.norm1\.", ".attn_norm."),
    (r"\.norm2\.", ".ffn_norm."),
    (r"\.pos_embedding\.embedding\.", ".attn_rel_b."),
    (r"\.attn\.([qkvo])\.", r".attn_\1."),
    (r"\.ffn\.gate\.0\.", ".ffn_gate."),
    (r"\.ffn\.fc1\.", ".ffn_up."),
    (r"\.ffn\.fc2\.", ".ffn_down."),
)


def official_transformer(tensors: Mapping[str, Tensor]) -> Tensors:
    """A transformer of diffusers under the official names."""
    return {_translate(name, TRANSFORMER_NAMES): tensor for name, tensor in tensors.items()}


def official_vae(tensors: Mapping[str, Tensor]) -> Tensors:
    """A VAE of diffusers, 2.1 or 2.2, under the official names."""
    deep = any("upsampler." in name for name in tensors)  # stages of 2.2 are lists in a list

    def flat(stage: re.Match[str]) -> str:
        if deep:
            return f"upsamples.{stage[1]}.upsamples.{stage[3]}"
        return f"upsamples.{4 * int(stage[1]) + (int(stage[3]) if stage[2] == 'resnets' else 3)}"

    stage = r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)"
    return {re.sub(stage, flat, _translate(n, VAE_NAMES)): tensor for n, tensor in tensors.items()}


def official_text_encoder(tensors: Mapping[str, Tensor]) -> Tensors:
    """A text encoder of transformers under the official names."""
    return {
        _translate(name, TEXT_NAMES): tensor
        for name, tensor in tensors.items()
        if name != "encoder.embed_tokens.weight"  # tied
    }


def llama_text_encoder(tensors: Mapping[str, Tensor]) -> Tensors:
    """A text encoder of transformers under the names of llama.cpp."""
    official = official_text_encoder(tensors)
    return {_translate(name, LLAMA_NAMES): tensor for name, tensor in official.items()}


def write_official(source: Path, target: Path, variant: Variant) -> Path:
    """The official repository: fp32 shards, `.pth` for VAE and text encoder, google/umt5-xxl."""
    for expert in variant.experts:
        folder = target / SUBFOLDER_OF_EXPERT[expert]
        folder.mkdir(parents=True, exist_ok=True)
        ours = json.loads((source / FOLDER_OF_EXPERT[expert] / "config.json").read_text())
        config = {
            "_class_name": "WanModel",
            "_diffusers_version": "0.33.0",
            "dim": ours["num_attention_heads"] * ours["attention_head_dim"],
            "eps": 1e-6,
            "ffn_dim": ours["ffn_dim"],
            "freq_dim": ours["freq_dim"],
            "in_dim": ours["in_channels"],
            "model_type": {"none": "t2v", "channels": "i2v"}.get(variant.conditioning, "ti2v"),
            "num_heads": ours["num_attention_heads"],
            "num_layers": ours["num_layers"],
            "out_dim": ours["out_channels"],
            "text_len": 512,
        }
        (folder / "config.json").write_text(json.dumps(config))
        tensors = official_transformer(load_file(source / FOLDER_OF_EXPERT[expert] / WEIGHTS))
        write_shards(tensors, folder, WEIGHTS)
    vae = official_vae(load_file(source / "vae" / WEIGHTS))
    torch.save(vae, target / ("Wan2.2_VAE.pth" if variant.vae.patch_size else "Wan2.1_VAE.pth"))
    text = official_text_encoder(load_file(source / "text_encoder" / "model.safetensors"))
    stored = {name: tensor.bfloat16() for name, tensor in text.items()}
    torch.save(stored, target / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(source / "tokenizer", target / "google" / "umt5-xxl")
    (target / "configuration.json").write_text('{"framework": "Pytorch"}')  # of ModelScope
    return target


def write_sharded_diffusers(source: Path, target: Path) -> Path:
    """The diffusers folder with each part's weights in two shards and an index."""
    shutil.copytree(source, target)
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        file = target / name / ("model.safetensors" if name == "text_encoder" else WEIGHTS)
        if file.is_file():
            tensors = load_file(file)
            file.unlink()
            write_shards(tensors, file.parent, file.name)
    return target


def write_shards(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """Two safetensors shards and the index that names them."""
    names = sorted(tensors)
    shards = {f"{name[:-12]}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, {"format": "pt"})
    weight_map = {n: file for file, part in shards.items() for n in part}
    (folder / f"{name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_comfy(
    source: Path, target: Path, variant: Variant, storage: str = "bf16", prefix: str = ""
) -> Path:
    """A ComfyUI `models` folder: one file for each part, none of them a tokenizer."""
    for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    kind = variant.name.split("_")[0]
    for expert in variant.experts:
        name = "5B" if expert == "single" else f"{expert}_noise_14B"
        file = target / "diffusion_models" / f"wan2.2_{kind}_{name}_{storage}.safetensors"
        write_comfy_transformer(source / FOLDER_OF_EXPERT[expert], file, storage, prefix)
    vae = official_vae(load_file(source / "vae" / WEIGHTS))
    vae_name = "wan2.2_vae" if variant.vae.patch_size else "wan_2.1_vae"
    save_file(_cast(vae, torch.bfloat16), target / "vae" / f"{vae_name}.safetensors")
    write_comfy_text_encoder(source, target / "text_encoders" / "umt5_xxl_fp16.safetensors", "fp16")
    return target


def write_comfy_transformer(
    folder: Path, file: Path, storage: str = "bf16", prefix: str = ""
) -> Tensors:
    """One file with official names; `storage` is of `DTYPES` or of `quantised.FP8_FLAVOURS`.

    Returns what should be read back: fp32, under diffusers' names.
    """
    library = load_file(folder / WEIGHTS)
    names = {_translate(name, TRANSFORMER_NAMES): name for name in library}
    tensors = official_transformer(library)
    if storage in DTYPES:
        stored, metadata = _cast(tensors, DTYPES[storage]), {}
        expected = {name: tensor.float() for name, tensor in stored.items()}
    else:
        linears = [n for n, t in tensors.items() if t.ndim == 2]
        stored, expected, metadata = to_fp8(tensors, linears, storage)
    save_file({prefix + name: tensor for name, tensor in stored.items()}, file, metadata or None)
    return {names[name]: tensor for name, tensor in expected.items()}


def write_comfy_text_encoder(source: Path, file: Path, storage: str = "fp16") -> Tensors:
    """One file with the names of transformers and the tokenizer's bytes as a tensor.

    Returns what should be read back: fp32, under the names of transformers.
    """
    tensors = load_file(source / "text_encoder" / "model.safetensors")
    tensors.pop("encoder.embed_tokens.weight", None)
    if storage in DTYPES:
        stored, metadata = _cast(tensors, DTYPES[storage]), {}
        expected = {name: tensor.float() for name, tensor in stored.items()}
    else:
        linears = [
            n for n, t in tensors.items() if t.ndim == 2 and "shared" not in n and "bias" not in n
        ]
        stored, expected, metadata = to_fp8(tensors, linears, storage)
    spiece = torch.arange(100, dtype=torch.uint8)
    save_file(stored | {"spiece_model": spiece}, file, metadata or None)
    return expected


def write_gguf_transformer(
    folder: Path, file: Path, kind: str = "Q8_0", reshaped: bool = False
) -> Tensors:
    """A GGUF of `kind`, such as Q4_K: 2-D weights of the blocks quantised, as city96's tool does.

    `reshaped`: the 5-D patch embedding is stored flat with its shape as metadata. Returns what
    should be read back: fp32, under diffusers' names.
    """
    library = load_file(folder / WEIGHTS)
    names = {_translate(name, TRANSFORMER_NAMES): name for name in library}
    writer, expected = gguf.GGUFWriter(file, "wan"), {}
    for name, tensor in official_transformer(library).items():
        exempt = "F16" if tensor.ndim == 2 else "F32"
        stored = kind if tensor.ndim == 2 and name.startswith("blocks.") else exempt
        flat = tensor.flatten(1) if reshaped and tensor.ndim == 5 else tensor
        if flat is not tensor:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        data, values = gguf_data(flat, stored)
        expected[names[name]] = values.reshape(tensor.shape)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[stored])
    _close(writer)
    return expected


def write_gguf_text_encoder(source: Path, file: Path, kind: str = "Q8_0") -> Tensors:
    """A GGUF as llama.cpp converts UMT5, with a tokenizer in its metadata.

    Returns what should be read back: fp32, under the names of transformers.
    """
    tensors = load_file(source / "text_encoder" / "model.safetensors")
    tensors.pop("encoder.embed_tokens.weight", None)
    writer, expected = gguf.GGUFWriter(file, "t5encoder"), {}
    writer.add_token_list([f"token {i}" for i in range(272)])
    writer.add_token_scores([0.0] * 272)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim == 2 and "relative" not in name else "F32"
        data, expected[name] = gguf_data(tensor, stored)
        llama = _translate(_translate(name, TEXT_NAMES), LLAMA_NAMES)
        writer.add_tensor(llama, data, raw_dtype=gguf.GGMLQuantizationType[stored])
    _close(writer)
    return expected


def write_hub_cache(source: Path, hub: Path, repository: str) -> Path:
    """The Hugging Face cache: files are links to blobs that are named by their hash alone."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "blobs").mkdir()
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = folder / "snapshots" / revision / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = len(link.parent.relative_to(folder).parts)
        link.symlink_to(Path(*[".."] * up) / "blobs" / blob.name)
    return folder


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _translate(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
