"""Weights stored in fewer bits: fp8 with scales, and GGUF.

GGUF weights of a transformer stay as they are stored, in diffusers' GGUFLinear, which makes them
whole for each call; everything else is made whole while it is read. Source: `spec/wan22.md`
sections 7.6 to 7.8.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn

from wan.headers import TensorHeader, read_header

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS = 4096  # made whole at a time: an embedding of 256,384 rows would be 4 GB in fp32


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """W (out, in) in fp32 of a fp8 weight and its scale, exactly weight * scale.

    The scale has one value, one for each row, or (out, blocks, 1) for equal blocks of each row.
    `ValueError` if it has another shape.
    """
    rows = 1 if scale.numel() == 1 else weight.shape[0]
    blocks = scale.numel() // rows
    if not blocks or scale.numel() % rows or weight[0].numel() % blocks:
        raise ValueError(
            f"a scale {tuple(scale.shape)} does not fit a weight {tuple(weight.shape)}"
        )
    whole = weight.to(torch.float32, copy=True).reshape(weight.shape[0], blocks, -1)
    return whole.mul_(scale.float().reshape(rows, blocks, 1)).reshape(weight.shape)


def gguf_tensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of a GGUF file, by its name: a GGUFParameter if it is quantised.

    `ModelError` if the file is cut short or no GGUF.
    """
    # Not by GGUFReader, which makes Python objects of a vocabulary of 256,384 tokens.
    tensors = read_header(file).tensors
    return {name: partial(_read_gguf, file, tensor) for name, tensor in tensors.items()}


def quantisation(parameter: GGUFParameter) -> tuple[gguf.GGMLQuantizationType, torch.Size]:
    """How a tensor is stored, and the shape that it stands for."""
    return parameter.quant_type, torch.Size(parameter.quant_shape)  # pyright: ignore[reportAttributeAccessIssue] (both are set in its __new__)


def dequantise_gguf(parameter: GGUFParameter, dtype: torch.dtype) -> Tensor:
    """A quantised tensor on the CPU as a plain one in `dtype`."""
    kind, shape = quantisation(parameter)
    data, whole = parameter.as_tensor().numpy(), torch.empty(shape, dtype=dtype)
    for start in range(0, len(data), ROWS):
        rows = gguf.quants.dequantize(data[start : start + ROWS], kind)
        whole[start : start + ROWS] = torch.from_numpy(rows)
    return whole


def gguf_linear(linear: nn.Linear, weight: GGUFParameter, dtype: torch.dtype) -> GGUFLinear:
    """`linear`, with its bias, on a quantised weight: it computes in `dtype`, its input's dtype."""
    with torch.device("meta"):
        quantised = GGUFLinear(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype
        )
    quantised.weight, quantised.bias = weight, linear.bias
    return quantised


def _read_gguf(file: Path, tensor: TensorHeader) -> Tensor:
    # Read, not mapped: what is mapped counts as this process's memory until the file is closed.
    stored = np.fromfile(file, np.uint8, tensor.size, offset=tensor.offset)
    data = torch.from_numpy(stored)
    if tensor.dtype in PLAIN:
        return data.view(PLAIN[tensor.dtype]).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    kind = gguf.GGMLQuantizationType[tensor.dtype]
    return GGUFParameter(rows, quant_type=kind)  # pyright: ignore[reportCallIssue] (its __new__ takes it)
