"""PyTorch operators for a frozen weight: a wide product, and a narrow one added to it in place.

They are opaque to the compiler, which would copy instead of adding in place, and would find a
weight made whole in both passes to be the same, and keep it in between: the whole model in bf16.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from wan.compiler import can_compile, compiled
from wan.quantised_weight import make_whole

# PyTorch's `custom_op` would do the same, and take 100 microseconds of the host for each call.
OPERATORS = torch.library.Library("wan", "DEF")

OPERATORS.define(
    "plain_product(Tensor rows, Tensor columns, Tensor? bias, Tensor? inner, Tensor? wide)"
    " -> Tensor"
)
OPERATORS.define(
    "fp8_product(Tensor rows, Tensor columns, Tensor row_scale, Tensor scale, Tensor? bias,"
    " Tensor? inner, Tensor? wide, ScalarType dtype) -> Tensor"
)
OPERATORS.define(
    "fp8_input_gradient(Tensor rows, Tensor data, Tensor row_scale, Tensor? inner, Tensor? wide,"
    " ScalarType dtype) -> Tensor"
)
OPERATORS.define(
    "whole_product(Tensor rows, Tensor data, Tensor scale, Tensor? bias, str format,"
    " Tensor? inner, Tensor? wide) -> Tensor"
)
OPERATORS.define(
    "whole_input_gradient(Tensor grad, Tensor data, Tensor scale, str format, SymInt width,"
    " Tensor? inner, Tensor? wide) -> Tensor"
)
OPERATORS.define("factor_gradient(Tensor left, Tensor right, ScalarType dtype) -> Tensor")


def _plain_product(
    rows: Tensor, columns: Tensor, bias: Tensor | None, inner: Tensor | None, wide: Tensor | None
) -> Tensor:
    """rows (L, K) times columns (K, N) plus bias (N,) plus inner (L, rank) times wide (rank, N)."""
    if inner is not None and wide is not None and rows.is_cuda:
        # The narrow one first: to read y again, the wide product's kernel has time.
        y = inner @ wide if bias is None else torch.addmm(bias, inner, wide)
        return y.addmm_(rows, columns)
    y = rows @ columns if bias is None else torch.addmm(bias, rows, columns)
    return _with_narrow(y, inner, wide)  # without an effect it is the base's to the bit


def _fp8_product(  # noqa: PLR0913 (an operator takes its tensors one by one)
    rows: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    wide: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """rows (L, K) * row_scale (L, 1) times columns (K, N) * scale (1, N), both in fp8, and so on.

    A card with scales of rows has such products in bf16 alone.
    """
    if rows.device.type == "cpu":
        y = (rows.float() @ columns.float()) * row_scale * scale
        y = y if bias is None else y + bias
    else:
        bias = None if bias is None else bias.bfloat16()
        y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] (no other takes scales)
            rows,
            columns,
            row_scale,
            scale,
            bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return _with_narrow(y.to(dtype), inner, wide)


def _fp8_input_gradient(
    rows: Tensor,
    data: Tensor,
    row_scale: Tensor,
    inner: Tensor | None,
    wide: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """rows (L, out) * row_scale (L, 1) times data (out, in), both in fp8, plus the narrow product.

    Columns that lie together are a copy, in one byte and for this product only.
    """
    turn = _turner() if rows.is_cuda and can_compile(rows.device) else turned_weight
    columns = turn(data).T  # (out, in)
    ones = row_scale.new_ones(1, data.shape[1])
    return _fp8_product(rows, columns, row_scale, ones, None, inner, wide, dtype)


def _whole_product(
    rows: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    inner: Tensor | None,
    wide: Tensor | None,
) -> Tensor:
    return _plain_product(rows, make_whole(data, scale, format, rows.dtype).T, bias, inner, wide)


def _whole_input_gradient(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    format: str,
    width: int,
    inner: Tensor | None,
    wide: Tensor | None,
) -> Tensor:
    """grad (L, out) times the weight (out, width) made whole."""
    return _plain_product(grad, make_whole(data, scale, format, grad.dtype), None, inner, wide)


def _factor_gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left (L, M) turned, times right (L, N), in `dtype`: a card's sums in fp32 stay so."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left.T, right, out_dtype=dtype)
    return (left.T @ right).to(dtype)


def _with_narrow(y: Tensor, inner: Tensor | None, wide: Tensor | None) -> Tensor:
    """y + inner wide, where y lies."""
    if inner is None or wide is None:
        return y
    if y.is_cuda and y.dtype == torch.bfloat16 and can_compile(y.device):
        from wan.narrow_kernel import WIDEST, add_narrow  # (a CPU's PyTorch brings no Triton)

        if inner.shape[1] <= WIDEST:
            return add_narrow(y, inner, wide)
    return y.addmm_(inner, wide)


for _function in (
    _plain_product,
    _fp8_product,
    _fp8_input_gradient,
    _whole_product,
    _whole_input_gradient,
    _factor_gradient,
):
    OPERATORS.impl(_function.__name__[1:], _function, "CompositeExplicitAutograd")


@torch.library.register_fake("wan::plain_product")
def _(
    rows: Tensor, columns: Tensor, bias: Tensor | None, inner: Tensor | None, wide: Tensor | None
) -> Tensor:
    return rows.new_empty(rows.shape[0], columns.shape[1])


@torch.library.register_fake("wan::fp8_product")
def _(  # noqa: PLR0913 (as above)
    rows: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inner: Tensor | None,
    wide: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return rows.new_empty(rows.shape[0], columns.shape[1], dtype=dtype)


@torch.library.register_fake("wan::fp8_input_gradient")
def _(
    rows: Tensor,
    data: Tensor,
    row_scale: Tensor,
    inner: Tensor | None,
    wide: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return rows.new_empty(rows.shape[0], data.shape[1], dtype=dtype)


@torch.library.register_fake("wan::whole_product")
def _(
    rows: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    inner: Tensor | None,
    wide: Tensor | None,
) -> Tensor:
    return rows.new_empty(rows.shape[0], data.shape[0])


@torch.library.register_fake("wan::whole_input_gradient")
def _(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    format: str,
    width: int,
    inner: Tensor | None,
    wide: Tensor | None,
) -> Tensor:
    return grad.new_empty(grad.shape[0], width)


@torch.library.register_fake("wan::factor_gradient")
def _(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=dtype)


def turned_weight(data: Tensor) -> Tensor:
    """Data (out, in) in fp8 as (in, out)."""
    return data.view(torch.uint8).T.contiguous().view(data.dtype)


@cache
def _turner() -> Callable[[Tensor], Tensor]:
    """PyTorch's own kernel reads bytes one by one, and takes five times as long."""
    return compiled(turned_weight)
