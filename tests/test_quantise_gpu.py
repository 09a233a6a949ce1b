"""What a card computes with packed weights: what the CPU does, in one graph, wherever they lie."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.experts import load_experts
from wan.frozen_linear import FrozenLinear
from wan.quantised_weight import pack
from wan.speed_choices import FrozenFormat
from wan.variants import EXPERTS

FORMATS: tuple[FrozenFormat, ...] = ("fp8", "fp8_weights", "int8", "nf4")
GPU = torch.device("cuda", 0)
BF16_ROUNDING = 5e-3  # of a product in bf16, relative
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def linear_and_inputs(
    format: FrozenFormat, dtype: torch.dtype, sides: tuple[int, int]
) -> tuple[FrozenLinear, Tensor, Tensor]:
    """A packed linear (in, out) on the CPU, its input and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(*sides, dtype=dtype).requires_grad_(False)
    x, grad = (torch.randn(2, 100, width, generator=generator).to(dtype) for width in sides)
    return FrozenLinear(pack(linear.weight, format), linear, dtype), x, grad


def product(linear: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach().cpu().float(), x.grad.cpu().float()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sides", [(512, 768), (64, 96), (1536, 8960), (3072, 1024)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_card_computes_what_the_cpu_does(
    format: FrozenFormat, sides: tuple[int, int], dtype: torch.dtype, compiled: bool
) -> None:
    torch.compiler.reset()  # or beyond so many formats and sizes it refuses
    linear, x, grad = linear_and_inputs(format, dtype, sides)
    expected = product(linear, x, grad)
    linear.to(GPU)
    if compiled:
        linear.compile(fullgraph=True, dynamic=False)
    for found, exact in zip(product(linear, x.to(GPU), grad.to(GPU)), expected, strict=True):
        assert exact.norm() > 0
        assert (found - exact).norm() / exact.norm() < BF16_ROUNDING


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_card_packs_the_same_bits(format: FrozenFormat) -> None:
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    here, there = pack(weight, format), pack(weight.to(GPU), format)
    assert torch.equal(here.data.view(torch.uint8), there.data.cpu().view(torch.uint8))
    assert torch.equal(here.scale, there.scale.cpu())


def test_packed_experts_are_swapped(toy_model: Path) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    experts = load_experts(folder, torch.bfloat16, GPU, frozen="fp8")
    for expert in (*EXPERTS, *EXPERTS):
        expected = load_transformer(folder, expert, torch.bfloat16, "cpu", "fp8", GPU)
        found = experts[expert].state_dict()
        for name, tensor in expected.state_dict().items():
            assert found[name].device == GPU, name
            assert torch.equal(found[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name
