"""What 8 to 64 GPUs would take for a step: a model from computed volumes, nothing of it measured.

    python -m tools.scaling
    python -m tools.scaling --rank 64 --links 450 25

Volumes are counted: numbers of adapters, bytes of frozen blocks, tokens. Rates are the makers', of
NVLink within a machine and of the network between machines, so that times are the least that the
exchange can take. Time of computing is that of `python -m tools.plan` on an H200. What the model
leaves out: latencies, stragglers, data, and other jobs on the same network.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wan.cards import H200, adapter_numbers, step_seconds
from wan.footprint import (
    GIB,
    Load,
    activation_budget,
    chosen_keep,
    tokens_of,
    weights_of_config,
)
from wan.key_names import transformer_config
from wan.variants import VARIANTS, Variant

MACHINE = 8  # GPUs that NVLink joins
NVLINK, NETWORK = 450.0, 50.0  # GB/s each way for a GPU: NVLink 4, and 400 Gb/s InfiniBand
COUNTS = (8, 16, 32, 64)
SIZES = ((81, 480, 832), (81, 720, 1280))
BF16, FP32 = 2, 4
# Of a block: queries, keys, values and output in both passes, the first three twice if computed so.
EXCHANGES = 4 + 4 + 3


@dataclass(frozen=True)
class Volumes:
    """Bytes that each of `count` GPUs sends in a step."""

    count: int
    gradients: float  # data parallel: all-reduce of the adapters' gradients
    weights: float  # sharded base: all-gather of each block, in both passes
    tokens: float  # context parallel, all GPUs on one clip: all-to-all around self-attention


def volumes(variant: Variant, load: Load, count: int) -> Volumes:
    """Of one clip a GPU; what stays on a GPU is not sent."""
    others = (count - 1) / count
    facts = variant.transformer
    adapters = FP32 * adapter_numbers(facts, load.rank)
    base = weights_of_config(transformer_config(variant), torch.bfloat16, None)
    own = load.tokens / count * facts.dim * BF16
    return Volumes(
        count=count,
        gradients=2 * others * adapters,
        weights=2 * others * base.layers * base.block,
        tokens=EXCHANGES * others * own * facts.layers,
    )


def computing(variant: Variant, load: Load) -> float:
    """Seconds that one H200 computes for a clip, predicted."""
    resting = weights_of_config(transformer_config(variant), torch.bfloat16, None).whole
    trained = FP32 * adapter_numbers(variant.transformer, load.rank)
    budget = activation_budget(H200.gib * GIB, resting, trained)
    keep = chosen_keep(load, "auto", variant.transformer.layers, budget)
    return step_seconds(load, keep, H200)


def load_of(variant: Variant, size: tuple[int, int, int], rank: int) -> Load:
    """One clip of (frames, height, width)."""
    tokens = tokens_of(variant.geometry.latent_shape(*size))
    return Load(variant.transformer, tokens, 1, rank)


def table(variant: Variant, size: tuple[int, int, int], rank: int, links: Sequence[float]) -> str:
    """Lines of Markdown: how much is sent, how long that takes at least, what is left for work."""
    load = load_of(variant, size, rank)
    seconds = computing(variant, load)
    lines = [
        f"{variant.title}, {'x'.join(map(str, size))} ({load.tokens:,} tokens), rank {rank}: "
        f"{seconds:.2f} s of computing a clip, predicted",
        "",
        "| GPUs | data parallel: GB sent, s | share of computing | sharded base: GB received, s | "
        "context parallel: GB sent, s | a clip |",
        "|---|---|---|---|---|---|",
    ]
    for count in COUNTS:
        found = volumes(variant, load, count)
        rate = 1e9 * (links[0] if count <= MACHINE else links[1])
        reduce, gather = found.gradients / rate, found.weights / rate
        row = f"| {count} | {found.gradients / 1e9:.2f}, {reduce:.3f} "
        row += f"| {seconds / (seconds + reduce):.1%} | {found.weights / 1e9:.0f}, {gather:.2f} "
        lines.append(row + _shared_clip(variant, found, seconds, rate))
    return "\n".join(lines)


def _shared_clip(variant: Variant, found: Volumes, seconds: float, rate: float) -> str:
    """Context parallel over all GPUs, where attention has a head for each and NVLink joins them."""
    if variant.transformer.heads % found.count or found.count > MACHINE:
        return "| | |"
    exchange = found.tokens / rate
    return (
        f"| {found.tokens / 1e9:.1f}, {exchange:.3f} | {seconds / found.count + exchange:.2f} s |"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print a table for each size; `words` are the command line's, None = those of this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, default="t2v_a14b")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument(
        "--links",
        type=float,
        nargs=2,
        default=(NVLINK, NETWORK),
        metavar=("WITHIN", "BETWEEN"),
        help="GB/s each way for a GPU, within a machine and between machines",
    )
    arguments = parser.parse_args(words)
    variant = VARIANTS[arguments.variant]
    print("A MODEL, from counted bytes and makers' rates; nothing of it is measured.")
    for size in SIZES:
        print(f"\n{table(variant, size, arguments.rank, arguments.links)}")


if __name__ == "__main__":
    main()
