"""How much memory a training step, a sample or an encoder takes, told before any weight is read.

Weights are counted exactly, on a model without memory. Activations are bytes for each token and
channel: what a block keeps follows from the shapes of what `wan/speed.py` keeps, what passes within
a block was fitted to what an H200 measured (`tests/measured_memory.csv`, `docs/plan.md`). Other
configurations than those are predictions. Source: `spec/wan22.md` section 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import cast

import torch

from wan.adapter_choices import split_module
from wan.headers import read_header
from wan.memory import MARGIN, Auto, BlockBytes, keep_that_fits, peak
from wan.quantised_weight import NF4_BLOCK, ROW_FORMATS
from wan.recognise import Weights
from wan.speed_choices import WITH_INPUTS, FrozenFormat, InputPlace, Keep
from wan.transformer import FFN_TOKENS, TEXT_LEN
from wan.variants import TransformerFacts
from wan.weights import empty_transformer, parameter_count

GIB = 2**30
BESIDE = 0.15 * GIB  # rotary tables, work space of the kernels
CONTEXT = 0.5 * GIB  # of CUDA, outside of what PyTorch counts
TRAINED = 4 + 4 + 8  # bytes of a number that is trained: itself, its gradient, AdamW's two
PRESENT_BLOCKS = 2  # of a model that streams or is sharded: one at work, one on its way
SHARES = 2  # of a sharded model, counted for the fewest GPUs: with more there is less on each

# Fitted: bytes for each token and channel that pass within a block at work, forward and backward.
PASSING = 34.4  # and those of the feed-forward part:
PASSING_FFN = 11.0
PASSING_KEPT: dict[Keep, float] = {"products": 36.0, "everything": 30.0}  # the feed-forward too
EAGER, EAGER_FFN = 80.0, 7.2  # all that a block makes without a compiler, kept or passing
EVERYTHING, EVERYTHING_FFN = 37.8, 2.0  # kept of a compiled block
EAGER_EVERYTHING, EAGER_EVERYTHING_FFN = 42.2, 4.0
FORWARD, FORWARD_FFN = 34.8, 8.0  # of a block that samples one video
VAE_PIXEL = 26.0 * 1024  # bytes for each pixel of a frame, fp32: decoding goes frame by frame
ENCODED = 0.5  # encoding takes so much of that


@dataclass(frozen=True)
class ExpertWeights:
    """Bytes of a transformer's frozen weights as a run holds them."""

    layers: int
    block: int  # one of them
    outside: int  # all else

    @property
    def whole(self) -> int:
        """All of them."""
        return self.layers * self.block + self.outside


@dataclass(frozen=True)
class Load:
    """What a step works on, and how."""

    facts: TransformerFacts
    tokens: int  # of one clip
    batch: int
    rank: int
    frozen: FrozenFormat | None = None
    compiled: bool = True
    processes: int = 1  # that share a clip: each has a part of its tokens
    inputs: InputPlace = "device"  # of blocks: where they wait

    @property
    def own_tokens(self) -> int:
        """Most tokens of one clip that a process has."""
        return ceil(self.tokens / self.processes)


def tokens_of(latent_shape: Sequence[int]) -> int:
    """How many tokens latents (C, F, h, w) are."""
    _, frames, height, width = latent_shape
    return frames * (height // 2) * (width // 2)


def expert_weights(
    weights: Weights, dtype: torch.dtype, frozen: FrozenFormat | None
) -> ExpertWeights:
    """The frozen weights of an expert that `find_model` found; nothing but headers is read."""
    stored = _gguf_bytes(weights) if frozen is None else 0
    found = weights_of_config(weights.config, dtype, frozen)
    if not stored:
        return found
    return ExpertWeights(found.layers, (stored - found.outside) // found.layers, found.outside)


def weights_of_config(
    config: Mapping[str, object], dtype: torch.dtype, frozen: FrozenFormat | None
) -> ExpertWeights:
    """The same of a transformer with these settings, in the words of the library's config."""
    model = empty_transformer({**config, "num_layers": 1})  # all blocks are alike
    kept = model._keep_in_fp32_modules or ()
    block = outside = 0
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        in_block = name.startswith("blocks.")
        if leaf == "weight" and split_module(path) and frozen is not None:
            size = packed_bytes(parameter.shape, frozen)
        else:
            in_fp32 = any(part in kept for part in name.split("."))
            size = parameter.numel() * (4 if in_fp32 else dtype.itemsize)
        block += in_block * size
        outside += (not in_block) * size
    return ExpertWeights(cast("int", config["num_layers"]), block, outside)


def packed_bytes(shape: Sequence[int], frozen: FrozenFormat) -> int:
    """Bytes of a weight (out, in) in a format, its scales among them."""
    rows, width = shape
    if frozen in ROW_FORMATS:
        return rows * width + 4 * rows
    return rows * width // 2 + 4 * rows * width // NF4_BLOCK


def _gguf_bytes(weights: Weights) -> int:
    """Of a file that stays quantised, its tensors; 0 of others."""
    if not weights.storage.startswith("gguf"):
        return 0
    headers = (read_header(file) for file in weights.files)
    return sum(tensor.size for header in headers for tensor in header.tensors.values())


def resting_bytes(experts: Sequence[ExpertWeights], placement: str) -> int:
    """Bytes of frozen weights on the device at once, of all experts of a model."""
    if placement == "resident":
        return sum(expert.whole for expert in experts)
    if placement == "swap":
        return max(expert.whole for expert in experts)
    present = max(PRESENT_BLOCKS * expert.block for expert in experts)
    shares = sum(e.layers * e.block for e in experts) // SHARES if placement == "shard" else 0
    return present + shares + sum(expert.outside for expert in experts)


def host_bytes(experts: Sequence[ExpertWeights], placement: str) -> int:
    """Bytes of frozen weights that wait in host memory, locked there."""
    if placement == "stream":
        return sum(expert.layers * expert.block for expert in experts)
    return sum(e.whole for e in experts) if placement == "swap" and len(experts) > 1 else 0


def block_bytes(load: Load, keep: Keep) -> BlockBytes:
    """Memory of one block in a training step, as `wan.memory.measure_block` would measure it."""
    width, ffn = load.facts.dim, load.facts.ffn_dim
    tokens = load.own_tokens * load.batch
    kept = tokens * _kept(load, keep)
    if keep not in ("host", "nothing"):  # keys and values of the text, as small products
        kept += load.batch * TEXT_LEN * 4 * width
    if not load.compiled:
        all_of_it = tokens * (EAGER * width + EAGER_FFN * ffn)
        return _with_whole_weight(load, kept, max(kept, all_of_it))
    if keep in PASSING_KEPT:
        passing = tokens * PASSING_KEPT[keep] * width
    else:
        in_parts = load.batch * min(load.own_tokens, FFN_TOKENS)
        passing = tokens * PASSING * width + in_parts * PASSING_FFN * ffn
    # host: its input, the one before it on its way, its output once more, and the gradient of that
    passing += {"host": 16, "nothing": 2}.get(keep, 0) * tokens * width
    if keep != "host" and waits(load, keep):  # its input, and the one before it on its way
        passing += 8 * tokens * width
    return _with_whole_weight(load, kept, kept + passing)


def waiting_bytes(load: Load, keep: Sequence[Keep]) -> int:
    """Of inputs of blocks, in fp32, that wait in host memory, locked there."""
    return 4 * load.batch * load.own_tokens * load.facts.dim * sum(waits(load, k) for k in keep)


def waits(load: Load, keep: Keep) -> bool:
    """Whether the input of a block that keeps so much waits in host memory."""
    return keep == "host" or (load.inputs == "host" and keep in WITH_INPUTS)


def _kept(load: Load, keep: Keep) -> float:
    """Bytes for each token."""
    width, ffn, heads = load.facts.dim, load.facts.ffn_dim, load.facts.heads
    hidden = 0 if waits(load, keep) else 4 * width
    if keep in ("host", "nothing"):
        return hidden
    if keep == "everything" and load.compiled:
        return EVERYTHING * width + EVERYTHING_FFN * ffn
    if keep == "everything":
        return EAGER_EVERYTHING * width + EAGER_EVERYTHING_FFN * ffn
    # hidden in fp32, what attention gives, its sums, and the inner products of eight adapters
    attention = hidden + 2 * width + 4 * heads + 8 * 2 * load.rank
    products = 6 * 2 * width + 2 * ffn  # q, k, v, out; query and out of the text's; up
    return attention + (products if keep == "products" else 0)


def _with_whole_weight(load: Load, kept: float, most: float) -> BlockBytes:
    """Beside it, for a product with a weight that is made whole, the largest one of a block."""
    largest = load.facts.dim * load.facts.ffn_dim
    # In rows: as fp32, times its scales, and in bf16; nf4 has a kernel for it.
    numbers = {"fp8_weights": 10, "int8": 10, "nf4": 2}.get(load.frozen or "", 0)
    return BlockBytes(round(kept), round(most + numbers * largest))


def chosen_keep(load: Load, keep: Keep | Auto, layers: int, budget: float) -> tuple[Keep, ...]:
    """What each block keeps, as `wan.memory.set_up_blocks` will choose within so many bytes."""
    if keep != "auto":
        return (keep,) * layers
    return keep_that_fits(layers, round(budget), partial(block_bytes, load))


def activation_bytes(load: Load, keep: Sequence[Keep]) -> int:
    """Most bytes at once that activations take in a training step."""
    return peak(keep, partial(block_bytes, load))


def activation_budget(card_bytes: float, resting: float, trained: int) -> float:
    """What `wan.memory.free_bytes` will find free, with `trained` bytes of adapters in fp32."""
    return (1 - MARGIN) * card_bytes - CONTEXT - BESIDE - resting - TRAINED // 4 * trained


def sample_bytes(load: Load, guided: bool) -> float:
    """What passes within a block when `load.batch` videos are sampled, on top of the weights."""
    rows = load.batch * (2 if guided else 1)
    in_parts = min(load.own_tokens, FFN_TOKENS) * FORWARD_FFN * load.facts.ffn_dim
    return rows * (load.own_tokens * FORWARD * load.facts.dim + in_parts)


def decode_bytes(frames: int, height: int, width: int, vae: Weights) -> float:
    """What the VAE takes to decode a video in fp32, itself and the video (twice) included."""
    video = 2 * 4 * 3 * frames * height * width
    return 4 * parameter_count(vae) + VAE_PIXEL * height * width + video


def encode_bytes(frames: int, height: int, width: int, vae: Weights, itemsize: int) -> float:
    """What the VAE takes to encode a clip in a dtype of so many bytes, itself included."""
    video = itemsize * 3 * frames * height * width
    passing = ENCODED * VAE_PIXEL * itemsize / 4 * height * width
    return itemsize * parameter_count(vae) + passing + video
