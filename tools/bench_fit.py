"""Whether a whole expert trains on a card of so much memory, as a GPU with more sees it.

The cap is PyTorch's (`set_per_process_memory_fraction`): what would not fit on the small card is
out of memory here. Weights are random, made and packed tensor by tensor.
"""

import time
from dataclasses import dataclass

import torch

from tools.bench_random import Shape, adapted, our_loss, random_inputs
from tools.bench_step import GIB, peak_bytes, reset_peak, synchronise
from wan.experts import Experts, Placement
from wan.lora import adapter_parameters
from wan.memory import Auto, set_up_blocks
from wan.speed_choices import FrozenFormat, InputPlace, Keep
from wan.variants import Expert, Variant


@dataclass(frozen=True)
class Setup:
    """A card, and the `speed` settings that are to fit it."""

    cap_gib: float | None
    placement: Placement
    frozen: FrozenFormat | None
    keep: Keep | Auto
    inputs: InputPlace
    compiled: bool
    steps: int


def bench_fit(facts: Variant, blocks: int, shape: Shape, setup: Setup) -> dict[str, object]:
    """Steps of AdamW of one expert: seconds of the last, the peak, or where memory ended."""
    device = torch.device("cuda", 0)
    torch.cuda.init()
    if setup.cap_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(setup.cap_gib * GIB / total, device)
    line: dict[str, object] = {"shape": list(shape), "blocks": blocks, **vars(setup)}
    doing = "loading"
    try:
        transformer = adapted(facts, blocks, torch.bfloat16, device, setup.frozen)
        expert: Expert = facts.experts[0]
        transformer = Experts({expert: transformer}, device, setup.placement)[expert]
        line["static_gib"] = round(torch.cuda.memory_allocated(device) / GIB, 1)
        inputs = random_inputs(facts, shape, device)
        doing = "setting up"
        kept = set_up_blocks(
            transformer, setup.keep, setup.compiled, inputs.x.shape, 1, setup.inputs
        )
        line["kept"] = {kind: kept.count(kind) for kind in dict.fromkeys(kept)}
        optimizer = torch.optim.AdamW(adapter_parameters(transformer), lr=1e-4, fused=True)
        for step in range(setup.steps):
            doing = f"step {step + 1}"
            reset_peak(device)
            started = time.perf_counter()
            our_loss(transformer, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronise(device)
            line["seconds"] = round(time.perf_counter() - started, 3)
            line["peak_gib"] = round(peak_bytes(device) / GIB, 1)
    except torch.OutOfMemoryError:
        line["out_of_memory_at"] = doing
    return line
