"""One training step: the card's own limit, the plain reference, and ours, in one run.

Random weights of the variant's full width. The kernel floor is what the step's large kernels take
alone: each linear forward and for the gradient of its input, attention forward and backward. The
reference is diffusers and PEFT as their documentation has it: adapters in fp32 under autocast, all
of each block computed twice, eager; it is measured with 1 and 3 blocks, and its line drawn through
both. Floor and reference are measured again in each round, between our steps.
"""

import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from tools.bench_random import (
    Inputs,
    Loss,
    Shape,
    adapted,
    our_loss,
    random_inputs,
    reference,
    reference_loss,
)
from wan import lora
from wan.compiler import graphs_compiled
from wan.memory import set_up_blocks
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import FrozenFormat, InputPlace, Keep
from wan.step_graphs import StepGraphs
from wan.variants import Variant

REFERENCE_BLOCKS = (1, 3)
GIB = 2**30


@dataclass(frozen=True)
class Preset:
    """How our transformer is set up; keep None = as much as fits the card, or so much of it."""

    name: str
    frozen: FrozenFormat | None
    keep: Keep | None
    inputs: InputPlace = "device"
    card_gib: float | None = None


FORMATS: tuple[FrozenFormat | None, ...] = (None, "fp8", "fp8_weights", "int8", "nf4")
PRESETS = (
    Preset("bf16, attention kept", None, "attention"),
    Preset("bf16, auto", None, None),
    Preset("bf16, auto, inputs in host memory, 80 GiB", None, None, "host", 80),
    Preset("fp8, auto", "fp8", None),
    Preset("fp8, auto, inputs in host memory", "fp8", None, "host"),
)


def bench_steps(
    facts: Variant,
    blocks: int,
    shapes: Sequence[Shape],
    rounds: int,
    presets: Sequence[Preset] = PRESETS,
) -> list[dict[str, object]]:
    """One line for each shape and preset: seconds, GiB, and the ratios to floor and reference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    formats: list[FrozenFormat | None] = [None, "fp8"]
    for frozen in formats:
        if frozen not in {preset.frozen for preset in presets}:
            continue
        model = adapted(facts, blocks, torch.bfloat16, device, frozen)
        for shape in shapes:
            inputs = random_inputs(facts, shape, device)
            for preset in presets:
                if preset.frozen == frozen and _worth_it(preset, shape):
                    line: dict[str, object] = {
                        "shape": list(shape),
                        "blocks": blocks,
                        "preset": preset.name,
                    }
                    line |= _measured(model, facts, preset, inputs, rounds)
                    print(json.dumps(line), flush=True)
                    found.append(line)
        del model
        _free()
    return found


def _worth_it(preset: Preset, shape: Shape) -> bool:
    """A picture's activations fit as they are."""
    return (preset.keep is None and preset.inputs == "device") or shape[0] > 1


def _measured(
    model: WanTransformer3DModel, facts: Variant, preset: Preset, inputs: Inputs, rounds: int
) -> dict[str, object]:
    """Rounds of floor, reference and our step, one after the other; the medians."""
    device, blocks = inputs.x.device, len(blocks_of(model))
    compiled = device.type == "cuda"
    with smaller_card(preset.card_gib, device):
        keep = set_up_blocks(
            model, preset.keep or "auto", compiled, inputs.x.shape, 1, preset.inputs
        )
    few = [reference(facts, count, device) for count in REFERENCE_BLOCKS]  # not there in a training
    graphs = graphs_compiled()
    recorded = StepGraphs(compiled)
    theirs = sum(p.nbytes for other in few for p in other.parameters())
    reset_peak(device)
    started = time.perf_counter()
    step_seconds(model, our_loss, inputs, recorded)
    compiling = time.perf_counter() - started
    step_seconds(model, our_loss, inputs, recorded)  # records, after which no peak can be seen
    peak = max(0, peak_bytes(device) - theirs)
    for other in few:
        step_seconds(other, reference_loss, inputs)
    floors, references, ours = [], [], []
    for _ in range(rounds):
        ours.append(step_seconds(model, our_loss, inputs, recorded))
        fewer, more = (step_seconds(other, reference_loss, inputs) for other in few)
        slope = (more - fewer) / (REFERENCE_BLOCKS[1] - REFERENCE_BLOCKS[0])
        references.append(fewer + slope * (blocks - REFERENCE_BLOCKS[0]))
        floors.append(blocks * floor_seconds(facts, inputs, fp8=preset.frozen == "fp8"))
    seconds, floor = statistics.median(ours), statistics.median(floors)
    reference_seconds = statistics.median(references)
    recorded.clear()
    del few
    _free()
    return {
        "blocks": blocks,
        "seconds": round(seconds, 4),
        "peak_gib": round(peak / GIB, 1),
        "floor_seconds": round(floor, 4),
        "over_floor": round(seconds / floor, 3),
        "reference_seconds": round(reference_seconds, 4),
        "speed_up": round(reference_seconds / seconds, 3),
        "kept": {kind: keep.count(kind) for kind in dict.fromkeys(keep)},
        "first_step_seconds": round(compiling, 1),
        "graphs": graphs_compiled() - graphs,
    }


@contextmanager
def smaller_card(gib: float | None, device: torch.device) -> Iterator[None]:
    """Within the block the rest of the card's memory is taken."""
    taken = None
    if gib is not None and device.type == "cuda":
        rest = max(0, torch.cuda.mem_get_info(device)[1] - round(gib * GIB))
        taken = torch.empty(rest, dtype=torch.uint8, device=device)
    yield
    del taken
    _free()


def step_seconds(
    model: WanTransformer3DModel, loss: Loss, inputs: Inputs, graphs: StepGraphs | None = None
) -> float:
    """A forward and a backward pass, recorded if there are graphs; no gradients are left.

    Recorded, it is what `train.learner` does, and the loss is ours.
    """
    trained = lora.adapter_parameters(model)
    synchronise(inputs.x.device)
    started = time.perf_counter()
    if graphs is None:
        loss(model, inputs).backward()
    else:
        share = inputs.timestep.new_ones(1)
        graphs.add_gradients(
            model,
            trained,
            partial(_errors, model),
            (inputs.x, inputs.timestep, inputs.text, inputs.target),
            share,
        )
    synchronise(inputs.x.device)
    seconds = time.perf_counter() - started
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def _errors(
    model: WanTransformer3DModel, x: Tensor, timestep: Tensor, text: Tensor, target: Tensor
) -> Tensor:
    return our_loss(model, Inputs(x, timestep, text, target))[None]


def floor_seconds(facts: Variant, inputs: Inputs, fp8: bool) -> float:
    """The large kernels of one block, alone and one after the other, as often as takes a second."""
    x = inputs.x
    tokens = x.shape[2] * x.shape[3] * x.shape[4] // 4
    dim, hidden, heads = facts.transformer.dim, facts.transformer.ffn_dim, facts.transformer.heads
    make = {"device": x.device, "dtype": torch.bfloat16}
    fp8 = fp8 and x.is_cuda
    product = _fp8_product if fp8 else torch.matmul
    pairs = []
    for count, rows, columns in ((6, dim, dim), (1, dim, hidden), (1, hidden, dim)):
        a, b = torch.randn(tokens, rows, **make), torch.randn(columns, rows, **make)
        if fp8:
            a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        pairs += [(a, b.t())] * (2 * count)  # the gradient of the input is as large
    shape = (1, heads, tokens, dim // heads)
    q, k, v = (torch.randn(shape, **make).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, **make)

    def block() -> None:
        for a, b in pairs:
            product(a, b)
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, (q, k, v), grad)

    block()
    synchronise(x.device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        for _ in range(4):
            block()
        count += 4
        synchronise(x.device)
    return (time.perf_counter() - started) / count


def _fp8_product(a: Tensor, b: Tensor) -> Tensor:
    rows = torch.ones(a.shape[0], 1, device=a.device)
    columns = torch.ones(1, b.shape[1], device=a.device)
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def gradient_errors(
    facts: Variant, blocks: int, shape: Shape, formats: Sequence[FrozenFormat | None] = FORMATS
) -> dict[str, dict[str, float]]:
    """How far the gradients of all adapters are from those in fp32: the reference's and ours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = random_inputs(facts, shape, device)
    exact = gradients(adapted(facts, blocks, torch.float32, device, None), our_loss, inputs)
    errors = {}
    plain = reference(facts, blocks, device)
    errors["reference"] = _error(gradients(plain, reference_loss, inputs), exact)
    del plain
    for frozen in formats:
        model = adapted(facts, blocks, torch.bfloat16, device, frozen)
        keep: Keep = "attention"
        prepare_blocks(model, (keep,) * blocks, device.type == "cuda", device)
        errors[frozen or "bf16"] = _error(gradients(model, our_loss, inputs), exact)
        del model
        _free()
    return errors


def gradients(model: WanTransformer3DModel, loss: Loss, inputs: Inputs) -> dict[str, Tensor]:
    """Of each adapter's tensor, by its name."""
    loss(model, inputs).backward()
    found = {
        name: parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    a = torch.cat([found[name].flatten() for name in exact])
    b = torch.cat([exact[name].flatten() for name in exact])
    return {
        "relative": round(((a - b).norm() / b.norm()).item(), 5),
        "cosine": round(F.cosine_similarity(a.double(), b.double(), dim=0).item(), 6),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak of the device's memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The peak of the device's memory; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocated(device: torch.device) -> int:
    """Memory of the device that is in use; 0 on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
