"""What more GPUs are worth, against one of them in the same run.

torchrun --nproc_per_node 2 -m tools.bench_parallel            # full size, on GPUs of one host
torchrun --nproc_per_node 2 -m tools.bench_parallel --variant tiny --blocks 2 --shape 5x32x32

Random weights of the variant's width, one expert, adapters on all linears. Three ways to use the
processes, each beside a step of process 0 alone, while the others wait:
`data`     each has a clip of its own, and gradients are averaged
`shard`    the same, and each holds a share of the frozen base (wan/sharding.py)
`context`  all share one clip (wan/context.py)
A line of JSON for each: seconds of the slowest process (median of the rounds), peak of its memory
and what rests between steps (GiB, 0 on a CPU), and `efficiency`: what a process gets done in a
second, over what one alone does.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass
from typing import Literal, cast

import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tools.bench_step import (
    GIB,
    Shape,
    adapted,
    allocated,
    our_loss,
    peak_bytes,
    random_inputs,
    reset_peak,
    synchronise,
)
from train.learner import average_gradients
from wan.context import make_context, share_sequence
from wan.lora import adapter_parameters
from wan.sharding import shard_blocks
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import KEEPS, Keep
from wan.variants import VARIANTS, Variant

Way = Literal["data", "shard", "context"]
WAYS: tuple[Way, ...] = ("data", "shard", "context")


@dataclass(frozen=True)
class Work:
    """What is measured."""

    facts: Variant
    blocks: int
    shape: Shape
    keep: Keep
    rounds: int


def main() -> None:
    """Read the command line and print lines of JSON, from one process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--shape", type=_shape, default=(81, 720, 1280), help="81x720x1280")
    parser.add_argument("--keep", choices=KEEPS, default="attention")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    asked = parser.parse_args()
    work = Work(VARIANTS[asked.variant], asked.blocks, asked.shape, asked.keep, asked.rounds)
    accelerator = Accelerator()
    for way in asked.ways:
        line = compare(cast("Way", way), work, accelerator)
        if accelerator.is_main_process:
            print(json.dumps(line), flush=True)
    accelerator.end_training()


def compare(way: Way, work: Work, accelerator: Accelerator) -> dict[str, object]:
    """The line of one way, on the main process; all must call it."""
    gc.collect()  # the model of the way before this one
    device, processes = accelerator.device, accelerator.num_processes
    model = adapted(work.facts, work.blocks, torch.bfloat16, device, None)
    prepare_blocks(model, (work.keep,) * work.blocks, device.type == "cuda", device)
    alone = torch.zeros(3)
    if accelerator.is_main_process:
        alone = measure(model, work, None)
    accelerator.wait_for_everyone()
    if way == "shard":
        shard_blocks(blocks_of(model), init_device_mesh(device.type, (processes,)))
    elif way == "context":
        share_sequence(model, make_context(processes))
    own = measure(model, work, accelerator)
    rows = accelerator.gather(own.to(device)[None])  # (processes, 3)
    assert isinstance(rows, Tensor)
    seconds, peak, resting = rows.max(dim=0).values.tolist()
    at_once = 1 if way == "context" else processes  # clips
    return {
        "way": way,
        "processes": processes,
        "shape": list(work.shape),
        "blocks": work.blocks,
        "keep": work.keep,
        "seconds": round(seconds, 4),
        "alone_seconds": round(alone[0].item(), 4),
        "efficiency": round(at_once * alone[0].item() / seconds / processes, 3),
        "peak_gib": round(peak, 2),
        "alone_peak_gib": round(alone[1].item(), 2),
        "resting_gib": round(resting, 2),
        "alone_resting_gib": round(alone[2].item(), 2),
    }


def measure(model: WanTransformer3DModel, work: Work, accelerator: Accelerator | None) -> Tensor:
    """Seconds of a step, its peak and the memory between steps in GiB: (3,), of this process.

    With an accelerator gradients are averaged over all processes, which take each step together.
    """
    inputs = random_inputs(work.facts, work.shape, model.device)
    parameters = adapter_parameters(model)
    taken = []
    for round_ in range(1 + work.rounds):
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if round_ == 1:  # the first compiles
            reset_peak(model.device)
        started = time.perf_counter()
        our_loss(model, inputs).backward()
        if accelerator is not None:
            average_gradients(parameters, accelerator)
        synchronise(model.device)
        taken.append(time.perf_counter() - started)
        for parameter in parameters:
            parameter.grad = None
    seconds = statistics.median(taken[1:])
    peak, resting = peak_bytes(model.device), allocated(model.device)
    return torch.tensor([seconds, peak / GIB, resting / GIB])


def _shape(text: str) -> Shape:
    """81x720x1280 as (frames, height, width)."""
    frames, height, width = (int(number) for number in text.split("x"))
    return frames, height, width


if __name__ == "__main__":
    main()
