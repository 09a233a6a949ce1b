"""How much of their activations the blocks may keep: measured on one block, then filled up.

A block that computes nothing twice is the fastest, and a long video's forty such blocks are more
than any card has. What each way of keeping costs is measured with a forward and a backward pass of
the last block at the run's largest shape; then as much is kept as fits. Source: `spec/wan22.md`
section 8.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from wan.context import context_of, most_of_all, rows_of_tokens
from wan.frozen_linear import FrozenLinear
from wan.sharding import passes_with
from wan.speed import blocks_of, prepare_blocks
from wan.speed_choices import KEEPS, InputPlace, Keep

Auto = Literal["auto"]
MARGIN = 0.04  # of the card: fragments, and what libraries take beside PyTorch


@dataclass(frozen=True)
class BlockBytes:
    """Memory of one block in a training step."""

    kept: int  # from its forward to its backward pass
    peak: int  # most at once in a forward and a backward pass of it alone


def set_up_blocks(
    transformer: WanTransformer3DModel,
    keep: Keep | Auto,
    compiled: bool,
    shape: torch.Size,
    rows: int,
    inputs: InputPlace = "device",
) -> tuple[Keep, ...]:
    """Prepare the blocks to keep what is asked for, or as much as fits; what each of them keeps.

    `shape` (B, C, F, h, w) is that of the run's largest latents, `rows` how many rows of time
    modulation these have (`wan.transformer.embed_time`). On the CPU all fits.
    """
    device, count = transformer.device, len(blocks_of(transformer))
    chosen: tuple[Keep, ...] = ("everything" if keep == "auto" else keep,) * count
    if keep == "auto" and device.type == "cuda":
        for linear in _in_fp8(transformer):
            linear.turned = None  # of a smaller shape, if at all
        free = free_bytes(device, [p for p in transformer.parameters() if p.requires_grad])
        # Processes that share passes keep alike: what one computes again takes them all.
        budget = -most_of_all(passes_with(transformer), device, -free)[0]
        measured = cache(partial(measure_block, transformer, shape, rows, compiled, inputs))
        chosen = keep_that_fits(count, budget, measured)
        if set(chosen) == {"everything"}:
            turn_weights(transformer, budget - peak(chosen, measured))
    prepare_blocks(transformer, chosen, compiled, device, inputs)
    return chosen


def turn_weights(transformer: WanTransformer3DModel, room: int) -> None:
    """Keep weights in fp8 a second time, turned for the gradient of their inputs, if all fit."""
    packed = _in_fp8(transformer)
    if sum(linear.qweight.nbytes for linear in packed) <= room:
        for linear in packed:
            linear.turn()


def _in_fp8(transformer: WanTransformer3DModel) -> list[FrozenLinear]:
    linears = [m for m in transformer.modules() if isinstance(m, FrozenLinear)]
    return [linear for linear in linears if linear.format == "fp8"]


def keep_that_fits(
    blocks: int, budget: int, measure: Callable[[Keep], BlockBytes]
) -> tuple[Keep, ...]:
    """What each block may keep within `budget` bytes: the last ones the most.

    Tried from "attention" upwards, and only what is tried is measured. Without room for that, it is
    "nothing", and without room for that either "host".
    """
    measured = cache(measure)
    keep: tuple[Keep, ...] = ("attention",) * blocks
    if peak(keep, measured) > budget:
        keep = ("nothing",) * blocks
        return keep if peak(keep, measured) <= budget else ("host",) * blocks
    for more in KEEPS[KEEPS.index("products") :]:
        less = keep[0]
        fitting = (
            count
            for count in range(blocks, -1, -1)
            if peak((less,) * (blocks - count) + (more,) * count, measured) <= budget
        )
        count = next(fitting, 0)
        keep = (less,) * (blocks - count) + (more,) * count
        if count < blocks:
            break
    return keep


def peak(keep: Sequence[Keep], measured: Callable[[Keep], BlockBytes]) -> int:
    """Most bytes at once in a step: in the pass of some block, beside what those before it keep."""
    before = most = 0
    for kind in keep:
        most = max(most, before + measured(kind).peak)
        before += measured(kind).kept
    return most


def measure_block(
    transformer: WanTransformer3DModel,
    shape: torch.Size,
    rows: int,
    compiled: bool,
    inputs: InputPlace,
    keep: Keep,
) -> BlockBytes:
    """Two passes of the last block one after the other, and back, as `set_up_blocks` would have it.

    The second one has the first one's input on its way to where it waits. The block's adapter has
    no gradients afterwards.
    """
    block, device, dtype = blocks_of(transformer)[-1], transformer.device, transformer.dtype
    kinds = (keep,) * len(blocks_of(transformer))
    prepare_blocks(transformer, kinds, compiled, device, inputs)
    batch, width = shape[0], transformer.scale_shift_table.shape[-1]
    rotary = transformer.rope(torch.empty(shape, device=device))
    tokens, context = rotary[0].shape[1], context_of(transformer)
    own = range(tokens) if context is None else context.own(tokens)
    # (B, L, d); blocks are given copies, since a leaf stays as long as its graph
    hidden = torch.randn(batch, len(own), width, device=device, requires_grad=True)
    text = torch.randn(batch, 512, width, device=device, dtype=dtype)
    modulation = rows_of_tokens(torch.randn(batch, rows, 6, width, device=device), own, tokens)

    def step() -> BlockBytes:
        before = _allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = block(hidden.clone(), text, modulation, rotary)
        one = _allocated(device)
        output = block(output, text, modulation, rotary)
        kept = _allocated(device) - one
        output.backward(output.detach())
        most = torch.cuda.max_memory_allocated(device) - before
        hidden.grad = None
        return BlockBytes(kept, most - kept)

    step()  # compiles, and makes the adapter's gradients
    measured = step()
    for parameter in block.parameters():
        parameter.grad = None
    most = most_of_all(passes_with(transformer), device, measured.kept, measured.peak)
    return BlockBytes(*most)


def free_bytes(device: torch.device, parameters: Sequence[nn.Parameter]) -> int:
    """What activations may fill: all that is free, less what gradients and optimizer will take."""
    gc.collect()  # a model that is gone holds its memory until then
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    trained = sum(parameter.nbytes for parameter in parameters)
    return free - 3 * trained - round(MARGIN * total)


def _allocated(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)
