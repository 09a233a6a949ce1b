"""Frozen linears in fewer bits: how wrong each format is, and that nothing larger is kept."""

import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wan.frozen_linear import FrozenLinear
from wan.headers import ModelError
from wan.quantised_weight import check_format, fp8_rows, make_whole, pack
from wan.speed_choices import FrozenFormat

FORMATS: tuple[FrozenFormat, ...] = ("fp8", "fp8_weights", "int8", "nf4")
# Relative error of a product and of its input's gradient, for normal weights and inputs. fp8 rounds
# both operands by 2.6 %.
BOUNDS = {"fp8": 0.04, "fp8_weights": 0.028, "int8": 0.01, "nf4": 0.1}
OUT, IN = 192, 320


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def plain_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(normal(OUT, IN) * IN**-0.5)
    linear.bias.copy_(normal(OUT))
    return linear


def packed_linear(linear: nn.Linear, format: FrozenFormat) -> FrozenLinear:
    return FrozenLinear(pack(linear.weight, format), linear, linear.weight.dtype)


def product(linear: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The output at x, and the gradient of x that `grad` of the output makes."""
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_and_its_gradient_are_as_exact_as_the_format(
    format: FrozenFormat, dtype: torch.dtype
) -> None:
    linear = plain_linear(dtype)
    x, grad = normal(2, 24, IN, dtype=dtype), normal(2, 24, OUT, dtype=dtype)
    expected = product(plain_linear(), x.float(), grad.float())
    found = product(packed_linear(linear, format), x, grad)
    for tensor, exact in zip(found, expected, strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == exact.shape
        assert BOUNDS[format] / 4 < relative(tensor, exact) < BOUNDS[format]


@pytest.mark.parametrize("format", ["fp8_weights", "int8", "nf4"])
def test_a_product_is_that_of_the_whole_weight(format: FrozenFormat) -> None:
    linear = plain_linear(torch.bfloat16)
    packed = packed_linear(linear, format)
    x, grad = normal(7, IN, dtype=torch.bfloat16), normal(7, OUT, dtype=torch.bfloat16)
    linear.weight.copy_(packed.weight)
    for found, expected in zip(product(packed, x, grad), product(linear, x, grad), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("format", ["fp8", "fp8_weights", "int8"])
def test_small_rows_are_as_exact_as_large_ones(format: FrozenFormat) -> None:
    """With a scale for the tensor neither rows of a weight would be, nor tokens or gradients."""
    linear = plain_linear()
    linear.weight.mul_(torch.logspace(-6, 0, OUT)[:, None])
    linear.bias.zero_()
    x = normal(24, IN) * torch.logspace(-6, 0, 24)[:, None]
    grad = normal(24, OUT) * torch.logspace(0, -6, 24)[:, None] / linear.weight.norm(dim=1)
    expected = product(linear, x, grad)
    packed = packed_linear(linear, format)
    for found, exact in zip(product(packed, x, grad), expected, strict=True):
        assert worst_row(found, exact) < 2 * BOUNDS[format]
        size = exact.norm(dim=1, keepdim=True)  # a column is not to be that of its largest row
        assert worst_row((found / size).T, (exact / size).T) < 3 * BOUNDS[format]
    of_tensor = linear.weight.abs().max() / packed.qweight.float().abs().max()
    rounded = (linear.weight / of_tensor).to(torch.float8_e4m3fn).float() * of_tensor
    assert worst_row(rounded, linear.weight) > 10 * BOUNDS[format]


def worst_row(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: FrozenFormat) -> None:
    linear = plain_linear()
    linear.weight[3] = 0
    x, grad = normal(5, IN), normal(5, OUT)
    x[1], grad[2] = 0, 0
    y, back = product(packed_linear(linear, format), x, grad)
    assert torch.equal(y[1], linear.bias)
    assert torch.equal(y[:, 3], linear.bias[3].expand(5))
    assert not back[2].any()
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("size", [1e-34, 1e-12, 1.0, 1e30])
def test_a_row_is_quantised_at_any_size(size: float) -> None:
    rows = normal(4, 64) * size
    quantised, scale = fp8_rows(rows)
    assert quantised.float().abs().amax(dim=1).eq(448).all()
    error = (quantised.double() * scale - rows.double()).abs()
    # Half a step: of three bits of mantissa, or of the numbers below the smallest normal one.
    assert (error <= 1.0001 * (rows.double().abs() / 2**4 + scale.double() / 2**10)).all()


def test_what_is_no_number_does_not_go_unnoticed() -> None:
    linear = packed_linear(plain_linear(), "fp8")
    for value in (float("nan"), float("inf")):
        x = normal(3, IN)
        x[1, 7] = value
        y = linear(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (255, 24), (257, 40), (600, 64)])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_in_parts_changes_nothing(
    format: FrozenFormat, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(rows, columns)
    packed = pack(weight, format)
    monkeypatch.setattr("wan.quantised_weight.ROWS", rows)
    at_once = pack(weight, format)
    assert torch.equal(packed.data.view(torch.uint8), at_once.data.view(torch.uint8))
    assert torch.equal(packed.scale, at_once.scale)
    whole = make_whole(packed.data, packed.scale, packed.format, torch.float32)
    assert whole.shape == weight.shape
    assert relative(whole, weight) < BOUNDS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_that_of_the_packed_weight(format: FrozenFormat) -> None:
    linear = packed_linear(plain_linear(), format)
    held = {name: buffer.nbytes for name, buffer in linear.named_buffers()}
    per_block = 4 * OUT * IN // 64
    expected = (OUT * IN // 2, per_block) if format == "nf4" else (OUT * IN, 4 * OUT)
    assert held == dict(zip(("qweight", "scale"), expected, strict=True))
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_the_whole_weight_is_not_kept_for_the_backward_pass(
    format: FrozenFormat, compiled: bool
) -> None:
    """A compiler that sees it made whole twice would keep it; one graph holds both passes."""
    linear = packed_linear(plain_linear(torch.bfloat16), format)
    x, grad = normal(2, 24, IN, dtype=torch.bfloat16), normal(2, 24, OUT, dtype=torch.bfloat16)
    run = nn.Sequential(nn.SiLU(), linear, nn.SiLU())
    if compiled:
        run.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(kept := Kept(), lambda tensor: tensor):
        y = run(x.requires_grad_())
    y.backward(grad)
    activations = {2 * 24 * IN, 2 * 24 * OUT}
    weights = {(t.shape, t.dtype) for t in kept if t.numel() not in activations}
    assert weights == {(buffer.shape, buffer.dtype) for buffer in linear.buffers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_compiled_it_computes_the_same(format: FrozenFormat, dtype: torch.dtype) -> None:
    torch.compiler.reset()  # or beyond so many formats and dtypes it refuses
    linear = packed_linear(plain_linear(dtype), format)
    x, grad = normal(2, 24, IN, dtype=dtype), normal(2, 24, OUT, dtype=dtype)
    expected = product(linear, x, grad)
    linear.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    for found, exact in zip(product(linear, x, grad), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("format", FORMATS)
def test_no_operator_of_a_product_gives_its_output_a_second_name(format: FrozenFormat) -> None:
    """`y.to(y.dtype)` is y again; compiled by PyTorch 2.11, its gradient would be lost: zeros."""
    linear = packed_linear(plain_linear(), format)
    with Renamed() as renamed:
        y = linear(normal(24, IN).requires_grad_())
    assert renamed.calls > 0
    assert y.data_ptr() not in [tensor.data_ptr() for tensor in renamed.results]


class Renamed(TorchFunctionMode):
    """Holds the results that are one of the arguments they were made from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.results: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, Tensor) and any(result is argument for argument in args):
            self.results.append(result)
        return result


class Kept(list[Tensor]):
    """What was kept for the backward pass."""

    def __call__(self, tensor: Tensor) -> Tensor:
        self.append(tensor)
        return tensor


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"speed.frozen=nf4 needs .*'\.\[gpu\]'`"):
        check_format("nf4")
    for format in (None, "fp8", "fp8_weights", "int8"):
        check_format(format)
