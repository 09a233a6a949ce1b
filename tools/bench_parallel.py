"""What more GPUs are worth, against one of them in the same run.

torchrun --nproc_per_node 2 -m tools.bench_parallel --blocks 8   # on GPUs of one host
torchrun --nproc_per_node 2 -m tools.bench_parallel --variant tiny --blocks 2 --shape 5x32x32

Random weights of the variant's width, one expert, adapters on all linears. First a step of process
0 alone, while the others wait; then ways to use the processes:
`experts`  each has a clip and an expert of its own, and none sends anything (train/apart.py)
`data`     each has a clip of its own, and gradients are averaged
`shard`    the same, and each holds a share of the frozen base (wan/sharding.py)
`context`  all share one clip (wan/context.py)
A line of JSON for each: seconds of the slowest process (median of the rounds), peak of its memory
and what rests between steps (GiB, 0 on a CPU), `efficiency`: what a process gets done in a second,
over what one alone does; gigabytes that a process sends in a step, counted in one, and the seconds
that they take with nothing beside them (tools/bench_exchange.py). Then all of it in one table, with
seconds of all blocks of the variant: those of fewer, multiplied.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tools.bench_exchange import exchange_seconds, messages_of
from tools.bench_random import Inputs, Shape, adapted, our_loss, random_inputs
from tools.bench_step import GIB, allocated, peak_bytes, reset_peak, synchronise
from train.learner import average_gradients
from wan.context import make_context, share_sequence
from wan.lora import adapter_parameters
from wan.sharding import shard_blocks
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import KEEPS, Keep
from wan.variants import VARIANTS, Variant

Way = Literal["experts", "data", "shard", "context"]
WAYS: tuple[Way, ...] = ("experts", "data", "shard", "context")


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
    alone = torch.zeros(3)
    if accelerator.is_main_process:
        alone = measure(prepared(work, accelerator.device), work, None, averages=False)
    accelerator.wait_for_everyone()
    lines = []
    for way in asked.ways:
        lines.append(compare(cast("Way", way), work, alone, accelerator))
        if accelerator.is_main_process:
            print(json.dumps(lines[-1]), flush=True)
    if accelerator.is_main_process:
        print(table(work, lines))
    accelerator.end_training()


def compare(
    way: Way, work: Work, alone: Tensor, accelerator: Accelerator
) -> dict[str, str | float | list[int]]:
    """The line of one way beside what `measure` found of a process alone; all must call it."""
    device, processes = accelerator.device, accelerator.num_processes
    model = prepared(work, device)
    if way == "shard":
        shard_blocks(blocks_of(model), init_device_mesh(device.type, (processes,)))
    elif way == "context":
        share_sequence(model, make_context(processes))
    averages = way != "experts"
    own = measure(model, work, accelerator, averages)
    rows = accelerator.gather(own.to(device)[None])  # (processes, 3)
    assert isinstance(rows, Tensor)
    seconds, peak, resting = rows.max(dim=0).values.tolist()
    step = partial(_step, model, random_inputs(work.facts, work.shape, device), accelerator)
    reduced = sum(parameter.nbytes for parameter in adapter_parameters(model))
    messages = messages_of(partial(step, averages), reduced)
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
        "sent_gb": sum(message.sent(processes) for message in messages) / 1e9,
        "exchange_seconds": round(exchange_seconds(messages, device, work.rounds), 5),
    }


def prepared(work: Work, device: torch.device) -> WanTransformer3DModel:
    """The model of a way, whole on each process so far."""
    gc.collect()  # that of the way before this one
    model = adapted(work.facts, work.blocks, torch.bfloat16, device, None)
    prepare_blocks(model, (work.keep,) * work.blocks, device.type == "cuda", device)
    return model


def measure(
    model: WanTransformer3DModel, work: Work, together: Accelerator | None, averages: bool
) -> Tensor:
    """Seconds of a step, its peak and the memory between steps in GiB: (3,), of this process.

    With an accelerator all processes begin each step together.
    """
    inputs = random_inputs(work.facts, work.shape, model.device)
    taken = []
    for round_ in range(1 + work.rounds):
        if together is not None:
            together.wait_for_everyone()
        if round_ == 1:  # the first compiles
            reset_peak(model.device)
        started = time.perf_counter()
        _step(model, inputs, together, averages)
        taken.append(time.perf_counter() - started)
    seconds = statistics.median(taken[1:])
    peak, resting = peak_bytes(model.device), allocated(model.device)
    return torch.tensor([seconds, peak / GIB, resting / GIB])


def _step(
    model: WanTransformer3DModel, inputs: Inputs, together: Accelerator | None, averages: bool
) -> None:
    """A forward and a backward pass, and gradients averaged if they are to be; none are left."""
    our_loss(model, inputs).backward()
    parameters = adapter_parameters(model)
    if together is not None and averages:
        average_gradients(parameters, together)
    synchronise(model.device)
    for parameter in parameters:
        parameter.grad = None


def table(work: Work, lines: Sequence[dict[str, str | float | list[int]]]) -> str:
    """All lines in Markdown, with the seconds of all blocks of the variant."""
    layers = work.facts.transformer.layers
    times = layers / work.blocks
    rows = [
        f"{work.facts.title}, {'x'.join(map(str, work.shape))}, {work.blocks} of {layers} blocks; "
        f"seconds of {layers} are those of {work.blocks} times {times:g}, not measured",
        "",
        f"| way | s a step | alone | of {layers} blocks | efficiency | peak GiB | alone | resting "
        "GiB | alone | GB sent | s, sent alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        seconds = line["seconds"]
        assert isinstance(seconds, float)
        rows.append(
            f"| {line['way']} | {seconds:.3f} | {line['alone_seconds']:.3f} "
            f"| {times * seconds:.2f} | {line['efficiency']:.1%} | {line['peak_gib']} "
            f"| {line['alone_peak_gib']} | {line['resting_gib']} | {line['alone_resting_gib']} "
            f"| {line['sent_gb']:.4f} | {line['exchange_seconds']:.4f} |"
        )
    return "\n".join(rows)


def _shape(text: str) -> Shape:
    """81x720x1280 as (frames, height, width)."""
    frames, height, width = (int(number) for number in text.split("x"))
    return frames, height, width


if __name__ == "__main__":
    main()
