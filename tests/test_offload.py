"""Blocks that are recomputed from an input that waited in host memory."""

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from tests.block_examples import (
    LAYERS,
    loss_and_gradients,
    same,
    streaming_transformer,
    velocity,
)
from tests.resumable_runs import assert_same_run, config_of, make_data, run
from wan.offload import BlockForward, _Shelf, checkpoint_in_host, inputs_in_host
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import WITH_INPUTS, Keep
from wan.transformer import block_forward

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def checkpointed(dropout: float = 0.0) -> WanTransformer3DModel:
    transformer = streaming_transformer(dropout)
    prepare_blocks(transformer, ["nothing"] * LAYERS, compiled=False, device=CPU)
    return transformer


def offloaded(
    dropout: float = 0.0,
    forward: Callable[..., Tensor] = block_forward,
    device: torch.device = CPU,
    wrap: Callable[[BlockForward, torch.device], BlockForward] = checkpoint_in_host,
) -> WanTransformer3DModel:
    transformer = streaming_transformer(dropout)
    transformer.to(device)
    run = wrap(forward, device)
    for block in blocks_of(transformer):
        block.forward = partial(run, block)
    return transformer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_that_of_a_plain_checkpoint_bit_for_bit(dropout: float) -> None:
    expected = loss_and_gradients(checkpointed(dropout))
    transformer = offloaded(dropout)
    for _ in range(2):
        assert same(loss_and_gradients(transformer), expected)
    assert same(loss_and_gradients(offloaded()), expected) == (dropout == 0)


@pytest.mark.parametrize("wrap", [checkpoint_in_host, inputs_in_host])
def test_a_step_of_compiled_blocks_is_the_same(wrap: Callable[..., BlockForward]) -> None:
    run = torch.compile(block_forward, backend="aot_eager")
    expected = loss_and_gradients(streaming_transformer())
    found = loss_and_gradients(offloaded(forward=run, wrap=wrap))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("keep", "compiled"), [*((keep, False) for keep in sorted(WITH_INPUTS)), ("products", True)]
)
def test_of_what_a_block_keeps_its_input_alone_waits_in_host_memory(
    keep: Keep, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    park, parked = _Shelf.park, []

    def noted(shelf: _Shelf, hidden: Tensor) -> object:
        parked.append(hidden.shape)
        return park(shelf, hidden)

    monkeypatch.setattr(_Shelf, "park", noted)
    plain, transformer = streaming_transformer(), streaming_transformer()
    prepare_blocks(plain, [keep] * LAYERS, compiled, CPU)
    expected = loss_and_gradients(plain)
    assert not parked
    prepare_blocks(transformer, [keep] * LAYERS, compiled, CPU, "host")
    for steps in (1, 2):
        assert same(loss_and_gradients(transformer), expected)
        assert parked == [(1, 4, 512)] * LAYERS * steps


def test_a_run_whose_inputs_wait_in_host_memory_is_the_same_run(
    toy_model: Path, tmp_path: Path
) -> None:
    home = make_data(tmp_path)
    one, other = (
        run(config_of(home, toy_model, place, "speed.keep=attention", f"speed.inputs={place}"))
        for place in ("device", "host")
    )
    assert_same_run(other, one)


def test_steps_of_several_shapes_one_after_the_other() -> None:
    plain, transformer = checkpointed(), offloaded()
    for frames in (1, 3, 2, 3, 1):
        expected = loss_and_gradients(plain, frames)
        assert same(loss_and_gradients(transformer, frames), expected)


def test_gradients_accumulate() -> None:
    transformer = offloaded()
    once = loss_and_gradients(transformer)[1:]
    velocity(transformer).square().mean().backward()
    twice = [p.grad for p in transformer.parameters() if p.grad is not None]
    assert all(torch.equal(b, 2 * a) for a, b in zip(once, twice, strict=True))


def test_sampling_is_the_plain_forward_pass() -> None:
    calls: list[bool] = []

    def counted(block: nn.Module, *arguments: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return block_forward(block, *arguments)

    transformer = offloaded(forward=counted)
    with torch.no_grad():
        assert torch.equal(velocity(transformer), velocity(streaming_transformer()))
    assert calls == [False] * LAYERS


def test_inputs_are_let_go_of_but_for_the_one_under_way() -> None:
    inputs: list[weakref.ref[Tensor]] = []

    def noted(block: nn.Module, hidden: Tensor, *rest: Tensor) -> Tensor:
        inputs.append(weakref.ref(hidden))
        return block_forward(block, hidden, *rest)

    transformer = offloaded(forward=noted)
    out = velocity(transformer)
    assert [hidden() is None for hidden in inputs] == [True] * (LAYERS - 1) + [False]
    out.sum().backward()
    assert len(inputs) == 2 * LAYERS
    assert all(hidden() is None for hidden in inputs)


def test_a_second_backward_pass_is_refused() -> None:
    out = velocity(offloaded()).sum()
    out.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        out.backward()


def test_after_an_error_in_the_middle_the_next_step_is_right() -> None:
    calls = iter(range(100))

    def failing(block: nn.Module, hidden: Tensor, *rest: Tensor) -> Tensor:
        if next(calls) in (2, 8):  # of the first forward pass, of the second backward pass
            raise torch.OutOfMemoryError("no memory")
        return block_forward(block, hidden, *rest)

    expected = loss_and_gradients(checkpointed())
    transformer = offloaded(forward=failing)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            loss_and_gradients(transformer)
    assert same(loss_and_gradients(transformer), expected)


def test_host_memory_serves_again_whatever_the_shape() -> None:
    shelf = _Shelf(CPU)

    def step(length: int, backward: bool = True) -> set[int]:
        """Park three inputs, take them back or not: the addresses where they were."""
        inputs = [torch.randn(1, length, 8) for _ in range(3)]
        parked = [shelf.park(hidden) for hidden in inputs]
        for one, hidden in reversed(list(zip(parked, inputs, strict=True))):
            if backward:
                assert torch.equal(shelf.fetch(one), hidden)
        return {one.host.data_ptr() for one in parked}

    longest = step(100)
    assert len(longest) == 3
    for length in (100, 30, 100, 1):
        assert step(length) == longest
    assert step(70, backward=False) == longest
    assert step(100) == longest
    step(200)
    assert len(shelf._free) == 3
    assert min(buffer.nbytes for buffer in shelf._free) == 200 * 8 * 4


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_on_the_gpu_is_that_of_a_plain_checkpoint(dropout: float) -> None:
    plain = checkpointed(dropout)
    plain.to(GPU)
    transformer = offloaded(dropout, device=GPU)
    for frames in (1, 3, 2, 3):
        expected = loss_and_gradients(plain, frames)
        for found, wanted in zip(loss_and_gradients(transformer, frames), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_inputs_are_not_on_the_gpu_between_the_passes() -> None:
    length, width, blocks = 2**12, 512, 24

    def block(_: nn.Module, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden + (hidden * weight).sin()

    run = checkpoint_in_host(block, GPU)
    weight = torch.ones(width, device=GPU, requires_grad=True)
    before = torch.cuda.memory_allocated()
    hidden = torch.ones(1, length, width, device=GPU)  # 8 MiB
    one = hidden.nbytes
    for _ in range(blocks):
        hidden = run(nn.Identity(), hidden, weight)
    assert torch.cuda.memory_allocated() - before <= 2 * one + 2**20  # the last input and output
    torch.cuda.reset_peak_memory_stats()
    hidden.sum().backward()
    del hidden
    assert torch.cuda.max_memory_allocated() - before < 14 * one  # plainly, 48
    plain = torch.ones(1, length, width, device=GPU)
    expected = torch.ones(width, device=GPU, requires_grad=True)
    for _ in range(blocks):
        plain = block(nn.Identity(), plain, expected)
    plain.sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad)
