"""Prompts to embeddings, against the official encoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan.checkpoints import ModelPaths, find_model, load_text_encoder, load_tokenizer
from wan.text import clean_prompt, encode_ids, encode_prompts, pad_text

FIXTURES = Path(__file__).parent / "fixtures"

# spec/wan22.md section 7.5
LEAVES = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def transformers_name(official: str) -> str:
    module = official.removesuffix(".weight")
    if module == "token_embedding":
        return "shared.weight"
    if module == "norm":
        return "encoder.final_layer_norm.weight"
    _, block, leaf = module.split(".", 2)
    return f"encoder.block.{block}.{LEAVES[leaf]}.weight"


@pytest.fixture(scope="module")
def official_encoder() -> UMT5EncoderModel:
    weights = load_file(FIXTURES / "umt5_weights_official.safetensors")
    config = UMT5Config(
        vocab_size=1000,
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    encoder = UMT5EncoderModel(config).eval()
    named = {transformers_name(name): weight for name, weight in weights.items()}
    named["encoder.embed_tokens.weight"] = named["shared.weight"]
    encoder.load_state_dict(named)
    return encoder


@pytest.fixture(scope="module")
def toy(toy_model: Path) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    return load_tokenizer(folder), load_text_encoder(folder, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A red\n\tball \u00a0 rolls. ", "A red ball rolls."),
        ("fish &amp;amp; chips &amp;lt;3", "fish & chips <3"),
        ("1 < 2 &amp;amp; 3", "1 < 2 & 3"),  # ftfy leaves entities alone beside a <
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("Keep CASE, and: punctuation!", "Keep CASE, and: punctuation!"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_the_official_code_does(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned


def test_encoder_equals_the_official_one(official_encoder: UMT5EncoderModel) -> None:
    recorded = load_file(FIXTURES / "umt5_io.safetensors")
    for ids, mask, out in zip(recorded["ids"], recorded["mask"], recorded["out"], strict=True):
        valid = int(mask.sum())
        encoded = encode_ids(ids[:valid], official_encoder)
        assert encoded.shape == (valid, 64)
        assert _relative(encoded, out[:valid]) < 1e-5


def test_encoding_alone_equals_the_padded_and_masked_batch(
    toy: tuple[PreTrainedTokenizerFast, UMT5EncoderModel],
) -> None:
    tokenizer, encoder = toy
    prompts = ["A red ball.", "A much longer prompt about a blue cube on a hill", ""]
    encoded = encode_prompts(prompts, tokenizer, encoder, text_len=64)
    batch = tokenizer(prompts, padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**{k: batch[k] for k in ("input_ids", "attention_mask")})[0]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert [len(embedding) for embedding in encoded] == lengths == [12, 49, 1]
    for embedding, row, length in zip(encoded, states, lengths, strict=True):
        assert embedding.dtype == torch.float32
        assert _relative(embedding, row[:length]) < 1e-5


def test_prompts_are_cleaned_before_they_are_encoded(
    toy: tuple[PreTrainedTokenizerFast, UMT5EncoderModel],
) -> None:
    clean, dirty, other = encode_prompts(["a & b", " a  &amp; b", "a & c"], *toy, text_len=64)
    assert torch.equal(clean, dirty)
    assert not torch.equal(clean, other)


def test_long_prompts_are_cut_but_keep_their_end(
    toy: tuple[PreTrainedTokenizerFast, UMT5EncoderModel],
) -> None:
    (cut,) = encode_prompts(["a long prompt " * 10], *toy, text_len=8)
    (same,) = encode_prompts(["a long "[:7]], *toy, text_len=64)
    assert cut.shape == (8, 32)
    assert same.shape == (7, 32)  # cleaned of its last space, then the end token


def test_trimming_and_padding_again_changes_nothing() -> None:
    embeddings = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 9)]
    padded = pad_text(embeddings, 9)
    assert padded.shape == (3, 9, 8)
    for row, embedding in zip(padded, embeddings, strict=True):
        assert torch.equal(row[: len(embedding)], embedding)
        assert not row[len(embedding) :].any()
    trimmed = [row[: len(e)] for row, e in zip(padded, embeddings, strict=True)]
    assert torch.equal(pad_text(trimmed, 9), padded)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
