"""Prompts to text embeddings, as the official code makes them: clean, tokenise, encode, pad.

Embeddings are kept and stored without padding, and padded with zeros just before the transformer,
which attends to all rows: it was trained so. Source: `spec/wan22.md` section 1.6 and trap 6.
"""

import html
from collections.abc import Sequence

import ftfy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel


def clean_prompt(prompt: str) -> str:
    """The prompt with broken unicode mended, HTML entities resolved and whitespace collapsed."""
    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt)))  # twice: `&amp;lt;` is common
    return " ".join(prompt.split())


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    encoder: UMT5EncoderModel,
    text_len: int,
) -> list[Tensor]:
    """The embedding (L_i, D) of each prompt: fp32, L_i <= text_len tokens, no padding.

    Each prompt is encoded alone, so that its embedding does not depend on its neighbours; the
    rows equal those of the official padded and masked batch.
    """
    return [
        encode_ids(
            tokenizer(
                clean_prompt(prompt), truncation=True, max_length=text_len, return_tensors="pt"
            )["input_ids"][0],
            encoder,
        )
        for prompt in prompts
    ]


@torch.no_grad()
def encode_ids(ids: Tensor, encoder: UMT5EncoderModel) -> Tensor:
    """The embedding (L, D) in fp32 of the token ids (L,) of one prompt, all of them valid."""
    ids = ids[None].to(encoder.device)  # (1, L)
    states = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states[0].float()


def pad_text(embeddings: Sequence[Tensor], text_len: int) -> Tensor:
    """(B, text_len, D) for the transformer: the embeddings (L_i, D), then rows of zeros."""
    padded = embeddings[0].new_zeros(len(embeddings), text_len, embeddings[0].shape[-1])
    for row, embedding in zip(padded, embeddings, strict=True):
        row[: len(embedding)] = embedding
    return padded
