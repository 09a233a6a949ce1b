"""Videos to latents and back, against the official VAE; in tiles when memory is short."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from tools import world
from wan.latents import decode_latents, encode_video
from wan.variants import TINY_PATH

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


def test_a_video_of_one_tile_is_the_same_in_tiles(
    vae: AutoencoderKLWan, recorded: dict[str, Tensor]
) -> None:
    latents = recorded["latent_T5"]
    assert torch.equal(decode_latents(vae, latents, tiled=True), decode_latents(vae, latents))
    assert not vae.use_tiling


def test_tiles_show_a_little_and_most_near_their_seams() -> None:
    vae = AutoencoderKLWan.from_pretrained(TINY_PATH / "vae", local_files_only=True).eval()
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    picture = world.render(world.scene_tensor(world.scenes(1, seed=5)), frames=1, size=96)
    latents = encode_video(vae, picture)
    whole, tiled = decode_latents(vae, latents), decode_latents(vae, latents, tiled=True)
    assert tiled.shape == whole.shape == picture.shape
    error = (tiled - whole).square()
    assert 0 < error.mean() < 4 * 10**-2.8  # a PSNR above 28 dB, for values in [-1, 1]
    away = torch.ones(96, dtype=torch.bool)
    away[40:72] = False  # tiles overlap from 48 to 64
    assert error[..., ~away, :].mean() > 1.3 * error[..., away, :][..., away].mean()


class _Shortage:
    """A VAE whose decoder runs out of memory in the middle of its first attempts."""

    def __init__(self, vae: AutoencoderKLWan, attempts: int) -> None:
        self.vae, self.frames, self.left = vae, 0, attempts
        self.in_tiles: list[bool] = []
        self.hook = vae.decoder.register_forward_pre_hook(self._fail)

    def _fail(self, *_: object) -> None:
        self.frames += 1
        self.in_tiles.append(self.vae.use_tiling)
        if self.left and self.frames == 2:
            self.frames, self.left = 0, self.left - 1
            raise torch.OutOfMemoryError


def test_a_shortage_of_memory_leads_to_tiles_and_is_told(
    vae: AutoencoderKLWan, recorded: dict[str, Tensor]
) -> None:
    latents, said = recorded["latent_T9"], list[str]()
    expected = decode_latents(vae, latents, say=said.append)
    assert not said
    shortage = _Shortage(vae, attempts=1)
    try:
        assert torch.equal(decode_latents(vae, latents, say=said.append), expected)
    finally:
        shortage.hook.remove()
    assert shortage.in_tiles == [False] * 2 + [True] * 3
    assert len(said) == 1
    assert "not enough memory to decode 3 latent frames of 4x8 at once" in said[0]
    assert not vae.use_tiling


@pytest.mark.parametrize(("attempts", "tiled"), [(2, False), (1, True)])
def test_a_shortage_in_tiles_is_an_error_that_leaves_no_trace(
    vae: AutoencoderKLWan, recorded: dict[str, Tensor], attempts: int, tiled: bool
) -> None:
    shortage = _Shortage(vae, attempts)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            decode_latents(vae, recorded["latent_T9"], tiled)
    finally:
        shortage.hook.remove()
    assert not vae.use_tiling


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
