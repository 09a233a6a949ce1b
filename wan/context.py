"""One sequence on several processes: each has a slice of its tokens, for training and sampling.

Norms, linears and text are computed for a process's own tokens. Self-attention is for some of the
heads and all of the tokens: queries, keys and values are exchanged before it, its output after it.
The sequence is cut and put together where the library's plan for this model does it (`_cp_plan`:
positions, the first block, `proj_out`). The exchange is our own: the library's is an autograd
function in the place of attention, so that neither the compiler nor selective checkpoints see the
kernel, PyTorch's choice of kernels would compute it twice, and all slices must be of one length.

Only `wan.transformer` and the blocks' self-attention know of it: adapters, compiled blocks and what
they keep, kernels and guidance are as they are on one process.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import cast

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
    WanTransformerBlock,
    _get_qkv_projections,
)
from torch import Tensor, distributed
from torch.distributed._functional_collectives import all_to_all_single_autograd


@dataclass(frozen=True)
class Context:
    """The processes that share a sequence, `size` of them, and which of them this one is."""

    group: distributed.ProcessGroup
    rank: int
    size: int

    def counts(self, tokens: int) -> list[int]:
        """How many tokens of a sequence each process has: the first ones one more, if need be."""
        each, more = divmod(tokens, self.size)
        return [each + (rank < more) for rank in range(self.size)]

    def own(self, tokens: int) -> range:
        """Which tokens of a sequence this process has."""
        counts = self.counts(tokens)
        start = sum(counts[: self.rank])
        return range(start, start + counts[self.rank])


def make_context(size: int) -> Context:
    """Of this process: `size` processes in a row share a sequence. All processes call it together.

    `ValueError` unless the number of processes is a multiple of `size`.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    if size < 1 or world % size:
        raise ValueError(f"{world} processes cannot share sequences {size} to one")
    groups = [distributed.new_group([*range(r, r + size)]) for r in range(0, world, size)]
    return Context(cast("distributed.ProcessGroup", groups[rank // size]), rank % size, size)


def share_sequence(transformer: WanTransformer3DModel, context: Context) -> None:
    """Let `predict_velocity` compute its slice of each sequence; every process calls it alike.

    Its output is whole on all. Each process must go backward from a loss of its own: the gradient
    that it gets is its part of that of the *sum* of these losses. With the same loss on all, the
    mean of the gradients over the processes is that of one process, as with data parallelism.
    `ValueError` if the heads cannot be divided.
    """
    heads = transformer.config["num_attention_heads"]
    if heads % context.size:
        raise ValueError(f"{heads} heads of attention cannot be divided among {context.size}")
    for attention in _self_attentions(transformer):
        kernel = getattr(attention.processor, "_attention_backend", None)
        attention.processor = SharedAttention(context, kernel)  # pyright: ignore[reportAttributeAccessIssue] (declared as one class)


@contextmanager
def whole_sequences(transformer: WanTransformer3DModel) -> Iterator[None]:
    """Within the block this process computes whole sequences, without the others."""
    layers = _self_attentions(transformer)
    shared = [attention.processor for attention in layers]
    for attention in layers:
        if isinstance(attention.processor, SharedAttention):
            attention.processor = attention.processor.alone()  # pyright: ignore[reportAttributeAccessIssue] (as above)
    try:
        yield
    finally:
        for attention, processor in zip(layers, shared, strict=True):
            attention.processor = processor


def context_of(transformer: WanTransformer3DModel) -> Context | None:
    """What `share_sequence` was given; None if a process has whole sequences."""
    processor: object = _self_attentions(transformer)[0].processor
    return processor.context if isinstance(processor, SharedAttention) else None


class SharedAttention:
    """The library's processor of self-attention, for a process's tokens of a shared sequence."""

    def __init__(self, context: Context, kernel: AttentionBackendName | None) -> None:
        self.context = context
        self._attention_backend = kernel  # by the library's name, as `wan.speed` sets it

    def alone(self) -> WanAttnProcessor:
        """The library's own, with the same kernel."""
        processor = WanAttnProcessor()
        setattr(processor, "_attention_backend", self._attention_backend)  # noqa: B010 (of no declared type)
        return processor

    def __call__(
        self,
        attention: WanAttention,
        hidden: Tensor,
        _: None,
        __: None,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """(B, own, d) of (B, own, d); `rotary` is that of the whole sequence, (1, L, 1, D) each."""
        tokens = rotary[0].shape[1]
        own = self.context.own(tokens)
        cosines, sines = (part[:, own.start : own.stop] for part in rotary)
        query, key, value = _get_qkv_projections(attention, hidden, None)  # pyright: ignore[reportArgumentType] (None = itself)
        query, key = attention.norm_q(query), attention.norm_k(key)
        query, key, value = (x.unflatten(2, (attention.heads, -1)) for x in (query, key, value))
        query, key = (_rotate(x, cosines, sines) for x in (query, key))

        together = torch.cat([query, key, value])  # (3 B, own, heads, D): one exchange
        query, key, value = tokens_for_heads(together, tokens, self.context).chunk(3)
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        out = heads_for_tokens(out.to(hidden.dtype), self.context).flatten(2)  # (B, own, d)
        return attention.to_out[1](attention.to_out[0](out))


def _self_attentions(transformer: WanTransformer3DModel) -> list[WanAttention]:
    return [block.attn1 for block in cast(Iterable[WanTransformerBlock], transformer.blocks)]


def tokens_for_heads(x: Tensor, tokens: int, context: Context) -> Tensor:
    """All tokens of some heads (B, L, heads / size, D), for own ones of all (B, own, heads, D)."""
    counts = context.counts(tokens)
    by_process = x.unflatten(2, (context.size, -1)).permute(2, 1, 0, 3, 4)  # (size, own, B, h, D)
    sent = [counts[context.rank]] * context.size
    return _exchange(by_process.flatten(0, 1), sent, counts, context).transpose(0, 1)


def heads_for_tokens(x: Tensor, context: Context) -> Tensor:
    """The way back: own tokens of all heads (B, own, heads, D), for all of some (B, L, h, D)."""
    counts = context.counts(x.shape[1])
    received = [counts[context.rank]] * context.size
    by_process = _exchange(x.transpose(0, 1), counts, received, context)  # (size x own, B, h, D)
    return by_process.unflatten(0, (context.size, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def all_tokens(x: Tensor, tokens: int, context: Context) -> Tensor:
    """(B, L, d) on all processes, of the own tokens (B, own, d) of each."""
    counts = context.counts(tokens)
    sent = [counts[context.rank]] * context.size
    copies = x.transpose(0, 1).repeat(context.size, 1, 1)  # (size x own, B, d)
    return _exchange(copies, sent, counts, context).transpose(0, 1)


def rows_of_tokens(rows: Tensor, own: range, tokens: int) -> Tensor:
    """Rows (B, R', ...) that serve the `own` tokens in equal shares, of (B, R, ...) for them all.

    R' is the least for which each share has a single row.
    """
    if rows.shape[1] == 1:
        return rows
    each = tokens // rows.shape[1]
    share = gcd(each, own.start, len(own))
    of_share = torch.arange(own.start, own.stop, share, device=rows.device) // each
    return rows[:, of_share]


def most_of_all(context: Context | None, device: torch.device, *numbers: int) -> list[int]:
    """The largest of each number among the processes that share sequences, which all call it."""
    if context is None:
        return [*numbers]
    row = torch.tensor(numbers, device=device)
    distributed.all_reduce(row, distributed.ReduceOp.MAX, group=context.group)
    return row.tolist()


def _exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], context: Context) -> Tensor:
    """Rows of the first dimension, sent to and received from the processes in their order."""
    flat = x.reshape(x.shape[0], -1)
    return all_to_all_single_autograd(flat, [*received], [*sent], context.group).reshape(
        sum(received), *x.shape[1:]
    )


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Queries or keys (B, L, heads, D) turned by their positions, as the library does it."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines[..., 0::2], sines[..., 1::2]
    turned = [even * cosines - odd * sines, even * sines + odd * cosines]
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)
