"""A LoRA and its frozen linear as one product: what PEFT's two products and their sum give."""

from typing import get_args

import pytest
import torch
from adapter_examples import FFN, RANK, WIDTH, random_state, tiny_transformer
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan.adapter_choices import Kind, target_modules
from wan.frozen_linear import FrozenLinear
from wan.lora import adapter_layers, adapter_parameters, attach
from wan.quantise import quantise_blocks
from wan.speed_choices import FrozenFormat
from wan.strengths import load_adapter, set_strengths, without_adapter

FORMATS: tuple[FrozenFormat | None, ...] = (None, *get_args(FrozenFormat))
# Relative: of the order of sums, in the dtype. fp8 may round a value to its neighbour.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
MODULE = "blocks.1.ffn.net.0.proj"


class Fused(TorchDispatchMode):
    """Whether a product with an adapter in it ran."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        inner = [a for a in args if isinstance(a, Tensor) and a.shape[0] == RANK]
        self.seen |= str(func).startswith("wan.") and len(inner) > 0
        return func(*args, **(kwargs or {}))


def adapted(
    format: FrozenFormat | None = None,
    dtype: torch.dtype = torch.float32,
    kind: Kind = "lora",
    dropout: float = 0.0,
) -> WanTransformer3DModel:
    transformer = tiny_transformer().to(dtype)
    if format is not None:
        quantise_blocks(transformer, format)
    attach(transformer, RANK, 6.0, target_modules("all"), dropout, seed=7, kind=kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    transformer.train()
    return transformer


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(2, 24, width, generator=generator).to(dtype) for width in (WIDTH, FFN))
    return x.requires_grad_(), grad


def all_of(layer: LoraLinear, plain: bool, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of the input and of both factors."""
    x, grad = inputs(dtype)
    y = LoraLinear.forward(layer, x) if plain else layer(x)
    y.backward(grad)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in (x, *parameters) if p.grad is not None]
    layer.zero_grad()
    assert len(gradients) == 3
    return [y.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_output_and_gradients_are_those_of_two_products(
    format: FrozenFormat | None, dtype: torch.dtype
) -> None:
    layer = adapter_layers(adapted(format, dtype))[MODULE]
    expected = all_of(layer, True, dtype)
    with Fused() as fused:
        found = all_of(layer, False, dtype)
    assert fused.seen
    for tensor, exact in zip(found, expected, strict=True):
        assert tensor.dtype == exact.dtype
        assert (tensor - exact).norm() < ROUNDING[dtype] * exact.norm()


def test_the_strength_counts() -> None:
    transformer = adapted()
    layer = adapter_layers(transformer)[MODULE]
    x, _ = inputs()
    with torch.no_grad():
        base, whole = layer.get_base_layer()(x), layer(x)
        set_strengths(transformer, {"default": 0.5})
        assert torch.allclose(layer(x), (base + whole) / 2, atol=1e-5)


def test_without_gradients_for_a_frozen_input_none_is_made() -> None:
    layer = adapter_layers(adapted())[MODULE]
    x, grad = inputs()
    layer(x.detach()).backward(grad)
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert len(gradients) == 2
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_other_kinds_are_computed_as_ever(kind: Kind) -> None:
    layer = adapter_layers(adapted(kind=kind))[MODULE]
    x, _ = inputs()
    assert torch.equal(layer(x), LoraLinear.forward(layer, x))


def test_two_adapters_at_work_are_both_in_the_output() -> None:
    transformer = adapted()
    load_adapter(transformer, random_state(seed=9), "other")
    set_strengths(transformer, {"default": 1.0, "other": 1.0})
    layer = adapter_layers(transformer)[MODULE]
    x, _ = inputs()
    assert torch.equal(layer(x), LoraLinear.forward(layer, x))
    set_strengths(transformer, {"other": 1.0})
    lone = layer(x)
    assert torch.allclose(lone, LoraLinear.forward(layer, x), atol=1e-4)
    set_strengths(transformer, {"default": 1.0})
    assert not torch.allclose(layer(x), lone, atol=1e-2)


def test_a_layer_that_is_switched_off_is_its_base() -> None:
    transformer = adapted()
    layer = adapter_layers(transformer)[MODULE]
    x, _ = inputs()
    with without_adapter(transformer):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_dropout_is_applied_in_training_alone() -> None:
    transformer = adapted(dropout=0.5)
    layer = adapter_layers(transformer)[MODULE]
    x, _ = inputs()
    assert not torch.equal(layer(x), layer(x))
    transformer.eval()
    with Fused() as fused:
        assert torch.equal(layer(x), layer(x))
    assert fused.seen


def test_a_turned_weight_gives_the_same_gradient_and_stays_out_of_the_state() -> None:
    layer = adapter_layers(adapted("fp8"))[MODULE]
    base = layer.get_base_layer()
    assert isinstance(base, FrozenLinear)
    names = set(layer.state_dict())
    expected = all_of(layer, False, torch.float32)
    base.turn()
    base.qweight = torch.zeros_like(base.qweight)  # of the gradient it is not read any more
    found = all_of(layer, False, torch.float32)
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], expected[0])
    assert set(layer.state_dict()) == names
