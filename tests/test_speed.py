"""How blocks run: what is kept changes neither loss nor gradients, and only what is said to."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tools.bench_random import Inputs, adapted, our_loss, random_inputs
from wan import lora, speed
from wan.compiler import can_compile, graphs_compiled
from wan.speed import (
    ATTENTION_KERNELS,
    BACKENDS,
    blocks_of,
    check_attention,
    prepare_blocks,
    use_attention,
)
from wan.speed_choices import KEEPS, Keep
from wan.strengths import set_strengths
from wan.variants import VARIANTS

TINY = VARIANTS["tiny"]
CPU = torch.device("cpu")
BLOCKS = 2


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[object] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def model(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    return adapted(TINY, BLOCKS, dtype, CPU, None)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return random_inputs(TINY, (5, 32, 32), CPU)


def gradient(transformer: WanTransformer3DModel, inputs: Inputs) -> Tensor:
    our_loss(transformer, inputs).backward()
    parameters = lora.adapter_parameters(transformer)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.fixture(scope="module")
def plain(inputs: Inputs) -> Tensor:
    """The gradient of blocks as they are."""
    return gradient(model(), inputs)


@pytest.mark.parametrize("keep", KEEPS)
def test_what_is_kept_changes_no_bit_of_the_gradient(
    keep: Keep, inputs: Inputs, plain: Tensor
) -> None:
    transformer = model()
    prepare_blocks(transformer, (keep,) * BLOCKS, False, CPU)
    assert torch.equal(gradient(transformer, inputs), plain)


@pytest.mark.parametrize("keep", KEEPS)
def test_where_inputs_wait_changes_no_bit_of_it(keep: Keep, inputs: Inputs, plain: Tensor) -> None:
    transformer = model()
    prepare_blocks(transformer, (keep, "products"), False, CPU, "host")
    for _ in range(2):
        transformer.zero_grad()
        assert torch.equal(gradient(transformer, inputs), plain)


def test_blocks_may_keep_different_things(inputs: Inputs, plain: Tensor) -> None:
    transformer = model()
    prepare_blocks(transformer, ("attention", "everything"), False, CPU)
    assert torch.equal(gradient(transformer, inputs), plain)
    prepare_blocks(transformer, ("host", "products"), False, CPU)  # another choice replaces it
    transformer.zero_grad()
    assert torch.equal(gradient(transformer, inputs), plain)


def recomputed(keep: Keep, inputs: Inputs) -> Counter[object]:
    """Operators that run in the backward pass and in a forward pass."""
    transformer = model()
    prepare_blocks(transformer, (keep,) * BLOCKS, False, CPU)
    loss = our_loss(transformer, inputs)
    with Counting() as counting:
        loss.backward()
    return counting.counts


def test_each_way_computes_again_what_it_says(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "SMALL", 0)  # in so small a model, all products are
    attention = dict.fromkeys(KEEPS, 0)
    linears = dict(attention)
    for keep in KEEPS:
        counts = recomputed(keep, inputs)
        attention[keep] = sum(counts[kernel] for kernel in ATTENTION_KERNELS)
        linears[keep] = counts[torch.ops.wan.plain_product.default]
    # Self- and cross-attention; cross-attention alone; none.
    assert attention["host"] == attention["nothing"] == 2 * BLOCKS
    assert attention["attention"] == attention["products"] == BLOCKS
    assert attention["everything"] == 0
    gradients = 8 * BLOCKS  # of inputs: that of the text, which two linears have, needs none
    assert linears["everything"] == linears["products"] == gradients
    assert linears["nothing"] == linears["attention"] > gradients


def test_sampling_runs_without_keeping_anything(inputs: Inputs) -> None:
    transformer = model()
    expected = our_loss(transformer, inputs).item()
    for keep in KEEPS:
        prepare_blocks(transformer, (keep,) * BLOCKS, False, CPU)
        with torch.no_grad():
            assert our_loss(transformer, inputs).item() == expected


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile that traces and splits graphs as ever, and generates no code (seconds)."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
def test_compiled_blocks_share_a_graph_with_adapters_in_it(inputs: Inputs, plain: Tensor) -> None:
    for keep in KEEPS:
        transformer = model()
        prepare_blocks(transformer, (keep,) * BLOCKS, True, CPU)
        before = graphs_compiled()
        found = gradient(transformer, inputs)
        assert graphs_compiled() <= before + 1  # one for all blocks, and no break within it
        assert ((found - plain).norm() / plain.norm()).item() < 1e-5
        made = graphs_compiled()
        transformer.zero_grad()
        gradient(transformer, inputs)
        assert graphs_compiled() == made


def kept_for_backward(keep: Keep, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tensors of all tokens and channels that a compiled block saves, beside its input."""
    partition = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", partition)
    transformer, saved = model(), {}
    prepare_blocks(transformer, (keep,) * BLOCKS, True, CPU)
    rotary = transformer.rope(inputs.x)
    tokens, width = rotary[0].shape[1], TINY.transformer.dim
    hidden = torch.randn(1, tokens, width, requires_grad=True)

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        text, modulation = torch.randn(1, 512, width), torch.randn(1, 1, 6, width)
        blocks_of(transformer)[0](hidden, text, modulation, rotary)
    saved.pop(hidden.data_ptr(), None)
    return sum(t.numel() % (tokens * width) == 0 for t in saved.values() if tokens in t.shape)


def test_a_compiled_block_keeps_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(TINY, (5, 48, 80), CPU)  # of 30 tokens: no other side is as long
    monkeypatch.setattr(speed, "SMALL", 0)  # in so small a model, all products are
    assert kept_for_backward("nothing", inputs, monkeypatch) == 0
    assert kept_for_backward("attention", inputs, monkeypatch) == 1


@pytest.mark.usefixtures("traced")
def test_each_shape_is_compiled_once(inputs: Inputs) -> None:
    transformer = model()
    prepare_blocks(transformer, ("everything",) * BLOCKS, True, CPU)
    shapes = [inputs, random_inputs(TINY, (1, 32, 32), CPU), random_inputs(TINY, (1, 48, 32), CPU)]
    for each in shapes:
        gradient(transformer, each)
    before = graphs_compiled()
    for each in shapes:
        gradient(transformer, each)
    assert graphs_compiled() == before


@pytest.mark.usefixtures("traced")
def test_a_strength_that_changes_is_not_baked_into_a_graph(inputs: Inputs) -> None:
    transformer, plain = model(), model()
    prepare_blocks(transformer, ("everything",) * BLOCKS, True, CPU)
    for strength in (1.0, 0.5, 0.0):
        for each in (transformer, plain):
            set_strengths(each, {lora.ADAPTER: strength})
        with torch.no_grad():
            found, expected = our_loss(transformer, inputs), our_loss(plain, inputs)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_compiler_one_warning_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=missing_compiler))
    can_compile.cache_clear()
    assert not can_compile(CPU)
    assert not can_compile(CPU)
    can_compile.cache_clear()
    (told,) = [record.message for record in caplog.records if record.name == "wan.compiler"]
    assert "speed.compile=false" in told


def missing_compiler(*_: object) -> None:
    raise RuntimeError("no gcc here")


def test_attention_that_is_not_installed_is_told() -> None:
    check_attention("auto")
    with pytest.raises(ValueError, match="attention flash3 cannot be used here"):
        check_attention("flash3")


def test_another_kernel_of_attention_is_used(inputs: Inputs, plain: Tensor) -> None:
    transformer = model()
    use_attention(transformer, "efficient")
    found = {
        cast("WanAttnProcessor", b.attn1.processor)._attention_backend
        for b in blocks_of(transformer)
    }
    assert found == {BACKENDS["efficient"]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("keep", KEEPS)
def test_compiled_on_a_gpu_gradients_are_those_of_eager(keep: Keep) -> None:
    device = torch.device("cuda")
    inputs = random_inputs(TINY, (13, 64, 64), device)
    found = {}
    for compiled in (False, True):
        transformer = adapted(TINY, BLOCKS, torch.bfloat16, device, None)
        prepare_blocks(transformer, (keep,) * BLOCKS, compiled, device)
        found[compiled] = gradient(transformer, inputs)
    error = (found[True] - found[False]).norm() / found[False].norm()
    assert error.item() < 0.02  # of bf16, whose roundings lie elsewhere in fused kernels
