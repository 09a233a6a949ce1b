"""What a model is given beside noise and text: an image's channels (I2V-A14B), frame 0 (TI2V-5B).

Images are (B, 3, H, W) in [-1, 1]. Source: `spec/wan22.md` sections 2, 4.2 and 4.3, trap 14.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from wan.latents import encode_video
from wan.variants import Variant

TIME_STRIDE = 4  # pixel frames of a latent frame, but for the first: of both VAEs


@dataclass(frozen=True)
class Condition:
    """The images that videos start from or end with, as the model takes them; None: no image.

    On the device where to sample; a batch of 1 serves all videos.
    """

    channels: Tensor | None = None  # (B, 4 + C, F, h, w): mask and latents, see channels_condition
    first_frame: Tensor | None = None  # (B, C, 1, h, w): see first_frame_latents


def check_condition(
    condition: Condition, variant: Variant, samples: int, shape: tuple[int, int, int, int]
) -> None:
    """`ValueError` if a batch of latents (C, F, h, w) of the variant cannot take the condition."""
    channels, frames, height, width = shape
    if variant.conditioning == "channels" and condition.channels is None:
        raise ValueError(f"{variant.title} makes videos from an image: give it one")
    expected = {
        "channels": (condition.channels, (variant.in_channels - channels, frames, height, width)),
        "first_frame": (condition.first_frame, (channels, 1, height, width)),
    }
    for kind, (given, fitting) in expected.items():
        if given is None:
            continue
        if variant.conditioning != kind:
            raise ValueError(f"{variant.title} takes no image as {kind}")
        if given.shape[1:] != fitting or len(given) not in (1, samples):
            raise ValueError(
                f"the image for {variant.title} is {tuple(given.shape)} as {kind}; expected "
                f"{(samples, *fitting)}, or 1 for all: encode it for the size of the video"
            )
        if frames == 1:
            raise ValueError("a video of 1 frame that is given has nothing left to make")


def mask_channels(frames: int, height: int, width: int, last: bool) -> Tensor:
    """(4, F, h, w): 1 where a pixel frame is given, for F = `frames` latent frames.

    Channel c of latent frame j > 0 is pixel frame 4 (j - 1) + 1 + c; latent frame 0 is one pixel
    frame, four times over. With `last` the last pixel frame is given too, and only it: channel 3.
    """
    given = torch.zeros(TIME_STRIDE, frames)
    given[:, 0] = 1
    if last:
        given[-1, -1] = 1
    return given[:, :, None, None].expand(-1, -1, height, width)


def image_condition(
    vae: AutoencoderKLWan, first: Tensor, last: Tensor | None, frames: int
) -> Tensor:
    """Y, the normalised latents (B, C, F, h, w) in fp32 of `frames` pixel frames with few given.

    `first` and `last` are images (B, 3, H, W); between them, or after `first`, is mid-gray. Without
    `last`, Y for fewer frames is the beginning of Y: encoded once at the longest, it can be cut.
    """
    clip = first.new_zeros(*first.shape[:2], frames, *first.shape[2:])  # (B, 3, T, H, W)
    clip[:, :, 0] = first
    if last is not None:
        clip[:, :, -1] = last
    return encode_video(vae, clip)


def channels_condition(latents: Tensor, last: bool) -> Tensor:
    """(B, 4 + C, F, h, w): the mask and Y (B, C, F, h, w), as they follow the noisy latents."""
    mask = mask_channels(*latents.shape[2:], last=last).to(latents)
    return torch.cat([mask.expand(len(latents), -1, -1, -1, -1), latents], dim=1)


def first_frame_latents(vae: AutoencoderKLWan, image: Tensor) -> Tensor:
    """The clean first latent frame (B, C, 1, h, w) in fp32 of an image (B, 3, H, W)."""
    return encode_video(vae, image[:, :, None])


def i2v_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Height and width of I2V-A14B's video from an image of this size, of at most `area` pixels.

    The shape stays, rounded down to multiples of 16 as the official code rounds: in floats, so that
    832x480 becomes 832x464.
    """
    ratio = height / width
    sizes = math.sqrt(area * ratio), math.sqrt(area / ratio)
    high, wide = (int(size // 8 // 2 * 2) * 8 for size in sizes)
    return high, wide


def ti2v_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Height and width of TI2V-5B's video from an image of this size, of at most `area` pixels.

    Multiples of 32; of rounding the width first or the height first, what keeps the shape better.
    """
    ratio = width / height
    wide = math.sqrt(area * ratio)
    width_first = _floor_32(wide)
    height_first = _floor_32(area / wide)
    candidates = [
        (_floor_32(area / height_first), height_first),
        (width_first, _floor_32(area / width_first)),
    ]  # (width, height); of two equally good ones the first

    def distortion(size: tuple[int, int]) -> float:
        found = size[0] / size[1]
        return max(ratio / found, found / ratio)

    best_width, best_height = min(candidates, key=distortion)
    return best_height, best_width


def _floor_32(pixels: float) -> int:
    return int(pixels // 32 * 32)


def i2v_image(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 pixels (H, W, 3) as an image (1, 3, height, width) of I2V-A14B: stretched, bicubic.

    Not clamped, as in the official code: at sharp edges values leave [-1, 1] a little.
    """
    image = _in_range(pixels)
    return F.interpolate(image, size=(height, width), mode="bicubic")


def ti2v_image(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 pixels (H, W, 3) as an image (1, 3, height, width) of TI2V-5B: filled and cropped."""
    image = Image.fromarray(pixels.cpu().numpy())
    scale = max(width / image.width, height / image.height)
    cover = round(image.width * scale), round(image.height * scale)
    image = image.resize(cover, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    cropped = image.crop((left, top, left + width, top + height))
    levels = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
    return _in_range(levels.view(height, width, 3))


def _in_range(pixels: Tensor) -> Tensor:
    """(1, 3, H, W) in [-1, 1] of uint8 (H, W, 3)."""
    return (pixels.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
