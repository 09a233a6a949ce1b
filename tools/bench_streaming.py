"""Frozen weights streamed from host memory: resident, by wan.streaming, by FSDP2's CPU offload.

python -m tools.bench_streaming                       # 6 blocks of A14B, 32,760 and 4,096 tokens
python -m tools.bench_streaming --keep attention --compiled --fp8

Each way runs the same step (forward and backward of random blocks with adapters, from a random
input) in this one process and prints one line of JSON: seconds (median), peak GiB on the device
during a step and allocated between steps, and how far its adapter gradients are from those of the
first way. A way that fails prints its error instead, and the next one runs. On the CPU it can only
be tried out: --blocks 3 --width 1024 --grids trial.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from wan import lora
from wan.adapter_choices import target_modules
from wan.key_names import transformer_config
from wan.pinned import SideStream, lock_in_memory
from wan.quantise import quantise_blocks
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import Keep
from wan.streaming import stream_blocks
from wan.transformer import TEXT_LEN, Rotary
from wan.variants import VARIANTS
from wan.weights import empty_transformer

# Latent frames, height, width.
GRIDS = {"video": (21, 60, 104), "image": (1, 128, 128), "trial": (1, 16, 16)}
GIB = 2**30
FAILURES = (RuntimeError, AssertionError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class Settings:
    """What is measured; the width is that of A14B but in trials."""

    blocks: int
    width: int
    keep: Keep
    compiled: bool
    fp8: bool
    repeats: int
    device: torch.device


class Stack(nn.Module):
    """Blocks one after the other: FSDP2 wants a module above them."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary) -> Tensor:
        """(B, L, d) of (B, L, d)."""
        for block in self.blocks:
            hidden = block(hidden, text, modulation, rotary)
        return hidden


Way = Callable[[WanTransformer3DModel, Stack, Settings], object]  # its result is kept alive
Inputs = tuple[Tensor, Tensor, Tensor, Rotary]


def main() -> None:
    """Measure every way at every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=5120, help="a multiple of 128")
    parser.add_argument("--keep", choices=("nothing", "attention", "everything"), default="nothing")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="frozen linears: FSDP2 leaves buffers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=["video", "image"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    settings = Settings(
        given.blocks,
        given.width,
        given.keep,
        given.compiled,
        given.fp8,
        given.repeats,
        device,
    )
    _print({"torch": torch.__version__, **_copy_rate(device), **vars(given)})
    for grid in given.grids:
        reference: list[Tensor] = []
        for way in given.ways:
            found: dict[str, object] = {"grid": grid, "way": way}
            try:
                found |= measure(WAYS[way], GRIDS[grid], settings, reference)
            except FAILURES as error:
                found["error"] = f"{type(error).__name__}: {error}"[:1000]
            finally:
                _print(found)
                _clean_up()


def measure(
    way: Way, grid: tuple[int, int, int], settings: Settings, reference: list[Tensor]
) -> dict[str, object]:
    """Seconds and GiB of a step; fills `reference` with its gradients, or compares with it."""
    torch.manual_seed(0)
    transformer = random_blocks(settings)
    adapters = lora.adapter_parameters(transformer)
    stack = Stack(cast("nn.ModuleList", transformer.blocks))
    kept = way(transformer, stack, settings)
    inputs = random_inputs(grid, settings)

    def step() -> None:
        for parameter in adapters:
            parameter.grad = None
        stack(*inputs).square().mean().backward()

    warming = time.perf_counter()
    for _ in range(2):
        step()
    _finish(settings.device)
    found: dict[str, object] = {
        "tokens": inputs[0].shape[1],
        "warming_seconds": round(time.perf_counter() - warming, 2),
    }
    found |= _memory_between_steps(settings.device)
    times = []
    for _ in range(settings.repeats):
        started = time.perf_counter()
        step()
        _finish(settings.device)
        times.append(time.perf_counter() - started)
    found["seconds"] = round(statistics.median(times), 4)
    if settings.device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    gradients = [parameter.grad.cpu() for parameter in adapters if parameter.grad is not None]
    assert len(gradients) == len(adapters), "not all adapters have a gradient"
    if not reference:
        reference += gradients
    error = sum((a - b).square().sum() for a, b in zip(gradients, reference, strict=True))
    norm = sum(b.square().sum() for b in reference)
    found["gradient_error"] = float(f"{(error / norm) ** 0.5:.3g}")
    del kept
    return found


def random_blocks(settings: Settings) -> WanTransformer3DModel:
    """A transformer with random blocks in bf16 on the device, and all else on `meta`."""
    facts = VARIANTS["t2v_a14b"].transformer
    scale = settings.width / facts.dim
    smaller = replace(
        facts,
        layers=settings.blocks,
        dim=settings.width,
        heads=settings.width // 128,
        ffn_dim=int(facts.ffn_dim * scale),
    )
    model = empty_transformer(
        transformer_config(replace(VARIANTS["t2v_a14b"], transformer=smaller))
    )
    cast("nn.ModuleList", model.blocks).to(torch.bfloat16)
    for block in blocks_of(model):
        block.norm2.float()
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    cast("nn.ModuleList", model.blocks).to_empty(device=settings.device)
    with torch.no_grad():
        for parameter in cast("nn.ModuleList", model.blocks).parameters():
            parameter.normal_(std=0.02)
    if settings.fp8:
        quantise_blocks(model, "fp8")
    lora.attach(model, 16, 16.0, target_modules("all"), 0.0, seed=0)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model):
            parameter.normal_(std=0.02)
    return model.train()


def random_inputs(grid: tuple[int, int, int], settings: Settings) -> Inputs:
    """What reaches the first block."""
    device, width = settings.device, settings.width
    rotary = WanRotaryPosEmbed(128, (1, 2, 2), 1024).to(device)
    angles = rotary(torch.zeros(1, 16, *grid, device=device))
    tokens = grid[0] * grid[1] * grid[2] // 4
    text = torch.randn(1, TEXT_LEN, width, device=device, dtype=torch.bfloat16)
    modulation = torch.randn(1, 1, 6, width, device=device) * 0.1
    return torch.randn(1, tokens, width, device=device), text, modulation, angles


def resident(
    transformer: WanTransformer3DModel, _: Stack, settings: Settings, in_host: bool = False
) -> None:
    """All weights on the device; if `in_host`, of each block its input is kept, in host memory."""
    keep: list[Keep] = ["host" if in_host else settings.keep] * settings.blocks
    prepare_blocks(transformer, keep, settings.compiled, settings.device)


def streamed(
    transformer: WanTransformer3DModel,
    stack: Stack,
    settings: Settings,
    in_host: bool = False,
    ahead: int = 1,
) -> object:
    """Weights by wan.streaming."""
    resident(transformer, stack, settings, in_host)
    return stream_blocks(list(stack.blocks), settings.device, ahead)


def fsdp2(transformer: WanTransformer3DModel, stack: Stack, settings: Settings) -> None:
    """By FSDP2 on one process; adapters are left to themselves, as they are trained on the device.

    It pins copies of its own, and knows parameters only: what is packed in buffers does not move.
    """
    resident(transformer, stack, settings)
    device = settings.device.type
    if not dist.is_initialized():
        meeting = f"file://{tempfile.mkdtemp()}/store"  # no port
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    shard = partial(
        fully_shard,
        mesh=init_device_mesh(device, (1,)),
        offload_policy=CPUOffloadPolicy(pin_memory=device == "cuda"),
        ignored_params=set(lora.adapter_parameters(transformer)),
    )
    sharded = [cast("FSDPModule", shard(block)) for block in stack.blocks]
    shard(stack)
    for block, following in pairwise(sharded):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


WAYS: dict[str, Way] = {
    "resident": resident,
    "streamed": streamed,
    "streamed_2_ahead": partial(streamed, ahead=2),
    "host_activations": partial(resident, in_host=True),
    "streamed_host_activations": partial(streamed, in_host=True),
    "fsdp2": fsdp2,
}


def _memory_between_steps(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats()
    return {"between_steps_gib": round(torch.cuda.memory_allocated() / GIB, 2)}


def _copy_rate(device: torch.device) -> dict[str, object]:
    """GiB a second from locked host memory to the device, and back."""
    if device.type != "cuda":
        return {"device": "cpu"}
    host, there = torch.ones(GIB, dtype=torch.uint8), torch.ones(GIB, dtype=torch.uint8).to(device)
    lock_in_memory(host, device)
    side = SideStream(device)
    found: dict[str, object] = {"device": torch.cuda.get_device_name()}
    for name, pair in (("to_device", (there, host)), ("to_host", (host, there))):
        for _ in range(2):
            started = time.perf_counter()
            side.wait(side.copy([pair]))
            _finish(device)
            found[f"{name}_gib_a_second"] = round(1 / (time.perf_counter() - started), 1)
    return found


def _clean_up() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(found: dict[str, object]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
