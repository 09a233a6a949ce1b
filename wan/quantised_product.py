"""Products with a frozen weight in fewer bits, and their input's gradient, from one copy of it.

Saved for the backward pass is the weight as it is stored, and nothing else. The operators here are
opaque to the compiler for that reason: it would find the weight made whole in both passes to be the
same, and keep it in between, which is the whole model in bf16.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from wan.compiler import can_compile, compiled
from wan.quantised_weight import fp8_rows, make_whole

FP8_MULTIPLE = 16  # of both sides of a weight, or the card's product does not take it
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later


def frozen_product(
    x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    """x (..., in) times the weight (out, in) of a `PackedWeight`, plus bias, in the dtype of x.

    "fp8" multiplies in fp8, both operands with a scale for each row, also in the gradient of x. On
    the CPU it computes what a card would, with fp32 in place of the sums; on a card without such
    products, and in all other formats, the weight is made whole for each product.
    """
    rows = x.flatten(0, -2)
    if format == "fp8" and _multiplies_fp8(x, data):
        y = _Fp8Product.apply(rows, data, scale, bias)
    else:
        y = _WholeProduct.apply(rows, data, scale, bias, format)
    assert isinstance(y, Tensor)
    return y.unflatten(0, x.shape[:-1])


class _Kept(FunctionCtx):
    """What a product keeps for the backward pass."""

    saved_tensors: tuple[Tensor, Tensor]
    format: str
    width: int


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Kept, rows: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(data, scale)
        quantised, row_scale = fp8_rows(rows)
        # Seen from the columns (in, out), as the product wants it, the weight is not copied.
        y = _scaled_product(quantised, data.t(), row_scale, scale.t(), bias)
        # `to` its own dtype is y again, and of an output with two names PyTorch 2.11 compiles the
        # gradient into zeros (its issue 180642): no operator here may return its argument as y.
        return y if y.dtype == rows.dtype else y.to(rows.dtype)

    @staticmethod
    def backward(ctx: _Kept, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        data, scale = ctx.saved_tensors
        # The weight's scales are along the sum here: a product takes none, so the gradient does.
        quantised, row_scale = fp8_rows(grad.float() * scale.t())
        return _fp8_input_gradient(quantised, row_scale, data).to(grad.dtype), None, None, None


class _WholeProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Kept,
        rows: Tensor,
        data: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        format: str,
    ) -> Tensor:
        ctx.save_for_backward(data, scale)
        ctx.format, ctx.width = format, rows.shape[1]
        return _whole_product(rows, data, scale, bias, format)

    @staticmethod
    def backward(ctx: _Kept, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        data, scale = ctx.saved_tensors
        whole = _whole_input_gradient(grad, data, scale, ctx.format, ctx.width)
        return whole, None, None, None, None


@torch.library.custom_op("wan::fp8_input_gradient", mutates_args=())
def _fp8_input_gradient(rows: Tensor, row_scale: Tensor, data: Tensor) -> Tensor:
    """rows (L, out) * row_scale (L, 1) times data (out, in), both in fp8."""
    # Contiguous columns are a copy, in one byte and for this product only: half of the memory.
    turn = _turner() if rows.is_cuda and can_compile(rows.device) else _turned
    columns = turn(data.view(torch.uint8)).view(data.dtype).t()  # (out, in)
    return _scaled_product(rows, columns, row_scale, row_scale.new_ones(1, data.shape[1]), None)


def _turned(data: Tensor) -> Tensor:
    return data.t().contiguous()


@cache
def _turner() -> Callable[[Tensor], Tensor]:
    """PyTorch's own kernel reads bytes one by one, and takes five times as long."""
    return compiled(_turned)


@_fp8_input_gradient.register_fake
def _(rows: Tensor, row_scale: Tensor, data: Tensor) -> Tensor:
    return row_scale.new_empty(rows.shape[0], data.shape[1], dtype=_product_dtype(rows))


@torch.library.custom_op("wan::whole_product", mutates_args=())
def _whole_product(
    rows: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, format: str
) -> Tensor:
    return F.linear(rows, make_whole(data, scale, format, rows.dtype), bias)


@_whole_product.register_fake
def _(rows: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> Tensor:
    return rows.new_empty(rows.shape[0], data.shape[0])


@torch.library.custom_op("wan::whole_input_gradient", mutates_args=())
def _whole_input_gradient(
    grad: Tensor, data: Tensor, scale: Tensor, format: str, width: int
) -> Tensor:
    return grad @ make_whole(data, scale, format, grad.dtype)


@_whole_input_gradient.register_fake
def _(grad: Tensor, data: Tensor, scale: Tensor, format: str, width: int) -> Tensor:
    return grad.new_empty(grad.shape[0], width)


def _scaled_product(
    rows: Tensor, columns: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """rows (L, K) * row_scale (L, 1) times columns (K, N) * scale (1, N), plus bias."""
    if rows.device.type == "cpu":
        y = (rows.float() @ columns.float()) * row_scale * scale
        return y if bias is None else y + bias
    bias = None if bias is None else bias.bfloat16()
    dtype = _product_dtype(rows)
    scale = scale.contiguous()
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] (no other takes scales)
        rows, columns, row_scale, scale, bias, out_dtype=dtype, use_fast_accum=True
    )


def _product_dtype(rows: Tensor) -> torch.dtype:
    """That of a product in fp8: a card has bf16 alone for products with scales of rows."""
    return torch.float32 if rows.device.type == "cpu" else torch.bfloat16


def _multiplies_fp8(x: Tensor, data: Tensor) -> bool:
    """Whether the device of x multiplies in fp8, or computes what such a card would (the CPU)."""
    if x.device.type == "cpu":
        return True
    fits = all(side % FP8_MULTIPLE == 0 for side in data.shape)
    return fits and _has_fp8(x.device.index)


@torch.compiler.assume_constant_result
def _has_fp8(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
