"""What a model is given beside noise and text: masks, images as latents, sizes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small_vae
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from wan.conditioning import (
    Condition,
    channels_condition,
    check_condition,
    first_frame_latents,
    i2v_image,
    i2v_size,
    image_condition,
    mask_channels,
    ti2v_image,
    ti2v_size,
)
from wan.latents import encode_video
from wan.variants import VAE_21, VAE_22, variant

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden.json").read_text())
T2V, I2V, TI2V = variant("t2v_a14b"), variant("i2v_a14b"), variant("ti2v_5b")
IMAGES = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
FIRST, LAST = IMAGES.chunk(2)  # two samples each


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return small_vae(VAE_21).eval()


def test_the_mask_of_a_first_frame_is_the_official_one() -> None:
    mask = mask_channels(5, 2, 3, last=False)
    assert mask.shape == (4, 5, 2, 3)
    assert mask[:, :, 1, 2].tolist() == GOLDEN["i2v_mask_channels_by_latent_frame"]
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))


@pytest.mark.parametrize("last", [False, True])
def test_the_mask_says_which_pixel_frames_are_given(last: bool) -> None:
    # spec/wan22.md section 4.2: entry 0 four times, then one for each pixel frame
    given = [1.0] * 4 + [0.0] * 15 + [float(last)]
    channels_by_frame = torch.tensor(given).view(5, 4).T
    assert torch.equal(mask_channels(5, 1, 1, last)[:, :, 0, 0], channels_by_frame)
    assert mask_channels(5, 1, 1, last)[:, -1].flatten().tolist() == [0, 0, 0, last]


@pytest.mark.parametrize("with_last", [False, True])
def test_the_condition_is_the_encoded_clip_between_the_images(
    vae: AutoencoderKLWan, with_last: bool
) -> None:
    clip = torch.zeros(2, 3, 9, 32, 48)
    clip[:, :, 0] = FIRST
    if with_last:
        clip[:, :, 8] = LAST
    found = image_condition(vae, FIRST, LAST if with_last else None, 9)
    assert found.shape == (2, 16, 3, 4, 6)
    assert found.dtype == torch.float32
    assert torch.equal(found, encode_video(vae, clip))


def test_the_condition_of_fewer_frames_is_its_beginning(vae: AutoencoderKLWan) -> None:
    longest = image_condition(vae, FIRST, None, 13)
    for frames in (1, 5, 9):
        latents = (frames - 1) // 4 + 1
        torch.testing.assert_close(
            image_condition(vae, FIRST, None, frames), longest[:, :, :latents], rtol=0, atol=1e-5
        )
    # Not gray after the first frame: latents of zeros in its place would be another condition.
    assert _relative(longest[:, :, 1], image_condition(vae, LAST, None, 13)[:, :, 1]) > 1e-3


def test_the_channels_are_the_mask_and_then_the_latents() -> None:
    latents = torch.randn(2, 16, 3, 4, 6)
    channels = channels_condition(latents, last=True)
    assert channels.shape == (2, 20, 3, 4, 6)
    for sample in channels:
        assert torch.equal(sample[:4], mask_channels(3, 4, 6, last=True))
    assert torch.equal(channels[:, 4:], latents)


def test_the_first_frame_is_that_of_any_video_that_starts_with_it() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = small_vae(VAE_22).eval()
    image = FIRST[:1, :, :, :32]
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    video[:, :, 0] = image
    found = first_frame_latents(vae, image)
    assert found.shape == (1, 48, 1, 2, 2)
    torch.testing.assert_close(found, encode_video(vae, video)[:, :, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((480, 832), 480 * 832, (464, 832)),  # official floats lose a row of blocks
        ((720, 1280), 720 * 1280, (720, 1280)),
        ((1000, 1000), 720 * 1280, (960, 960)),
    ],
)
def test_sizes_of_i2v_are_the_official_ones(
    size: tuple[int, int], area: int, expected: tuple[int, int]
) -> None:
    assert i2v_size(*size, area) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((720, 1280), (704, 1248)),
        ((1080, 1920), (704, 1248)),
        ((1024, 1024), (928, 960)),
        ((1500, 1000), (1152, 768)),
    ],
)
def test_sizes_of_ti2v_are_the_official_ones(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert ti2v_size(*size, 704 * 1280) == expected


def test_every_size_fits_its_model_and_its_area() -> None:
    for height in range(90, 2000, 170):
        for width in range(90, 2000, 130):
            high, wide = i2v_size(height, width, 480 * 832)
            assert high % I2V.geometry.multiple == wide % I2V.geometry.multiple == 0
            assert 0 < high * wide <= 480 * 832
            high, wide = ti2v_size(height, width, 704 * 1280)
            assert high % TI2V.geometry.multiple == wide % TI2V.geometry.multiple == 0
            assert 0 < high * wide <= 704 * 1280


def _stripes(height: int, width: int) -> Tensor:
    """uint8 (H, W, 3): the red channel says the column, the green one the row."""
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    pixels[..., 0] = torch.linspace(0, 255, width).byte()
    pixels[..., 1] = torch.linspace(0, 255, height).byte()[:, None]
    return pixels


def test_an_image_of_i2v_is_stretched_over_the_whole_size() -> None:
    image = i2v_image(_stripes(40, 100), 32, 48)
    assert image.shape == (1, 3, 32, 48)
    assert image[0, 0, :, 0].max() < -0.95  # the left edge of the picture is still there
    assert image[0, 0, :, -1].min() > 0.95
    assert image[0, 1, 0].max() < -0.9
    torch.testing.assert_close(image[0, 2], torch.full((32, 48), -1.0))
    edge = torch.zeros(8, 8, 3, dtype=torch.uint8)
    edge[:, 4:] = 255
    assert i2v_image(edge, 16, 16).max() > 1.05  # bicubic swings over, and is not clamped
    same = i2v_image(_stripes(32, 48), 32, 48)
    torch.testing.assert_close(same[0].permute(1, 2, 0), _stripes(32, 48) / 127.5 - 1)


def test_an_image_of_ti2v_fills_the_size_and_is_cropped_in_the_middle() -> None:
    pixels = _stripes(40, 100)
    image = ti2v_image(pixels, 32, 48)  # at 80x32, of which the middle 48 columns stay
    whole = Image.fromarray(pixels.numpy()).resize((80, 32), Image.Resampling.LANCZOS)
    middle = torch.tensor([*whole.crop((16, 0, 64, 32)).getdata()]).view(1, 32, 48, 3)
    assert image.shape == (1, 3, 32, 48)
    torch.testing.assert_close(image.permute(0, 2, 3, 1), middle / 127.5 - 1)
    assert image[0, 0, 0, 0] == pytest.approx(-0.6, abs=0.03)
    assert image[0, 0, 0, -1] == pytest.approx(0.6, abs=0.03)


SHAPE = (16, 3, 4, 6)  # latents of 9 frames of 32x48
CHANNELS = torch.zeros(1, 20, 3, 4, 6)
FRAME = torch.zeros(2, 48, 1, 4, 6)


def test_conditions_that_fit_are_taken() -> None:
    check_condition(Condition(), T2V, 2, SHAPE)
    check_condition(Condition(channels=CHANNELS), I2V, 2, SHAPE)
    check_condition(Condition(first_frame=FRAME), TI2V, 2, (48, 3, 4, 6))
    check_condition(Condition(), TI2V, 2, (48, 3, 4, 6))


@pytest.mark.parametrize(
    ("condition", "name", "frames", "message"),
    [
        (Condition(), "i2v_a14b", 3, "I2V-A14B makes videos from an image: give it one"),
        (Condition(channels=CHANNELS), "t2v_a14b", 3, "takes no image as channels"),
        (Condition(channels=CHANNELS), "ti2v_5b", 3, "takes no image as channels"),
        (Condition(CHANNELS, FRAME), "i2v_a14b", 3, "takes no image as first_frame"),
        (Condition(channels=CHANNELS), "i2v_a14b", 4, r"\(1, 20, 3, 4, 6\) .* \(3, 20, 4, 4, 6\)"),
        (Condition(channels=CHANNELS[:, 4:]), "i2v_a14b", 3, r"\(1, 16, 3, 4, 6\) as channels"),
        (Condition(first_frame=FRAME), "ti2v_5b", 3, r"expected \(3, 48, 1, 4, 6\), or 1 for all"),
        (Condition(first_frame=FRAME[:1]), "ti2v_5b", 1, "1 frame that is given"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(
    condition: Condition, name: str, frames: int, message: str
) -> None:
    facts = variant(name)
    with pytest.raises(ValueError, match=message):
        check_condition(condition, facts, 3, (facts.geometry.channels, frames, 4, 6))


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
