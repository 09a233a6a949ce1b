"""Weights stored in fewer bits, in each flavour that is published, with what they stand for.

Source: `spec/wan22.md` sections 7.6 and 7.7.
"""

import json
from collections.abc import Mapping, Sequence

import gguf
import numpy as np
import torch
from torch import Tensor

FP8_MAX = 448.0
BLOCK = 32  # columns that share a scale in musubi's block mode

FP8_FLAVOURS = (
    "fp8",  # a plain cast, without scales
    "fp8_comfy",  # ComfyUI 2025: scale_weight, and the marker scaled_fp8
    "fp8_comfy_new",  # weight_scale, and a comfy_quant tensor beside each
    "fp8_comfy_metadata",  # weight_scale, and the file's metadata
    "fp8_lightx2v",  # weight_scale for each row
    "fp8_musubi",  # scale_weight for the tensor
    "fp8_musubi_rows",
    "fp8_musubi_blocks",
)
# Where a block holds its fp16 scales, and a scale that makes weights of about 0.03.
KQUANTS = {
    "Q2_K": ((80, 82), 3e-3),
    "Q3_K": ((108,), 1e-3),
    "Q4_K": ((0, 2), 1.5e-4),
    "Q5_K": ((0, 2), 7e-5),
    "Q6_K": ((208,), 3e-5),
}

Tensors = dict[str, Tensor]


def to_fp8(
    tensors: Mapping[str, Tensor], linears: Sequence[str], flavour: str
) -> tuple[Tensors, Tensors, dict[str, str]]:
    """(what the file holds, what it stands for in fp32, metadata); `linears` become fp8.

    What is not a linear is bf16, as in the published files.
    """
    stored: Tensors = {}
    expected: Tensors = {}
    layers: dict[str, object] = {}
    for name, tensor in tensors.items():
        if name not in linears:
            stored[name] = tensor.bfloat16().contiguous()
            expected[name] = stored[name].float()
            continue
        layer = name.removesuffix(".weight")
        scale = _scale(tensor, flavour)
        blocks = _blocks(tensor, flavour)
        weight = (blocks / scale).reshape(tensor.shape).to(torch.float8_e4m3fn)
        stored[name] = weight
        expected[name] = (_blocks(weight.float(), flavour) * scale).reshape(tensor.shape)
        if flavour in ("fp8_comfy", "fp8_musubi", "fp8_musubi_rows", "fp8_musubi_blocks"):
            stored[f"{layer}.scale_weight"] = scale
        elif flavour != "fp8":
            stored[f"{layer}.weight_scale"] = scale
        if flavour == "fp8_comfy":
            stored[f"{layer}.scale_input"] = torch.tensor(1.0)
        if flavour == "fp8_comfy_new":
            marker = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
            stored[f"{layer}.input_scale"] = torch.tensor(1.0)
        layers[layer] = {"format": "float8_e4m3fn"}
    if flavour == "fp8_comfy":
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    quantisation = {"format_version": "1.0", "layers": layers}
    new = flavour == "fp8_comfy_metadata"
    metadata = {"_quantization_metadata": json.dumps(quantisation)} if new else {}
    return stored, expected, metadata


def gguf_data(tensor: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """(bytes as GGUF stores them, what they stand for in fp32).

    The gguf package cannot quantise to K-quants, so those hold random bits with small scales.
    """
    quantisation = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        return tensor.float().contiguous().numpy(), tensor.float()
    if kind == "F16":
        return tensor.half().contiguous().numpy(), tensor.half().float()
    if kind in KQUANTS:
        data = _random_kquant(tensor.shape, kind)
    else:
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), quantisation)
    values = gguf.quants.dequantize(data, quantisation)
    return data, torch.from_numpy(values).reshape(tensor.shape)


def _random_kquant(shape: torch.Size, kind: str) -> np.ndarray:
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = shape[0] * shape[1] // values
    data = np.random.default_rng(0).integers(0, 256, (blocks, size), dtype=np.uint8)
    offsets, scale = KQUANTS[kind]
    for offset in offsets:
        data[:, offset : offset + 2] = np.array([scale], dtype=np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)


def _blocks(weight: Tensor, flavour: str) -> Tensor:
    """The weight as its scale multiplies it: (out, in), or (out, blocks, columns)."""
    return weight.unflatten(1, (-1, BLOCK)) if flavour == "fp8_musubi_blocks" else weight


def _scale(weight: Tensor, flavour: str) -> Tensor:
    if flavour == "fp8":
        return torch.tensor(1.0)
    if flavour in ("fp8_lightx2v", "fp8_musubi_rows"):
        return weight.abs().amax(dim=1, keepdim=True).float() / FP8_MAX  # (out, 1)
    if flavour == "fp8_musubi_blocks":
        return _blocks(weight, flavour).abs().amax(dim=2, keepdim=True).float() / FP8_MAX
    scale = weight.abs().max().float() / FP8_MAX
    return scale[None] if flavour == "fp8_musubi" else scale  # (1,) or ()
