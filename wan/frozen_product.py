"""Products with a frozen weight, as it is or in fewer bits, alone or with the adapter beside it.

An adapter adds a narrow product to a wide one. Written as that, its output is written and read
twice more, forward and backward: here the card adds it where the wide product lies. Saved for the
backward pass is the weight as it is stored, and nothing made from it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

import wan.frozen_operators  # noqa: F401  (defines torch.ops.wan)
from wan.quantised_weight import fp8_rows

FP8_MULTIPLE = 16  # of both sides of a weight, or the card's product does not take it
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later
PLAIN = "plain"  # the format of a weight that is a matrix of floating-point numbers


@dataclass(frozen=True)
class Frozen:
    """A frozen linear: its weight (out, in) as a `PackedWeight` has it, or plain, and its bias."""

    data: Tensor
    scale: Tensor | None  # None: plain
    format: str
    bias: Tensor | None
    turned: Tensor | None = None  # fp8 alone: the same in fp8 as (in, out), to spare its turning


@dataclass(frozen=True)
class Narrow:
    """A LoRA beside it: s B A, with A (rank, in) and B (out, rank)."""

    a: Tensor
    b: Tensor
    strength: float


def frozen_product(x: Tensor, frozen: Frozen, narrow: Narrow | None = None) -> Tensor:
    """x (..., in) times the weight, plus bias, plus x (s B A)^T; (..., out) in the dtype of x.

    "fp8" multiplies in fp8, both operands with a scale for each row, also in the gradient of x. On
    the CPU it computes what a card would, with fp32 in place of the sums; on a card without such
    products, and in all other formats, the weight is made whole for each product. The narrow
    products are in the dtype of x, and A and B get their gradients in their own.
    """
    rows, format = x.flatten(0, -2), frozen.format
    if format == "fp8" and not _multiplies_fp8(x, frozen.data):
        format = "fp8_weights"
    a, b, strength = (narrow.a, narrow.b, narrow.strength) if narrow else (None, None, 1.0)
    data, scale, turned, bias = frozen.data, frozen.scale, frozen.turned, frozen.bias
    y = _Product.apply(rows, a, b, strength, data, scale, turned, bias, format)
    assert isinstance(y, Tensor)
    return y.unflatten(0, x.shape[:-1])


class _Kept(FunctionCtx):
    """What a product keeps for the backward pass."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    strength: float
    format: str
    width: int
    factors: torch.dtype  # in which A and B get their gradients


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (autograd takes tensors one by one)
        ctx: _Kept,
        rows: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        strength: float,
        data: Tensor,
        scale: Tensor | None,
        turned: Tensor | None,
        bias: Tensor | None,
        format: str,
    ) -> Tensor:
        seen = inner = wide = None
        if a is not None and b is not None:
            ctx.factors = a.dtype
            a, b = a.to(rows.dtype), b.to(rows.dtype)  # kept so: cast once, not in both passes
            seen, inner, wide = rows, _scaled(rows @ a.T, strength), b.T  # (L, rank), (rank, out)
        ctx.save_for_backward(seen, inner, a, b, data, scale, turned)  # pyright: ignore[reportArgumentType] (None is one too)
        ctx.strength, ctx.format, ctx.width = strength, format, rows.shape[1]
        if format == PLAIN:
            return torch.ops.wan.plain_product(rows, data.T, bias, inner, wide)
        assert scale is not None
        if format == "fp8":
            quantised, row_scale = fp8_rows(rows)
            # Seen from the columns (in, out), as the product wants it, the weight is not copied.
            columns, scale, dtype = data.T, scale.T.contiguous(), rows.dtype
            return torch.ops.wan.fp8_product(
                quantised, columns, row_scale, scale, bias, inner, wide, dtype
            )
        return torch.ops.wan.whole_product(rows, data, scale, bias, format, inner, wide)

    @staticmethod
    def backward(ctx: _Kept, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, inner, a, b, data, scale, turned = ctx.saved_tensors
        assert data is not None
        inner_grad = a_grad = b_grad = None
        if rows is not None and inner is not None and b is not None:
            inner_grad = _scaled(grad @ b, ctx.strength)  # (L, rank)
            a_grad = torch.ops.wan.factor_gradient(inner_grad, rows, ctx.factors)
            b_grad = torch.ops.wan.factor_gradient(grad, inner, ctx.factors)
        back = None
        if ctx.needs_input_grad[0]:
            back = _input_gradient(grad, data, scale, turned, ctx.format, ctx.width, inner_grad, a)
        return back, a_grad, b_grad, None, None, None, None, None, None


def _input_gradient(  # noqa: PLR0913 (as above)
    grad: Tensor,
    data: Tensor,
    scale: Tensor | None,
    turned: Tensor | None,
    format: str,
    width: int,
    inner: Tensor | None,
    wide: Tensor | None,
) -> Tensor:
    """grad (L, out) times the weight, plus inner (L, rank) times wide (rank, in)."""
    if format == PLAIN:
        return torch.ops.wan.plain_product(grad, data, None, inner, wide)
    assert scale is not None
    if format != "fp8":
        return torch.ops.wan.whole_input_gradient(grad, data, scale, format, width, inner, wide)
    # The weight's scales are along the sum here: a product takes none, so the gradient does.
    quantised, row_scale = fp8_rows(grad.float() * scale.T)
    if turned is None:
        return torch.ops.wan.fp8_input_gradient(quantised, data, row_scale, inner, wide, grad.dtype)
    ones = row_scale.new_ones(1, data.shape[1])
    return torch.ops.wan.fp8_product(
        quantised, turned.T, row_scale, ones, None, inner, wide, grad.dtype
    )


def _scaled(inner: Tensor, strength: float) -> Tensor:
    return inner if strength == 1 else inner * strength


def _multiplies_fp8(x: Tensor, data: Tensor) -> bool:
    """Whether the device of x multiplies in fp8, or computes what such a card would (the CPU)."""
    if x.device.type == "cpu":
        return True
    fits = all(side % FP8_MULTIPLE == 0 for side in data.shape)
    return fits and _has_fp8(x.device.index)


@torch.compiler.assume_constant_result
def _has_fp8(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
