"""A weight in fewer bits: how it is packed, and what it stands for.

fp8 (e4m3) and int8 have a scale for each row of the weight, nf4 one for each 64 values; GGUF is as
its file stores it. nf4 is that of bitsandbytes; its int8 would be rows with scales as well, but its
kernel takes fp16 alone, which rounds rows below 6e-5. Source: `spec/wan22.md` section 7.6.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wan.dequantise import gguf_rows
from wan.headers import ModelError
from wan.speed_choices import FrozenFormat

FP8_FORMATS = ("fp8", "fp8_weights")
ROW_FORMATS = (*FP8_FORMATS, "int8")  # a scale for each row

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127.0
NF4_BLOCK = 64  # values that share a scale
ROWS = 256  # packed at a time, which takes several times their size; blocks of nf4 fit in them
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class PackedWeight:
    """A weight (out, in) as `make_whole` reads it; each row of `data` is one of the weight."""

    data: Tensor  # (out, in) for fp8 and int8, (out, bytes) else
    scale: Tensor  # fp32: (out, 1) for fp8 and int8, (blocks,) for nf4, (0,) for GGUF
    format: str  # a FrozenFormat, or what GGUF calls it: "Q4_K"

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same on a device."""
        return replace(self, data=self.data.to(device), scale=self.scale.to(device))


def check_format(format: FrozenFormat | None) -> None:
    """`ModelError` if what packs the format is not installed."""
    if format != "nf4":
        return
    try:
        import bitsandbytes  # noqa: F401  (it brings operators)
    except ImportError:
        raise ModelError(
            "speed.frozen=nf4 needs the package bitsandbytes, which is not installed: run "
            "`pip install -e '.[gpu]'`, or set speed.frozen=fp8"
        ) from None


def pack(weight: Tensor, format: FrozenFormat) -> PackedWeight:
    """A weight (out, in) in a format, on its device."""
    check_format(format)
    packed = _empty(weight, format)
    row = block = 0
    for rows in weight.split(ROWS):
        data, scale = _pack_rows(rows, format)
        packed.data[row : row + len(data)] = data
        packed.scale[block : block + len(scale)] = scale
        row, block = row + len(data), block + len(scale)
    return packed


def _empty(weight: Tensor, format: FrozenFormat) -> PackedWeight:
    # Before anything that passes: what stays must not lie between holes in the host's memory.
    out, width = weight.shape
    if format == "nf4":
        data = torch.empty(out, width // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(-(-out * width // NF4_BLOCK), device=weight.device)
    else:
        dtype = torch.int8 if format == "int8" else FP8
        data = torch.empty(out, width, dtype=dtype, device=weight.device)
        scale = torch.empty(out, 1, device=weight.device)
    return PackedWeight(data, scale, format)


def _pack_rows(rows: Tensor, format: FrozenFormat) -> tuple[Tensor, Tensor]:
    if format == "nf4":
        data, scales = torch.ops.bitsandbytes.quantize_4bit(rows, NF4_BLOCK, "nf4", torch.uint8)
        return data.reshape(len(rows), -1), scales
    if format == "int8":
        scale = _row_scale(rows.float(), INT8_MAX)
        return (rows.float() / scale).round().to(torch.int8), scale
    return fp8_rows(rows)


def fp8_as_stored(data: Tensor, scale: Tensor | None, format: FrozenFormat) -> PackedWeight | None:
    """A weight that a file has in fp8 (e4m3) with these scales, without rounding it again.

    None if the format is no fp8, the weight is not, or a row has several scales.
    """
    rows = len(data)
    scale = torch.ones(1) if scale is None else scale
    if format not in FP8_FORMATS or data.dtype != FP8 or scale.numel() not in (1, rows):
        return None
    # Copies: a file that is replaced under a run must not change its model.
    scales = scale.float().reshape(-1, 1).repeat(rows // scale.numel(), 1)
    return PackedWeight(data.clone(), scales, format)


def fp8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (L, K) as (L, K) in e4m3 and scales (L, 1) in fp32: rows = quantised * scales."""
    whole = rows.float()
    scale = _row_scale(whole, FP8_MAX)
    quantised = (whole / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantised.contiguous(), scale


def _row_scale(rows: Tensor, largest: float) -> Tensor:
    """(L, 1) that makes `largest` of the largest number of each row (L, K), in fp32."""
    # The smallest normal number instead of 0: a row of zeros stays one, and none is divided by 0.
    # Times the inverse, as a GPU divides by a constant: the same bits on each device.
    return (rows.abs().amax(dim=-1, keepdim=True) * (1 / largest)).clamp_min(TINY)


def make_whole(data: Tensor, scale: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that a `PackedWeight` of these fields stands for, in `dtype`."""
    if format in ROW_FORMATS:
        return (data.float() * scale).to(dtype)
    if format != "nf4":
        return gguf_rows(data, format, dtype)
    shape = (data.shape[0], 2 * data.shape[1])
    columns = data.reshape(-1, 1)  # as its kernels want it
    return torch.ops.bitsandbytes.dequantize_4bit(columns, scale, NF4_BLOCK, "nf4", shape, dtype)
