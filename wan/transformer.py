"""The transformer's forward pass: the library's modules, the dtypes of the official code.

diffusers rounds the residual stream, the time modulation and the head to the model's dtype. Here
they stay in fp32, as in the official code: only attention, feed-forward and the projection of the
text run in the model's dtype. Error of the output in bf16 against fp32, random net of 40 layers
(`python -m tools.measure_precision`): diffusers 1.72 %, here 0.25 %, of which rounding the weights
alone makes 0.22 %. The sinusoid is that of the official code as well, in fp64: against its outputs
the error in fp32 is 5e-7, that of diffusers 5e-6. Source: `spec/wan22.md` sections 5.1 to 5.4.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn
from torch.func import functional_call

from wan.context import all_tokens, context_of, rows_of_tokens

TEXT_LEN = 512  # rows of text that every Wan was trained with, zeros included (wan22.md, trap 6)
TEXT_PART = 64  # rows: a CPU computes as many such parts as hold words and one row of zeros

FFN_TOKENS = 5632  # at once: 3 GiB less at 480x832x81 for 1 % of the time (docs/performance.md)

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (1, L, 1, head_dim)


def predict_velocity(
    transformer: WanTransformer3DModel,
    x: Tensor,
    timestep: Tensor,
    text: Tensor,
    first_frame_given: Tensor | None = None,
) -> Tensor:
    """The velocity (B, C, F, h, w) in fp32 at x (B, C_in, F, h, w).

    For I2V-A14B the condition is in the last channels of x. `timestep` (B,) is 1000 sigma in fp32,
    `text` (B, 512, D) is padded. `first_frame_given` (B,) bool says in which samples latent frame 0
    is an image without noise (TI2V-5B): there its tokens have timestep 0. Adapters and the kernels
    of attention are those of `transformer`; blocks with a forward from `wan.speed` run that.
    Processes that share sequences (`wan.context`) are given the same and get the same.
    """
    assert timestep.dtype == torch.float32, "in bf16, timestep 833 would become 832"
    assert text.shape[1] == TEXT_LEN, "the model attends to the rows of zeros too: pad the text"
    rotary: Rotary = transformer.rope(x)
    assert rotary[0].dtype == torch.float32, "rounded angles are other positions"

    x = x.float().detach()
    if torch.is_grad_enabled():
        x.requires_grad_()  # the first block's input has a gradient too: to a compiler it is as all
    hidden = _in_fp32(transformer.patch_embedding, x)  # (B, d, F, h/2, w/2)
    grid = hidden.shape[2:]
    hidden = hidden.flatten(2).transpose(1, 2).contiguous()  # (B, L, d)
    time, modulation = embed_time(transformer, timestep, x.shape[2], first_frame_given)
    tokens, context = grid.numel(), context_of(transformer)
    if context is not None:
        own = context.own(tokens)
        hidden = hidden[:, own.start : own.stop].clone()  # the rest is free to go
        time, modulation = (rows_of_tokens(rows, own, tokens) for rows in (time, modulation))
    text = text.to(transformer.patch_embedding.weight.dtype)
    if text.device.type == "cpu" and text.dtype == torch.float32:
        text = _without_repeats(text)  # (B, up to 512, D)
    text = transformer.condition_embedder.text_embedder(text)  # (B, 512, d) or fewer rows

    for block in cast(Iterable[WanTransformerBlock], transformer.blocks):
        arguments = (hidden, text, modulation, rotary)
        prepared = "forward" in vars(block)  # by wan.speed
        hidden = block(*arguments) if prepared else block_forward(block, *arguments)

    shift, scale = (transformer.scale_shift_table.float() + time[:, :, None]).unbind(2)
    out = _in_fp32(transformer.proj_out, _modulate(transformer.norm_out(hidden), shift, scale))
    if context is not None:
        out = all_tokens(out, tokens, context)
    return _unpatchify(out, grid, transformer.config["patch_size"])


def device_of(transformer: WanTransformer3DModel) -> torch.device:
    """Where it works; the library's `device` walks through all modules first, for some ms."""
    return transformer.patch_embedding.weight.device


def embed_time(
    transformer: WanTransformer3DModel,
    timestep: Tensor,
    frames: int,
    first_frame_given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The time's embedding (B, R, d) and modulation (B, R, 6, d), fp32.

    R is 1, or with `first_frame_given` a row for each latent frame: of these only the two that
    differ are computed, and never one for each token.
    """
    tau = timestep[:, None]  # (B, 1)
    if first_frame_given is not None:
        tau = torch.stack([timestep.masked_fill(first_frame_given, 0), timestep], dim=1)  # (B, 2)
    embedder = transformer.condition_embedder
    time = _in_fp32(embedder.time_embedder, sinusoid(tau, embedder.timesteps_proj.num_channels))
    modulation = _in_fp32(embedder.time_proj, embedder.act_fn(time)).unflatten(-1, (6, -1))
    if first_frame_given is not None:
        row_of_frame = torch.arange(frames, device=tau.device).clamp(max=1)
        time, modulation = time[:, row_of_frame], modulation[:, row_of_frame]
    return time, modulation


def sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """[cos(t w_i), sin(t w_i)] (..., channels), w_i = 10000^(-2i/channels): in fp64, then fp32."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double()[..., None] * 10_000**-exponent  # (..., channels / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def block_forward(
    block: WanTransformerBlock, hidden: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary
) -> Tensor:
    """One block: `hidden` (B, L, d) stays in fp32, attention and feed-forward run in text's dtype.

    `text` is (B, 512, d) or shorter: then its last row stands for all after it too. `modulation` is
    (B, R, 6, d) with a row for each R-th of the tokens.
    """
    dtype = text.dtype
    rows = (block.scale_shift_table.float() + modulation).unbind(2)  # 6 x (B, R, d)
    shift_attention, scale_attention, gate_attention, shift_ffn, scale_ffn, gate_ffn = rows

    normed = _modulate(block.norm1(hidden), shift_attention, scale_attention)
    # The library's attention, so that its choice of backends and fused projections remain.
    hidden = _add_gated(hidden, block.attn1(normed.to(dtype), None, None, rotary), gate_attention)
    hidden = hidden + block.attn2(block.norm2(hidden).to(dtype), text, _weight_of_rows(text), None)
    normed = _modulate(block.norm3(hidden), shift_ffn, scale_ffn)
    # By parts: its inner activations are the largest of all, and each token has its own.
    parts = [block.ffn(part) for part in normed.to(dtype).split(FFN_TOKENS, dim=1)]
    return _add_gated(hidden, torch.cat(parts, dim=1), gate_ffn)


def _without_repeats(text: Tensor) -> Tensor:
    """The rows (B, L, D) of a padded text (B, 512, D) up to one of the zeros that all end with.

    A caption has some 20 rows: all others are alike, and so are their keys and values. On a CPU
    that is most of the work of a small model. A GPU has lengths of its own to know before, and
    faster kernels for attention without a mask.
    """
    filled = text.any(dim=-1).any(dim=0).nonzero()  # (rows with text, 1)
    needed = int(filled.max()) + 2 if len(filled) else 1
    return text[:, : min(TEXT_LEN, -(-needed // TEXT_PART) * TEXT_PART)]


def _weight_of_rows(text: Tensor) -> Tensor | None:
    """What attention adds to the logits (1, 1, 1, L) of a text (B, L, d), its last row repeated."""
    rows = text.shape[1]
    if rows >= TEXT_LEN:
        return None
    weight = text.new_zeros(1, 1, 1, rows)
    weight[..., -1] = math.log(TEXT_LEN - rows + 1)  # n equal keys: n exp(x) = exp(x + log n)
    return weight


def _modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed (1 + scale) + shift, for (B, L, d) and rows (B, R, d) that serve L / R tokens each."""
    grouped = normed.unflatten(1, (shift.shape[1], -1))  # (B, R, L / R, d)
    return torch.addcmul(shift[:, :, None], grouped, 1 + scale[:, :, None]).flatten(1, 2)


def _add_gated(hidden: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """hidden + gate * branch in fp32, for (B, L, d) and rows (B, R, d)."""
    groups = (gate.shape[1], -1)
    x, y = hidden.unflatten(1, groups), branch.unflatten(1, groups)  # (B, R, L / R, d)
    return torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)


def _in_fp32(module: nn.Module, inputs: Tensor) -> Tensor:
    """The module's output, computed with its parameters cast to fp32 for this call."""
    parameters = dict(module.named_parameters())
    assert all(p.is_floating_point() for p in parameters.values()), "loaders leave it unquantised"
    return functional_call(module, {name: p.float() for name, p in parameters.items()}, inputs)


def _unpatchify(tokens: Tensor, grid: torch.Size, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, F, h, w) of tokens (B, L, patch x C) on a grid (F, h/2, w/2), the channel fastest."""
    patches = tokens.unflatten(2, (*patch, -1)).unflatten(1, grid)  # (B, F, h/2, w/2, 1, 2, 2, C)
    return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
