"""What cards can do, and how long a step takes: the H200 measured, all others scaled from it.

A step is the time of its large kernels at the rates of the card, and that of everything else, which
reads and writes memory. Rates of the H200 are of `spec/performance.md` (bf16 product 737 TFLOP/s,
fp8 1395, attention 571 forward and 534 backward); another card is taken to reach the same share of
its makers' figure. Flops: `spec/wan22.md` section 8.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from wan.footprint import GIB, ExpertWeights, Load, waiting_bytes
from wan.speed_choices import Keep
from wan.transformer import TEXT_LEN
from wan.variants import TransformerFacts

LINEARS, FP8_LINEARS = 737 / 989, 1395 / 1979  # reached of the makers' dense TFLOP/s
ATTENTION, ATTENTION_BACKWARD = 571 / 989, 534 / 989
BACKWARD = 2.5  # attention's flops of its backward pass, of those of its forward
# Bytes that pass for each token and channel of a block in a step, beside the large kernels: fitted
# to four measured steps, of which the predictions are 1 to 6 % off (`docs/plan.md`).
ELSE, EAGER_ELSE = 870.0, 2900.0
FORWARD_SHARE = 1 / 3  # of that in a forward pass alone
WHOLE_WEIGHT = 10  # bytes that pass to make a number of a weight in fewer bits whole
DECODED, ENCODED = 0.118, 0.07  # seconds for a million pixels of a video on an H200, fp32


@dataclass(frozen=True)
class Card:
    """A GPU by its makers' figures, dense and with sums in fp32."""

    name: str
    gib: float  # of memory that a program sees
    bf16: float  # TFLOP/s
    fp8: float | None  # TFLOP/s; None: has no such products
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s from host memory, as reached


H200 = Card("NVIDIA H200", 139.8, 989, 1979, 4800, 50)
CARDS: dict[str, Card] = {
    "b200": Card("NVIDIA B200", 178.4, 2250, 4500, 8000, 50),
    "h200": H200,
    "h100": Card("NVIDIA H100 80GB", 79.2, 989, 1979, 3350, 50),
    "a100": Card("NVIDIA A100 80GB", 79.2, 312, None, 2039, 24),
    "a100-40": Card("NVIDIA A100 40GB", 39.5, 312, None, 1555, 24),
    "rtx6000pro": Card("NVIDIA RTX PRO 6000 Blackwell", 94.9, 503, 1007, 1792, 50),
    "l40s": Card("NVIDIA L40S", 44.5, 362, 733, 864, 24),
    "rtx6000ada": Card("NVIDIA RTX 6000 Ada", 47.4, 364, 728, 960, 24),
    "a6000": Card("NVIDIA RTX A6000", 47.4, 155, None, 768, 24),
    "5090": Card("NVIDIA GeForce RTX 5090", 31.3, 209, 419, 1792, 50),
    "4090": Card("NVIDIA GeForce RTX 4090", 23.5, 165, 330, 1008, 24),
    "3090": Card("NVIDIA GeForce RTX 3090", 23.6, 71, None, 936, 24),
}


def linear_flops(load: Load) -> float:
    """Of the linears of all blocks in one forward pass, on each of the processes that share it."""
    facts = load.facts
    per_token = (12 * facts.dim**2 + 4 * facts.dim * facts.ffn_dim) * facts.layers
    text = 8 * facts.dim**2 * TEXT_LEN * facts.layers
    return load.batch * (load.own_tokens * per_token + text)


def attention_flops(load: Load) -> float:
    """Of attention, that to the text included, in one forward pass."""
    facts = load.facts
    keys = load.tokens + TEXT_LEN
    return load.batch * 4 * load.own_tokens * keys * facts.dim * facts.layers


def step_seconds(
    load: Load, keep: Sequence[Keep], card: Card, streamed: ExpertWeights | None = None
) -> float:
    """Forward and backward pass of one batch; with what is computed twice and what is copied.

    `streamed`: the weights come from host memory in each pass, beside the work. What processes that
    share a clip send one another is not counted: how fast their cards are joined is not known.
    """
    whole = load.facts.layers
    linears = 2 + sum(kind in ("host", "nothing", "attention") for kind in keep) / whole
    attention = 1 + sum(kind in ("host", "nothing") for kind in keep) / whole
    flops = attention_flops(load)
    seconds = linears * linear_flops(load) / _linear_rate(load, card)
    seconds += attention * flops / (1e12 * ATTENTION * card.bf16)
    seconds += BACKWARD * flops / (1e12 * ATTENTION_BACKWARD * card.bf16)
    seconds += _else_bytes(load) / (1e9 * card.bandwidth)
    seconds += linears * _whole_bytes(load, card) / (1e9 * card.bandwidth)
    return max(seconds, _copied_bytes(load, keep, streamed) / (1e9 * card.link))


def forward_seconds(load: Load, card: Card, streamed: ExpertWeights | None = None) -> float:
    """A forward pass of one batch, as samples and measurements take it."""
    seconds = linear_flops(load) / _linear_rate(load, card)
    seconds += attention_flops(load) / (1e12 * ATTENTION * card.bf16)
    seconds += FORWARD_SHARE * _else_bytes(load) / (1e9 * card.bandwidth)
    seconds += _whole_bytes(load, card) / (1e9 * card.bandwidth)
    blocks = 0 if streamed is None else streamed.layers * streamed.block
    return max(seconds, blocks / (1e9 * card.link))


def video_seconds(frames: int, height: int, width: int, card: Card, rate: float) -> float:
    """The VAE at work on a video, at `DECODED` or `ENCODED`: fp32, so as memory is."""
    return rate * frames * height * width / 1e6 * H200.bandwidth / card.bandwidth


def adapter_numbers(facts: TransformerFacts, rank: int) -> int:
    """How many numbers are trained with adapters of this rank on all ten linears."""
    return facts.layers * rank * (18 * facts.dim + 2 * facts.ffn_dim)


def card_of(name: str, total_bytes: int) -> Card | None:
    """The card that a driver calls so, with the memory that it really has; None if unknown."""
    for card in sorted(CARDS.values(), key=lambda card: -len(card.name)):
        if card.name.split(" ", 1)[1].split(" 80GB")[0].split(" 40GB")[0] in name:
            return Card(name, total_bytes / GIB, *_rates(card))
    return None


def _rates(card: Card) -> tuple[float, float | None, float, float]:
    return card.bf16, card.fp8, card.bandwidth, card.link


def _multiplies_fp8(load: Load, card: Card) -> bool:
    return load.frozen == "fp8" and card.fp8 is not None


def _linear_rate(load: Load, card: Card) -> float:
    """FLOP/s."""
    if _multiplies_fp8(load, card):
        assert card.fp8 is not None
        return 1e12 * FP8_LINEARS * card.fp8
    return 1e12 * LINEARS * card.bf16


def _else_bytes(load: Load) -> float:
    each = ELSE if load.compiled else EAGER_ELSE
    return each * load.batch * load.own_tokens * load.facts.layers * load.facts.dim


def _whole_bytes(load: Load, card: Card) -> float:
    """What passes in memory to make all weights whole once, where products need that."""
    if load.frozen is None or _multiplies_fp8(load, card):
        return 0
    facts = load.facts
    return WHOLE_WEIGHT * facts.layers * (8 * facts.dim**2 + 2 * facts.dim * facts.ffn_dim)


def _copied_bytes(load: Load, keep: Sequence[Keep], streamed: ExpertWeights | None) -> float:
    """To and from host memory: weights in both passes, and inputs that wait there."""
    weights = 0 if streamed is None else 2 * streamed.layers * streamed.block
    return weights + 2 * waiting_bytes(load, keep)
