"""A toy Wan transformer, a trained-looking adapter for it and its facts, for the adapter tests."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wan.adapter_choices import target_modules
from wan.lora_metadata import AdapterInfo
from wan.variants import VARIANTS

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

RANK, ALPHA, WIDTH, FFN = 4, 2.0, 24, 40

INFO = AdapterInfo(
    title="Blue Fox",
    variant=VARIANTS["t2v_a14b"],
    expert="high",
    rank=RANK,
    alpha=ALPHA,
    targets="all",
    steps=1500,
    learning_rate=1e-4,
    optimizer="torch.optim.AdamW",
    seed=7,
    resolution="832x480",
    num_items=12,
    shift=12.0,
    timestep_law="uniform, shift 12",
    config_sha256="c" * 64,
    base_hash="b" * 16,
    dataset_hash="d" * 16,
    pair_id="0123abcd",
    date="2026-01-02T03:04:05+00:00",
    trigger="bluefox",
    heldout_loss=0.125,
    best_heldout_loss=0.0625,
)


def tiny_transformer(blocks: int = 2) -> "WanTransformer3DModel":
    # Here, as it takes seconds, which a process that writes files alone need not wait.
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=16,
            out_channels=16,
            text_dim=8,
            freq_dim=8,
            ffn_dim=FFN,
            num_layers=blocks,
            rope_max_seq_len=32,
        ).eval()


def random_state(seed: int, blocks: int = 2, preset: str = "all") -> dict[str, Tensor]:
    """A trained adapter of the tiny model, as `adapter_state` gives it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(blocks):
        for linear in target_modules(preset):
            wide_in, wide_out = linear == "ffn.net.2", linear == "ffn.net.0.proj"
            a = torch.randn(RANK, FFN if wide_in else WIDTH, generator=generator)
            b = torch.randn(FFN if wide_out else WIDTH, RANK, generator=generator)
            state[f"blocks.{i}.{linear}.lora_A.weight"] = 0.3 * a
            state[f"blocks.{i}.{linear}.lora_B.weight"] = 0.3 * b
    return state


def predict(transformer: "WanTransformer3DModel") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 2, 8, 8, generator=generator).to(transformer.dtype)
    text = torch.randn(2, 6, 8, generator=generator).to(transformer.dtype)
    return transformer(latents, torch.tensor([900.0, 300.0]), text, return_dict=False)[0]
