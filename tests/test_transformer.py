"""The library's transformer computes what the official one does: adapters stand on that."""

import re
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file

from wan.text import pad_text

FIXTURES = Path(__file__).parent / "fixtures"

# spec/wan22.md section 7.3; official norm3 is diffusers' norm2.
RULES = [
    (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"head\.modulation", "scale_shift_table"),
    (r"head\.head", "proj_out"),
    (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(attn\d)\.o\.", r"\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]


def diffusers_name(official: str) -> str:
    for pattern, replacement in RULES:
        official = re.sub(pattern, replacement, official)
    return official


def test_output_equals_the_official_one() -> None:
    weights = load_file(FIXTURES / "dit_t2v_weights_official.safetensors")
    recorded = load_file(FIXTURES / "dit_t2v_io.safetensors")
    transformer = WanTransformer3DModel(
        num_layers=2, num_attention_heads=1, attention_head_dim=128, ffn_dim=256, text_dim=64
    )
    transformer.load_state_dict({diffusers_name(name): w for name, w in weights.items()})
    text = pad_text([recorded["context"]], 512)
    with torch.no_grad():
        out = transformer(recorded["x"][None], recorded["t"], text, return_dict=False)[0][0]
        unpadded = transformer(
            recorded["x"][None], recorded["t"], recorded["context"][None], return_dict=False
        )[0][0]
    assert (out - recorded["out"]).norm() < 1e-5 * recorded["out"].norm()
    # The zero rows are attended to: leaving them out is not the same model.
    assert (unpadded - recorded["out"]).norm() > 1e-2 * recorded["out"].norm()
