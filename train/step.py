"""One training step's mathematics: noise level, noise, prediction, loss.

Sigma and noise are functions of (seed, sample): any sample of a run can be made again alone, on any
number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan import flow
from wan.text import pad_text


@dataclass(frozen=True)
class NoiseDraw:
    """How noisy each sample of a batch is, and with what."""

    sigma: Tensor  # (B,) fp32
    noise: Tensor  # (B, C, F, h, w) fp32


def draw_noise(
    law: flow.TimestepLaw,
    sigma_range: flow.SigmaRange,
    shape: Sequence[int],
    seed: int,
    first: int,
    low_discrepancy: bool,
) -> NoiseDraw:
    """Noise for samples `first` to `first + B - 1` of a run, `shape` being (B, C, F, h, w)."""
    batch, *latent_shape = shape
    u = flow.uniforms(seed, first, batch, low_discrepancy)
    noise = [flow.noise_like(latent_shape, seed, first + slot) for slot in range(batch)]
    return NoiseDraw(sigma=law.draw(u, sigma_range), noise=torch.stack(noise))


def velocity_error(
    transformer: WanTransformer3DModel,
    latents: Tensor,
    text: Sequence[Tensor],
    draw: NoiseDraw,
    text_len: int,
) -> Tensor:
    """Mean squared error (B,) in fp32 of the predicted velocity, for each sample.

    `latents` (B, C, F, h, w) are clean, `text` is B embeddings (L_i, D). The model runs in its own
    dtype, as in sampling (no autocast: it would take the time path down to bf16); path, target and
    error stay in fp32 (wan22.md section 3.1).
    """
    device, dtype = transformer.device, transformer.dtype
    x0 = latents.to(device, torch.float32)
    noise, sigma = draw.noise.to(device), draw.sigma.to(device)
    x_sigma = flow.add_noise(x0, noise, sigma)  # (B, C, F, h, w)
    padded = pad_text(text, text_len).to(device, dtype)  # (B, text_len, D)
    predicted = transformer(x_sigma.to(dtype), flow.timestep_of(sigma), padded, return_dict=False)[
        0
    ]
    error = predicted.float() - flow.velocity(x0, noise)
    return error.square().mean(dim=(1, 2, 3, 4))
