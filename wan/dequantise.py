"""Weights stored in fewer bits: fp8 with scales, and GGUF.

The linears of a transformer's blocks may stay as a GGUF stores them (`wan/quantise.py`); everything
else is made whole while it is read. Source: `spec/wan22.md` sections 7.6 to 7.8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from wan.headers import TensorHeader, read_header

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS = 4096  # made whole at a time: an embedding of 256,384 rows would be 4 GB in fp32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as GGUF quantised it, on the CPU."""

    stored: Tensor  # (..., bytes): each row is whole blocks
    kind: str  # "Q4_K"
    shape: torch.Size  # that it stands for


def dequantise_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """W (out, in) in fp32 of a fp8 weight and its scale, exactly weight * scale.

    The scale has one value, one for each row, or (out, blocks, 1) for equal blocks of each row.
    `ValueError` if it has another shape.
    """
    has_rows = weight.ndim > 0 and weight.numel() > 0
    rows = weight.shape[0] if has_rows and scale.numel() > 1 else 1
    blocks = scale.numel() // rows
    if not has_rows or not blocks or scale.numel() % rows or weight[0].numel() % blocks:
        raise ValueError(
            f"a scale {tuple(scale.shape)} does not fit a weight {tuple(weight.shape)}"
        )
    whole = weight.to(torch.float32, copy=True).reshape(weight.shape[0], blocks, -1)
    return whole.mul_(scale.float().reshape(rows, blocks, 1)).reshape(weight.shape)


def gguf_tensors(file: Path) -> dict[str, Callable[[], Tensor | GgufTensor]]:
    """How to read each tensor of a GGUF file, by its name.

    `ModelError` if the file is cut short or no GGUF.
    """
    # Not by GGUFReader, which makes Python objects of a vocabulary of 256,384 tokens.
    tensors = read_header(file).tensors
    return {name: partial(_read_gguf, file, tensor) for name, tensor in tensors.items()}


def dequantise_gguf(
    tensor: GgufTensor, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A quantised tensor as a plain one in `dtype`, made on a device."""
    return gguf_rows(tensor.stored.to(device), tensor.kind, dtype).reshape(tensor.shape)


def gguf_rows(stored: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of bytes that GGUF quantised in a way ("Q4_K") as (rows, values), rounded once."""
    # Here, as it takes seconds: most programs that read headers and adapters never come here.
    from diffusers.quantizers.gguf.utils import dequantize_functions

    quantised = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[quantised]  # of a block
    width = stored.shape[-1] // size * values
    rows = stored.reshape(-1, stored.shape[-1])
    whole = torch.empty(len(rows), width, dtype=dtype, device=stored.device)
    for start in range(0, len(rows), ROWS):
        blocks = rows[start : start + ROWS].reshape(-1, size)
        # Computed in fp32: without a dtype diffusers multiplies in fp16.
        part = dequantize_functions[quantised](blocks, values, size, torch.float32)
        whole[start : start + ROWS] = part.reshape(-1, width)
    return whole


def _read_gguf(file: Path, tensor: TensorHeader) -> Tensor | GgufTensor:
    # Read, not mapped: what is mapped counts as this process's memory until the file is closed.
    stored = np.fromfile(file, np.uint8, tensor.size, offset=tensor.offset)
    data = torch.from_numpy(stored)
    if tensor.dtype in PLAIN:
        return data.view(PLAIN[tensor.dtype]).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    return GgufTensor(rows, tensor.dtype, torch.Size(tensor.shape))
