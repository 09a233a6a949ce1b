"""A recorded step computes what the step does that was recorded, and only where it may."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from tools.bench_random import Inputs, adapted, our_loss, random_inputs
from wan import step_graphs
from wan.lora import adapter_parameters
from wan.speed import prepare_blocks
from wan.speed_choices import FrozenFormat
from wan.step_graphs import StepGraphs
from wan.variants import VARIANTS

TINY = VARIANTS["tiny"]
CPU = torch.device("cpu")
SMALL, WIDE = (5, 32, 32), (5, 32, 64)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def make_model(device: torch.device, frozen: FrozenFormat | None = None) -> WanTransformer3DModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = adapted(TINY, 2, dtype, device, frozen)
    prepare_blocks(model, ("everything",) * 2, device.type == "cuda", device)
    return model


def add(graphs: StepGraphs, model: WanTransformer3DModel, inputs: Inputs, share: float) -> Tensor:
    def errors(x: Tensor, timestep: Tensor, text: Tensor, target: Tensor) -> Tensor:
        return our_loss(model, Inputs(x, timestep, text, target))[None]

    tensors = (inputs.x, inputs.timestep, inputs.text, inputs.target)
    shares = torch.full((1,), share, device=inputs.x.device)
    return graphs.add_gradients(model, adapter_parameters(model), errors, tensors, shares)


def taken(model: WanTransformer3DModel) -> list[Tensor]:
    """The gradients, of which none are left."""
    found = []
    for parameter in adapter_parameters(model):
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


def other(inputs: Inputs, seed: int) -> Inputs:
    generator = torch.Generator(inputs.x.device).manual_seed(seed)
    x = torch.randn(inputs.x.shape, generator=generator, device=inputs.x.device)
    return Inputs(x, inputs.timestep - 100 * seed, inputs.text, inputs.target)


def test_without_a_gpu_a_step_runs_as_it_is_written() -> None:
    model, inputs, graphs = make_model(CPU), random_inputs(TINY, SMALL, CPU), StepGraphs(True)
    our_loss(model, inputs).backward()
    expected = taken(model)
    for _ in range(3):
        errors = add(graphs, model, inputs, 0.5)
        assert errors.item() == our_loss(model, inputs).item()
        found = taken(model)
        assert all(torch.equal(a, 0.5 * b) for a, b in zip(found, expected, strict=True))
        assert not errors.requires_grad


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a step was recorded, and how often one ran as it is written."""
    counts = [0, 0]
    record, written = StepGraphs._record, step_graphs._as_written

    def recording(*arguments) -> None:  # noqa: ANN002
        counts[0] += 1
        record(*arguments)

    def writing(*arguments) -> Tensor:  # noqa: ANN002
        counts[1] += 1
        return written(*arguments)

    monkeypatch.setattr(StepGraphs, "_record", recording)
    monkeypatch.setattr(step_graphs, "_as_written", writing)
    return counts


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("frozen", [None, "fp8", "nf4"])
def test_what_is_recorded_computes_the_same(frozen: FrozenFormat | None, count: list[int]) -> None:
    device = torch.device("cuda")
    model, graphs, plain = make_model(device, frozen), StepGraphs(True), StepGraphs(False)
    shapes = [random_inputs(TINY, shape, device) for shape in (SMALL, WIDE)]
    steps = [other(shapes[index % 2], seed) for seed, index in enumerate((0, 1, 0, 1, 1, 0, 0, 1))]
    expected = []
    for inputs in steps:
        errors = add(plain, model, inputs, 0.25)
        expected.append((errors, taken(model)))
    count[:] = [0, 0]
    for inputs, (errors, gradients) in zip(steps, expected, strict=True):
        assert torch.equal(add(graphs, model, inputs, 0.25), errors)
        assert all(torch.equal(a, b) for a, b in zip(taken(model), gradients, strict=True))
    assert count == [2, 2]


@pytest.mark.gpu
@needs_gpu
def test_gradients_add_up_whoever_computed_them(count: list[int]) -> None:
    device = torch.device("cuda")
    model, graphs = make_model(device), StepGraphs(True)
    steps = [other(random_inputs(TINY, SMALL, device), seed) for seed in range(4)]
    for inputs in steps:  # as written, then recorded, then launched
        add(graphs, model, inputs, 0.25)
    found = taken(model)
    for inputs in steps:
        (our_loss(model, inputs) * 0.25).backward()
    for a, b in zip(found, taken(model), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())
    assert count == [1, 1]


@pytest.mark.gpu
@needs_gpu
def test_what_moved_or_belongs_to_another_is_recorded_anew(count: list[int]) -> None:
    device = torch.device("cuda")
    first, second, graphs = make_model(device), make_model(device), StepGraphs(True)
    inputs = random_inputs(TINY, SMALL, device)
    expected = add(StepGraphs(False), first, inputs, 1.0)
    gradients = taken(first)
    count[:] = [0, 0]

    def step(model: WanTransformer3DModel) -> None:
        assert torch.equal(add(graphs, model, inputs, 1.0), expected)
        assert all(torch.equal(a, b) for a, b in zip(taken(model), gradients, strict=True))

    for _ in range(3):
        step(first)
    assert count == [1, 1]
    weight = first.get_parameter("blocks.0.ffn.net.2.base_layer.weight")
    old, weight.data = weight.data, weight.data.clone()
    old.fill_(float("nan"))
    step(first)
    assert count == [2, 1]
    for _ in range(2):
        step(second)
    assert count == [3, 2]
    step(first)  # the first after another's: such turns may be of one step each
    assert count == [3, 3]
    graphs.clear()
    step(first)
    assert count == [4, 3]


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_cannot_be_recorded_runs_as_it_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = torch.device("cuda")
    model, graphs = make_model(device), StepGraphs(True)
    inputs = random_inputs(TINY, SMALL, device)

    def waits(x: Tensor, timestep: Tensor, text: Tensor, target: Tensor) -> Tensor:
        loss = our_loss(model, Inputs(x, timestep, text, target))
        return loss[None] * (1 if loss.item() > 0 else -1)

    tensors = (inputs.x, inputs.timestep, inputs.text, inputs.target)
    share, parameters = torch.ones(1, device=device), adapter_parameters(model)
    expected = graphs.add_gradients(model, parameters, waits, tensors, share)
    gradients = taken(model)
    for _ in range(2):
        assert torch.equal(graphs.add_gradients(model, parameters, waits, tensors, share), expected)
        assert all(torch.equal(a, b) for a, b in zip(taken(model), gradients, strict=True))
    assert caplog.text.count("speed.graphs=false") == 1
    assert torch.randn(1, device=device).isfinite()
