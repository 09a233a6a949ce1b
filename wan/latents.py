"""Videos to normalised latents and back.

Latents are the posterior's mean (never a sample), normalised for each channel with the figures of
the VAE's own config. Source: `spec/wan22.md` sections 1.3 and 2, traps 13 and 15.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
def decode_latents(
    vae: AutoencoderKLWan,
    latents: Tensor,
    tiled: bool = False,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """The video (B, 3, T, H, W) in [-1, 1], fp32, of normalised latents (B, C, F, h, w).

    `tiled` decodes overlapping tiles of 256 pixels one after the other: a fraction of the memory,
    and pixels that differ a little, most of all near seams. When memory runs out without it, the
    decoding is done again with it, and `say` is told.
    """
    mean, std = _statistics(vae)
    latents = (latents.to(vae.device, torch.float32) * std + mean).to(vae.dtype)
    if not tiled:
        try:
            return _decode(vae, latents)
        except torch.OutOfMemoryError:
            pass  # the error holds on to the tensors of the attempt until this block is left
        vae.clear_cache()  # the frames that a decoder keeps for the next one
        torch.cuda.empty_cache()
        if say is not None:
            frames, height, width = latents.shape[2:]
            say(
                f"not enough memory to decode {frames} latent frames of {height}x{width} at once: "
                "they are decoded in tiles, which shows a little near their seams"
            )
    with _tiling(vae):
        return _decode(vae, latents)


def _decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)


@contextmanager
def _tiling(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within the block the VAE works in tiles."""
    was_tiling = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = was_tiling


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, (C, 1, 1, 1) each."""
    figures = [vae.config["latents_mean"], vae.config["latents_std"]]
    mean, std = torch.tensor(figures, device=vae.device).view(2, -1, 1, 1, 1)
    return mean, std
