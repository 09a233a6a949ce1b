"""How a transformer's blocks run: attention, compiled or not, and what is kept of activations.

The model stays the library's class with the library's modules. `prepare_blocks` gives each block a
forward of its own, made of `wan.transformer.block_forward`; what must happen around a block, such
as weights that stream in (`wan/streaming.py`), hooks on to the block's call.
Source: `spec/performance.md`; measured in `docs/performance.md`.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers.transformer_wan import (
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import wan.frozen_operators  # noqa: F401  (defines torch.ops.wan)
from wan import compiler
from wan.offload import BlockForward, checkpoint_in_host, inputs_in_host
from wan.speed_choices import WITH_INPUTS, Attention, InputPlace, Keep
from wan.transformer import Rotary, block_forward

# What the library calls the kernels of attention.
BACKENDS: dict[Attention, AttentionBackendName] = {
    "auto": AttentionBackendName.NATIVE,  # PyTorch chooses: cuDNN on Hopper, else flash
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "flash2": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
}

# Every kernel that PyTorch's attention may come to; query and key are its first tensors.
ATTENTION_KERNELS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
# What a frozen linear comes to: all have biases. An adapter's first factor has none and is mm.
LINEAR_KERNELS = frozenset(
    (
        torch.ops.aten.addmm.default,
        torch.ops.wan.plain_product.default,
        torch.ops.wan.fp8_product.default,
        torch.ops.wan.whole_product.default,
    )
)
SMALL_KERNELS = frozenset((torch.ops.aten.mm.default, torch.ops.aten.addmm.default))
SMALL = 2**23  # elements


def prepare_blocks(
    transformer: WanTransformer3DModel,
    keep: Sequence[Keep],
    compiled: bool,
    device: torch.device,
    inputs: InputPlace = "device",
) -> None:
    """Give each block its forward; `keep` says for each what stays for the backward pass.

    `inputs`: where those of blocks wait for it that do not keep everything.

    Blocks of one kind share one compiled graph for each shape. Called again, it replaces what it
    did before.
    """
    sampling = compiler.compiled(block_forward) if compiled else block_forward
    training = {kind: _training_forward(kind, compiled, device) for kind in set(keep)}
    for kind in training.keys() & WITH_INPUTS if inputs == "host" else ():
        training[kind] = inputs_in_host(training[kind], device)
    for block, kind in zip(blocks_of(transformer), keep, strict=True):
        block.forward = cast("BlockForward", partial(_forward, block, training[kind], sampling))


def blocks_of(transformer: WanTransformer3DModel) -> list[WanTransformerBlock]:
    """The blocks, typed."""
    return list(cast(Iterable[WanTransformerBlock], transformer.blocks))


def _forward(
    block: WanTransformerBlock,
    training: BlockForward,
    sampling: BlockForward,
    hidden: Tensor,
    text: Tensor,
    modulation: Tensor,
    rotary: Rotary,
) -> Tensor:
    run = training if torch.is_grad_enabled() else sampling
    return run(block, hidden, text, modulation, rotary)


def _training_forward(keep: Keep, compiled: bool, device: torch.device) -> BlockForward:
    """`block_forward` that keeps so much of itself; a checkpoint on the device is compiled too."""
    if keep == "host":
        return checkpoint_in_host(
            compiler.compiled(block_forward) if compiled else block_forward, device
        )
    if keep == "everything":
        return compiler.compiled(block_forward) if compiled else block_forward
    recomputing = _selective(keep)
    return compiler.compiled(recomputing) if compiled else recomputing


def _selective(keep: Keep) -> BlockForward:
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, keep))

    def recomputing(
        block: nn.Module, hidden: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary
    ) -> Tensor:
        arguments = (block, hidden, text, modulation, rotary)
        output = checkpoint(block_forward, *arguments, use_reentrant=False, context_fn=contexts)
        return cast("Tensor", output)

    return recomputing


def _policy(
    keep: Keep, _: object, operator: object, *arguments: object, **__: object
) -> CheckpointPolicy:
    """Whether what an operator returns is kept.

    Cross-attention is not: its output is as large as that of self-attention and costs no time.
    Small products always are: the adapters' inner ones, and keys and values of the text.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if keep == "nothing":  # said of each: untold, the compiler keeps what our operators return
        kept = False
    elif operator in ATTENTION_KERNELS:
        query, key = tensors[:2]
        kept = query.shape[-2] == key.shape[-2]
    elif operator in SMALL_KERNELS and tensors[-2].shape[0] * tensors[-1].shape[1] <= SMALL:
        kept = True
    else:
        kept = keep == "products" and operator in LINEAR_KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def use_attention(transformer: WanTransformer3DModel, attention: Attention) -> None:
    """Let training and sampling use this kernel; `ValueError` if its package is not installed.

    Sage attention has no backward pass: it is used within `sampling_attention` alone.
    """
    check_attention(attention)
    if attention not in ("auto", "sage"):
        for block in blocks_of(transformer):  # the library's own way changes all other models too
            for layer in (block.attn1, block.attn2):
                setattr(layer.processor, "_attention_backend", BACKENDS[attention])  # noqa: B010 (of no declared type)


def check_attention(attention: Attention) -> None:
    """`ValueError` unless what this kernel needs is installed."""
    try:
        with attention_backend(BACKENDS[attention]):
            pass
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"attention {attention} cannot be used here: {error}") from error


def sampling_attention(attention: Attention) -> AbstractContextManager[None]:
    """Within the block attention is what sampling uses, where that is not what training does."""
    return attention_backend(BACKENDS["sage"]) if attention == "sage" else nullcontext()
