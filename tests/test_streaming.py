"""Frozen weights that are on the device only while their block computes."""

from contextlib import suppress
from functools import partial

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.block_examples import (
    LAYERS,
    loss_and_gradients,
    same,
    streaming_transformer,
    velocity,
)
from wan.offload import checkpoint_in_host
from wan.pinned import SMALLEST_LOCKED, lock_in_memory
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import Keep
from wan.streaming import BlockStream, stream_blocks
from wan.transformer import block_forward

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
KEPT: tuple[Keep, ...] = ("nothing", "attention", "everything")


def prepared(keep: Keep = "nothing", adapted: str = r"blocks\.\d\..*") -> WanTransformer3DModel:
    transformer = streaming_transformer(adapted=adapted)
    prepare_blocks(transformer, [keep] * LAYERS, compiled=False, device=CPU)
    return transformer


def stream(
    transformer: WanTransformer3DModel, ahead: int = 1, device: torch.device = CPU
) -> BlockStream:
    return stream_blocks(list(blocks_of(transformer)), device, ahead)


def large(transformer: WanTransformer3DModel) -> list[Tensor]:
    """What streams of all blocks."""
    frozen = [p for p in transformer.blocks.parameters() if not p.requires_grad]
    return [parameter for parameter in frozen if parameter.nbytes >= SMALLEST_LOCKED]


def log_presence(transformer: WanTransformer3DModel, blocks: BlockStream) -> list[list[int]]:
    """Which blocks are present whenever a block starts to compute, recomputation included."""
    log: list[list[int]] = []
    for block in blocks_of(transformer):
        block.norm1.register_forward_hook(lambda *_: log.append(blocks.present))
    return log


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_step_is_the_same_bit_for_bit(keep: Keep, ahead: int) -> None:
    expected = loss_and_gradients(prepared(keep))
    transformer = prepared(keep)
    blocks = stream(transformer, ahead)
    for _ in range(2):
        assert same(loss_and_gradients(transformer), expected)
        assert blocks.present == []


def test_a_step_of_compiled_blocks_is_the_same() -> None:
    def compiled() -> WanTransformer3DModel:
        torch.compiler.reset()
        counters.clear()
        transformer = streaming_transformer()
        run = torch.compile(block_forward, backend="aot_eager", dynamic=False)
        for block in blocks_of(transformer):
            block.forward = partial(run, block)
        return transformer

    expected = loss_and_gradients(compiled())
    graphs = counters["stats"]["unique_graphs"]
    transformer = compiled()
    blocks = stream(transformer)
    for _ in range(2):
        assert same(loss_and_gradients(transformer), expected)
        assert blocks.present == []
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_with_activations_in_host_memory_too() -> None:
    expected = loss_and_gradients(prepared())
    transformer = streaming_transformer()
    run = checkpoint_in_host(block_forward, CPU)
    for block in blocks_of(transformer):
        block.forward = partial(run, block)
    blocks = stream(transformer)
    for _ in range(2):
        assert same(loss_and_gradients(transformer), expected)
        assert blocks.present == []


def test_the_next_block_is_brought_while_one_computes() -> None:
    transformer = prepared()
    log = log_presence(transformer, stream(transformer))
    loss_and_gradients(transformer)
    forward, backward = [[0, 1], [1, 2], [2, 3], [3]], [[2, 3], [1, 2], [0, 1], [0]]
    assert log == forward + backward


def test_further_ahead() -> None:
    transformer = prepared()
    log = log_presence(transformer, stream(transformer, ahead=2))
    loss_and_gradients(transformer)
    assert log[:4] == [[0, 1, 2], [1, 2, 3], [2, 3], [3]]
    assert log[4:] == [[1, 2, 3], [0, 1, 2], [0, 1], [0]]


@pytest.mark.parametrize("adapted", [r"blocks\.[0]\..*", r"blocks\.[23]\..*", r"blocks\.[12]\..*"])
def test_adapters_on_some_of_the_blocks(adapted: str) -> None:
    expected = loss_and_gradients(prepared(adapted=adapted))
    transformer = prepared(adapted=adapted)
    blocks = stream(transformer)
    assert same(loss_and_gradients(transformer), expected)
    assert blocks.present == []


def test_what_is_kept_of_a_forward_pass_does_not_hold_the_weights() -> None:
    transformer = prepared("everything")
    blocks = stream(transformer)
    copies: list[torch.UntypedStorage] = []
    first = next(iter(blocks_of(transformer)))
    weight = large(transformer)[0]
    first.norm1.register_forward_hook(lambda *_: copies.append(weight.untyped_storage()))
    loss = velocity(transformer).square().mean()
    assert blocks.present == [LAYERS - 1]
    assert copies[0].data_ptr() != weight.data_ptr()
    assert copies[0].nbytes() == 0
    loss.backward()


def test_sampling_leaves_everything_at_home() -> None:
    expected = velocity(prepared()).detach()
    transformer = prepared()
    homes = [weight.data_ptr() for weight in large(transformer)]
    blocks = stream(transformer)
    log = log_presence(transformer, blocks)
    for _ in range(2):  # with the prompt and without
        with torch.no_grad():
            assert torch.equal(velocity(transformer), expected)
        assert blocks.present == []
    assert log == 2 * [[0, 1], [1, 2], [2, 3], [3]]
    assert [weight.data_ptr() for weight in large(transformer)] == homes
    assert len(homes) == 10 * LAYERS


def test_forward_passes_before_one_backward_pass() -> None:
    def loss(transformer: WanTransformer3DModel) -> Tensor:
        return velocity(transformer).mean() + velocity(transformer, frames=2).square().mean()

    plain, streamed = prepared("attention"), prepared("attention")
    blocks = stream(streamed)
    for transformer in (plain, streamed):
        total = loss(transformer)
        with torch.no_grad():
            velocity(transformer)
        total.backward()
    gradients = [[p.grad for p in t.parameters() if p.requires_grad] for t in (plain, streamed)]
    assert same(gradients[1], gradients[0])
    assert blocks.present == []


@pytest.mark.parametrize("call", [1, 2, 5, 7], ids=["forward", "forward", "backward", "backward"])
def test_after_an_error_in_the_middle_the_next_step_is_right(call: int) -> None:
    expected = loss_and_gradients(prepared())
    transformer = prepared()
    blocks = stream(transformer)
    calls = iter(range(100))

    def fail(*_: object) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("no memory")

    for block in blocks_of(transformer):
        block.norm1.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        loss_and_gradients(transformer)
    assert 0 < len(blocks.present) <= 2
    assert same(loss_and_gradients(transformer), expected)
    assert blocks.present == []


@pytest.mark.parametrize("call", [3, 13, 63], ids=["first", "next", "backward"])
@pytest.mark.parametrize("operation", ["resize_", "copy_"])
def test_after_a_block_was_half_brought_the_next_step_is_right(
    operation: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten weights of each block are given memory, then they are copied: no block is in between."""
    expected = loss_and_gradients(prepared())
    transformer = prepared()
    blocks = stream(transformer)
    homes = [weight.data_ptr() for weight in large(transformer)]

    def away() -> list[bool]:
        weights = [weight.data_ptr() for weight in large(transformer)]
        return [here != home for here, home in zip(weights, homes, strict=True)]

    with monkeypatch.context() as patch:
        fail_in_call(call, operation, patch)
        with pytest.raises(torch.OutOfMemoryError):
            loss_and_gradients(transformer)
    assert away() == [block in blocks.present for block in range(LAYERS) for _ in range(10)]
    log: list[list[bool]] = []
    for index, block in enumerate(blocks_of(transformer)):
        block.norm1.register_forward_hook(
            lambda *_, index=index: log.append(away()[10 * index : 10 * index + 10])
        )
    assert same(loss_and_gradients(transformer), expected)
    assert log == 2 * LAYERS * [10 * [True]]
    assert blocks.present == []


def fail_in_call(call: int, operation: str, patch: pytest.MonkeyPatch) -> None:
    """Of those calls that give memory to a weight, or a weight to its memory."""
    kind = torch.UntypedStorage if operation == "resize_" else Tensor
    method, calls = getattr(kind, operation), iter(range(1, 1000))

    def fail(target: torch.UntypedStorage | Tensor, given: int | Tensor) -> object:
        if (given if isinstance(given, int) else given.nbytes) > 0 and next(calls) == call:
            raise torch.OutOfMemoryError("no memory")
        return method(target, given)

    patch.setattr(kind, operation, fail)


def test_buffers_stream_and_trained_and_small_tensors_do_not() -> None:
    block = nn.Linear(1024, 1024)
    block.register_buffer("packed", torch.arange(2**20).to(torch.uint8))
    block.register_buffer("scale", torch.ones(8))
    block.bias.requires_grad_(False)
    places = {name: t.data_ptr() for name, t in [*block.named_parameters(), *block.named_buffers()]}
    blocks = stream_blocks([block], CPU)
    during: dict[str, int] = {}

    def note(*_: object) -> None:
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            during[name] = tensor.data_ptr()

    block.register_forward_pre_hook(note)
    block(torch.ones(1, 1024)).sum().backward()
    assert {name for name in places if during[name] != places[name]} == {"packed"}
    assert blocks.present == []
    assert torch.equal(block.get_buffer("packed"), torch.arange(2**20).to(torch.uint8))


@pytest.mark.parametrize(
    "weight", [torch.randn(1024, 512).t(), torch.randn(512, 2048)[:, ::2]], ids=["permuted", "part"]
)
def test_weights_keep_their_strides(weight: Tensor) -> None:
    block = nn.Linear(1024, 512, bias=False).requires_grad_(False)
    block.weight.data = weight
    x, strides = torch.randn(1, 1024), []
    expected = block(x)
    stream_blocks([block], CPU)
    block.register_forward_pre_hook(lambda *_: strides.append(block.weight.stride()))
    assert torch.equal(block(x), expected)
    assert strides == [weight.stride()]


def test_adapters_may_come_and_values_change_between_passes() -> None:
    block = nn.Sequential(nn.Linear(512, 512, bias=False).requires_grad_(False))
    blocks = stream_blocks([block], CPU)
    x = torch.ones(1, 512)
    block(x)
    block.append(nn.Linear(512, 512, bias=False))
    block[0].weight.fill_(2.0)
    block[1].weight.requires_grad_(False).fill_(1.0)
    assert torch.equal(block(x), torch.full((1, 512), 2.0 * 512 * 512))
    assert blocks.present == []


def on_gpu(keep: Keep, compiled: bool = False) -> WanTransformer3DModel:
    transformer = streaming_transformer()
    transformer.to(GPU)
    prepare_blocks(transformer, [keep] * LAYERS, compiled, GPU)
    return transformer


def memory_now() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("keep", "compiled"), [*((keep, False) for keep in KEPT), ("attention", True)]
)
def test_a_step_on_the_gpu_is_that_of_resident_weights(keep: Keep, compiled: bool) -> None:
    expected = loss_and_gradients(on_gpu(keep, compiled))
    transformer = on_gpu(keep, compiled)
    blocks = stream(transformer, device=GPU)
    for _ in range(3):
        for found, wanted in zip(loss_and_gradients(transformer), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert blocks.present == []
        assert all(weight.device == CPU for weight in large(transformer))


@pytest.mark.gpu
@needs_gpu
def test_two_blocks_at_most_are_on_the_gpu() -> None:
    transformer = on_gpu("nothing")
    block_bytes = sum(weight.nbytes for weight in large(transformer)) // LAYERS
    loss_and_gradients(transformer)  # the first step takes memory for kernels
    transformer.zero_grad()
    before = memory_now()
    stream(transformer, device=GPU)
    at_rest = memory_now()
    assert before - at_rest >= LAYERS * block_bytes
    log: list[int] = []
    for block in blocks_of(transformer):
        block.norm1.register_forward_hook(lambda *_: log.append(torch.cuda.memory_allocated()))
    loss_and_gradients(transformer)
    assert len(log) == 2 * LAYERS
    assert max(log) - at_rest < 2.8 * block_bytes
    transformer.zero_grad()
    assert memory_now() - at_rest < block_bytes


@pytest.mark.gpu
@needs_gpu
def test_after_the_gpu_was_full_the_next_step_is_right() -> None:
    transformer = on_gpu("nothing")
    stream(transformer, device=GPU)
    expected = loss_and_gradients(transformer)
    block_bytes = sum(weight.nbytes for weight in large(transformer)) // LAYERS
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 2 * block_bytes
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    fillers: list[Tensor] = []
    try:
        with suppress(torch.OutOfMemoryError):
            while True:
                fillers.append(torch.empty(2**20, dtype=torch.uint8, device=GPU))
        del fillers[: block_bytes // 2**20 + 2]  # one block has room, the next one has not
        with pytest.raises(torch.OutOfMemoryError):
            loss_and_gradients(transformer)
    finally:
        fillers.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    for found, wanted in zip(loss_and_gradients(transformer), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_memory_that_cannot_be_locked_or_is_locked_anew_is_copied_right() -> None:
    tensor = torch.arange(2**22)
    lock_in_memory(tensor, GPU)
    lock_in_memory(tensor, GPU)  # refused: it is locked already
    assert torch.equal(tensor.to(GPU).cpu(), tensor)
    for value in range(20):  # each likely where the last one was
        again = torch.full((2**24,), value)
        lock_in_memory(again, GPU)
        assert bool((again.to(GPU, non_blocking=True) == value).all())
        del again
