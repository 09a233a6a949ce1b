"""Videos to normalised latents and back.

Latents are the posterior's mean (never a sample), normalised for each channel with the figures of
the VAE's own config. Source: `spec/wan22.md` sections 1.3 and 2, traps 13 and 15.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents (B, C, F, h, w) in fp32 of a video (B, 3, T, H, W) in [-1, 1].

    `ValueError` unless T is 4n+1: the VAE would silently drop the last frames.
    """
    frames, stride = video.shape[2], vae.config["scale_factor_temporal"]
    if (frames - 1) % stride:
        raise ValueError(
            f"a video of {frames} frames cannot be encoded: the number of frames must be "
            f"{stride}n+1, such as {frames - (frames - 1) % stride}"
        )
    posterior = vae.encode(video.to(vae.device, vae.dtype), return_dict=False)[0]
    latents = posterior.mode().float()
    mean, std = _statistics(vae)
    return (latents - mean) / std


@torch.no_grad()
def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The video (B, 3, T, H, W) in [-1, 1], fp32, of normalised latents (B, C, F, h, w)."""
    mean, std = _statistics(vae)
    latents = latents.to(vae.device, torch.float32) * std + mean
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, (C, 1, 1, 1) each."""
    figures = [vae.config["latents_mean"], vae.config["latents_std"]]
    mean, std = torch.tensor(figures, device=vae.device).view(2, -1, 1, 1, 1)
    return mean, std
