"""Stage 1 of the embedded model: an AutoencoderKLWan of 2.6 M parameters that sees in time.

The library runs the autoencoder in chunks of four frames with a cache. For training, the same
layers run over the whole clip at once (equal to rounding: `tests/test_make_tiny.py`), four times
fewer and larger kernels, and each step is one CUDA graph.
"""

import logging
import time
import types
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanResample,
    WanRMS_norm,
    WanUpsample,
)
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from tools import world
from tools.graphed import Trainable, graphed_step

log = logging.getLogger(__name__)

SIZE, FRAMES = 64, 13
LATENT_NOISE = 0.06  # standard deviation, in units of the latents' own: what the decoder must bear
# (share of the time, frames, batch): the length of the clips matters more than the number of steps.
CURRICULUM = ((0.05, 1, 512), (0.20, 5, 192), (0.25, 9, 128), (0.50, 13, 96))
REFINEMENT = ((1.0, 13, 64),)  # of a VAE that was trained before


def new_vae() -> AutoencoderKLWan:
    """The Wan 2.1 architecture (z 16, stride 4 x 8 x 8) at width 16, one residual block a stage."""
    return AutoencoderKLWan(base_dim=16, z_dim=16, num_res_blocks=1)


def _whole_clip_resample(layer: WanResample, x: Tensor, *_cache: object, **_more: object) -> Tensor:
    """`WanResample` over a whole clip (B, C, T, H, W): what the cached chunks add up to."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        batch, channels, _, height, width = x.shape
        doubled = layer.time_conv(x[:, :, 1:])  # (B, 2C, T-1, H, W)
        doubled = doubled.view(batch, 2, channels, -1, height, width)
        doubled = torch.stack((doubled[:, 0], doubled[:, 1]), 3)
        x = torch.cat((x[:, :, :1], doubled.reshape(batch, channels, -1, height, width)), 2)
    frames = x.shape[2]
    x = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (-1, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        x = torch.cat((x[:, :, :1], layer.time_conv(x)), 2)
    return x


def _lean_norm(layer: WanRMS_norm, x: Tensor) -> Tensor:
    """`WanRMS_norm` (channels first, no bias) without a copy of x in fp32, which costs most."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x * (layer.scale / length.clamp_min(1e-12)).to(x.dtype) * layer.gamma.to(x.dtype)


def _lean_upsample(layer: WanUpsample, x: Tensor) -> Tensor:
    """`WanUpsample` in the dtype of x: the nearest pixel needs no arithmetic."""
    return F.interpolate(x, scale_factor=layer.scale_factor, mode=layer.mode)


def run_whole_clips(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let `vae.encoder` and `vae.decoder` take whole clips in one call (for training only)."""
    lean = {WanResample: _whole_clip_resample, WanRMS_norm: _lean_norm, WanUpsample: _lean_upsample}
    for layer in vae.modules():
        if type(layer) in lean:
            layer.forward = types.MethodType(lean[type(layer)], layer)
    return vae


def encode_whole(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Posterior mean (B, 16, F, h, w) of whole clips, not normalised."""
    return vae.quant_conv(vae.encoder(video))[:, : vae.config["z_dim"]]


def _loss(vae: AutoencoderKLWan, video: Tensor, latent_noise: Tensor) -> Tensor:
    latents = encode_whole(vae, video)
    spread = latents.detach().float().std()
    noisy = latents + LATENT_NOISE * spread * latent_noise
    rebuilt = vae.decoder(vae.post_quant_conv(noisy)).float()
    error = rebuilt - video
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    size = latents.float().square().mean()  # keeps the scale of the latents from drifting
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-4 * (size - 1).square()


def doodles(video: Tensor, share: float = 0.4) -> Tensor:
    """Recolour a share of the clips and add blobs: an autoencoder knows more than the world."""
    batch, _, frames, height, _ = video.shape
    device = video.device
    chosen = (torch.rand(batch, device=device) < share).view(-1, 1, 1, 1, 1)
    order = torch.stack([torch.randperm(3, device=device) for _ in range(6)])
    shuffled = video.gather(
        1, order[torch.randint(6, (batch,), device=device)].view(batch, 3, 1, 1, 1).expand_as(video)
    )
    axis = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    t = torch.linspace(0, 1, frames, device=device).view(1, -1, 1, 1)
    for _ in range(5):
        number = torch.rand(batch, 8, 1, 1, 1, device=device)
        x = number[:, 0] * 2 - 1 + (number[:, 1] - 0.5) * 1.2 * t
        y = number[:, 2] * 2 - 1 + (number[:, 3] - 0.5) * 1.2 * t
        radius = 0.04 + 0.26 * number[:, 4].square()
        inside = 0.5 - (torch.hypot(u - x, (v - y) * (0.7 + 0.6 * number[:, 5])) - radius) / (
            2.6 / height
        )
        colour = torch.rand(batch, 3, 1, 1, 1, device=device) * 2 - 1
        shuffled = shuffled + (colour - shuffled) * inside.clamp(0, 1)[:, None]
    return torch.where(chosen, shuffled, video)


def random_scenes(batch: int, device: torch.device, zorbi: bool = False) -> Tensor:
    """(B, 9) random scenes drawn on the device, none of them a held-out combination."""
    counts = [len(world.COLOURS), len(world.SHAPES) + zorbi, len(world.ACTIONS)]
    counts += [len(world.SETTINGS), len(world.LIGHTS), len(world.CAMERAS)]
    sizes = torch.tensor(counts, device=device)
    kept_away = world.heldout_table().to(device)
    index = (torch.rand(batch, 6, device=device) * sizes).long()
    for _ in range(8):  # each pass leaves a tenth of what was held out
        taken = kept_away[tuple(index[:, :5].T)]
        again = (torch.rand(batch, 6, device=device) * sizes).long()
        index = torch.where(taken[:, None], again, index)
    number = torch.rand(batch, 3, device=device)
    low, high = (torch.tensor(ends, device=device) for ends in zip(*world.NUMBERS, strict=True))
    return torch.cat((index.float(), low + number * (high - low)), 1)


def train_vae(
    seconds: float, device: torch.device, scale: int = 1, start: AutoencoderKLWan | None = None
) -> AutoencoderKLWan:
    """Train for about `seconds`, or refine `start`; `scale` divides the batches (tests)."""
    torch.manual_seed(0)
    vae = run_whole_clips(start or new_vae()).train()
    vae.to(device)  # pyright: ignore[reportArgumentType] (hidden by a decorator)
    trainable = Trainable([vae], learning_rate=1.2e-3 if start else 2e-3, average=0.995)
    started, passed = time.monotonic(), 0.0
    end = 0.0
    for share, frames, batch in REFINEMENT if start else CURRICULUM:
        batch = max(2, batch // scale)
        end += share * seconds
        steps, loss, step = 0, torch.zeros(()), None
        while passed < end:
            trainable.set_progress(passed / seconds)
            video = world.render(random_scenes(batch, device), FRAMES, SIZE)[:, :, :frames]
            video = doodles(video, share=0.25 if start else 0.4)
            latent_frames = (frames - 1) // 4 + 1
            noise = torch.randn(batch, 16, latent_frames, SIZE // 8, SIZE // 8, device=device)
            if step is None:
                step = graphed_step(partial(_loss, vae), [video, noise], trainable)
            loss = step(video, noise)
            steps += 1
            if steps % 20 == 0 and device.type == "cuda":
                torch.cuda.synchronize()
            passed = time.monotonic() - started
        log.warning(
            "vae: %d frames, %d steps, loss %.4f, %.0f s", frames, steps, loss.item(), passed
        )
    trainable.use_average()
    return vae


@torch.no_grad()
def finish_vae(vae: AutoencoderKLWan, device: torch.device) -> AutoencoderKLWan:
    """Library-run copy in fp32 with the latents' own mean and standard deviation in its config."""
    latents = []
    for _ in range(8):
        video = world.render(random_scenes(64, device), FRAMES, SIZE)
        latents.append(encode_whole(vae, video).float().transpose(0, 1).flatten(1))
    values = torch.cat(latents, 1)  # (16, N)
    mean, std = values.mean(1), values.std(1)
    weights = {key: value.float().contiguous().cpu() for key, value in vae.state_dict().items()}
    # The head's second half is the log variance, which nothing trained: say what was trained with.
    weights["quant_conv.weight"][16:] = 0
    weights["quant_conv.bias"][16:] = 2 * torch.log(LATENT_NOISE * values.std()).cpu()
    finished = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        num_res_blocks=1,
        latents_mean=[round(x, 4) for x in mean.tolist()],
        latents_std=[round(x, 4) for x in std.tolist()],
    )
    finished.load_state_dict(weights)
    finished.to(device)  # pyright: ignore[reportArgumentType] (hidden by a decorator)
    return finished.eval()


@torch.no_grad()
def vae_psnr(vae: AutoencoderKLWan, clips: int, device: torch.device) -> Tensor:
    """PSNR in dB of each frame (T,) on held-out scenes, by the library's own encode and decode.

    Each clip's and frame's PSNR first, then the mean over clips.
    """
    found = []
    batch = world.scenes(clips, seed=123, heldout=True)
    for start in range(0, clips, 32):
        scene = world.scene_tensor(batch[start : start + 32], device)
        video = world.render(scene, FRAMES, SIZE)
        latents = vae.encode(video, return_dict=False)[0].mode()
        rebuilt = vae.decode(latents, return_dict=False)[0]
        error = ((rebuilt - video) / 2).square().mean(dim=(1, 3, 4))  # (B, T) on a 0..1 scale
        found.append(-10 * torch.log10(error))
    return torch.cat(found).mean(0).cpu()


def save_component(
    module: AutoencoderKLWan | WanTransformer3DModel | UMT5EncoderModel, folder: Path
) -> None:
    """Write a library model in fp16 safetensors with its config."""
    module.half()
    module.save_pretrained(folder, safe_serialization=True)
    module.float()
