"""Where the time of one training step goes on a GPU, kernel by kernel."""

import json
from collections import Counter

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tools.bench_random import Shape, adapted, our_loss, random_inputs
from tools.bench_step import step_seconds
from wan.memory import Auto, set_up_blocks
from wan.speed_choices import FrozenFormat, Keep
from wan.variants import Variant

SHOWN = 30


def bench_profile(
    facts: Variant, blocks: int, shape: Shape, frozen: FrozenFormat | None, keep: Keep | Auto
) -> None:
    """Print a line of sums, then the kernels that take longest."""
    device = torch.device("cuda")
    model = adapted(facts, blocks, torch.bfloat16, device, frozen)
    inputs = random_inputs(facts, shape, device)
    set_up_blocks(model, keep, True, inputs.x.shape, rows=1)
    for _ in range(2):
        step_seconds(model, our_loss, inputs)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        our_loss(model, inputs).backward()
        torch.cuda.synchronize()
    events = profiled.events()
    assert events is not None
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for kernel in kernels:
        times[kernel.name] += kernel.time_range.elapsed_us()
        counts[kernel.name] += 1
    start = min(kernel.time_range.start for kernel in kernels)
    end = max(kernel.time_range.end for kernel in kernels)
    waits = Counter(event.name for event in events if "Synchronize" in event.name)
    waits["cudaDeviceSynchronize"] -= 1  # ours, at the end
    summary = {
        "shape": list(shape),
        "blocks": blocks,
        "span_ms": round((end - start) / 1000, 1),
        "busy_ms": round(sum(times.values()) / 1000, 1),
        "kernels": len(kernels),
        "host_waits": dict(+waits),
    }
    print(json.dumps(summary))
    for name, microseconds in times.most_common(SHOWN):
        print(f"{microseconds / 1000:9.2f} ms {counts[name]:5d}x  {name[:100]}")
