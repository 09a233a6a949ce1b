"""A transformer whose linears are just large enough to stream, and one training step of it."""

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan import lora
from wan.transformer import TEXT_LEN, predict_velocity

LAYERS = 4


def streaming_transformer(
    dropout: float = 0.0, adapted: str = r"blocks\.\d\..*"
) -> WanTransformer3DModel:
    """Four blocks of width 512 in fp32, linears of 1 MiB, some with adapters; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_layers=LAYERS,
            num_attention_heads=4,
            attention_head_dim=128,
            ffn_dim=512,
            freq_dim=32,
            text_dim=32,
            rope_max_seq_len=64,
        )
        names = r"(attn1|attn2)\.to_[qkv]|ffn\.net\.2"
        lora.attach(transformer, 2, 2.0, adapted.replace(".*", f"({names})"), dropout, 0)
        for parameter in lora.adapter_parameters(transformer):
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer.train()


def velocity(transformer: WanTransformer3DModel, frames: int = 1) -> Tensor:
    """At a fixed noisy input of so many latent frames, on the transformer's device."""
    device = transformer.device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, frames, 4, 4, generator=generator)
    text = torch.randn(1, TEXT_LEN, 32, generator=generator)
    timestep = torch.tensor([900.0])
    return predict_velocity(transformer, x.to(device), timestep.to(device), text.to(device))


def loss_and_gradients(transformer: WanTransformer3DModel, frames: int = 1) -> list[Tensor]:
    """The loss of a step and the gradient of each trained tensor, from zero, on the CPU."""
    transformer.zero_grad()
    torch.manual_seed(2)  # of the adapters' dropout
    loss = velocity(transformer, frames).square().mean()
    loss.backward()
    gradients = [p.grad.clone().cpu() for p in transformer.parameters() if p.grad is not None]
    return [loss.detach().cpu(), *gradients]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
