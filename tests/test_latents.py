"""Videos to latents and back, against the official VAE."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from wan.latents import decode_latents, encode_video

FIXTURES = Path(__file__).parent / "fixtures"

# spec/wan22.md section 7.4, VAE 2.1
RULES = [
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
]


def diffusers_name(official: str) -> str:
    for pattern, replacement in RULES:
        official = re.sub(pattern, replacement, official)
    return re.sub(r"^decoder\.upsamples\.(\d+)", _up_block, official)


def _up_block(found: re.Match[str]) -> str:
    block, part = divmod(int(found[1]), 4)
    return f"decoder.up_blocks.{block}.{'upsamplers.0' if part == 3 else f'resnets.{part}'}"


@pytest.fixture(scope="module")
def vae(recorded: dict[str, Tensor]) -> AutoencoderKLWan:
    # The fixture normalises with figures of its own: they must come from the config.
    vae = AutoencoderKLWan(
        base_dim=8,
        latents_mean=recorded["mean"].tolist(),
        latents_std=recorded["std"].tolist(),
    ).eval()
    weights = load_file(FIXTURES / "vae21_weights_official.safetensors")
    vae.load_state_dict({diffusers_name(name): weight for name, weight in weights.items()})
    return vae


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURES / "vae21_io.safetensors")


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_latents_equal_the_official_ones(
    vae: AutoencoderKLWan, recorded: dict[str, Tensor], frames: int
) -> None:
    latents = encode_video(vae, recorded[f"video_T{frames}"])
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    assert _relative(latents, recorded[f"latent_T{frames}"]) < 1e-5


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_decoded_video_equals_the_official_one(
    vae: AutoencoderKLWan, recorded: dict[str, Tensor], frames: int
) -> None:
    video = decode_latents(vae, recorded[f"latent_T{frames}"])
    assert _relative(video, recorded[f"decoded_T{frames}"]) < 1e-5


def test_decoded_video_is_clamped(vae: AutoencoderKLWan, recorded: dict[str, Tensor]) -> None:
    video = decode_latents(vae, 100 * recorded["latent_T1"])
    assert video.abs().max() == 1


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_frames_that_would_be_dropped_are_refused(vae: AutoencoderKLWan, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"video of {frames} frames .* 4n\+1"):
        encode_video(vae, torch.zeros(1, 3, frames, 16, 16))


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
