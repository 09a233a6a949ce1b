"""Every kind of picture becomes 8-bit RGB at the shape of its bucket, or is refused with why."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import Bucket, Clip
from data.items import DataError, MediaInfo
from data.media import read_clip
from tests.media_files import ffmpeg, make_item, probe_item


def image_clip(path: Path, height: int, width: int) -> Clip:
    return Clip(make_item(path), Bucket(1, height, width), 0, 0, "keep")


def test_resize_covers_the_bucket_and_keeps_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_clip(image_clip(tmp_path / "a.png", 32, 32)) > 200).all()
    whole = read_clip(image_clip(tmp_path / "a.png", 64, 192))
    assert torch.equal(whole[0], torch.from_numpy(pixels))


def test_resize_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((128, 128)).sum(axis=0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).convert("RGB").save(tmp_path / "a.png")
    grey = read_clip(image_clip(tmp_path / "a.png", 32, 32)).float()
    assert (grey - 127.5).abs().max() < 8


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[274] = 6  # turn it clockwise to view: the left half comes to the top
    image.save(tmp_path / "a.jpg", exif=exif)
    assert probe_item(make_item(tmp_path / "a.jpg")) == MediaInfo(1, 0, 64, 32)
    frame = read_clip(image_clip(tmp_path / "a.jpg", 64, 32))[0]
    assert frame[:24].float().mean() > 240
    assert frame[40:].float().mean() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.convert(mode).save(tmp_path / "a.png")
    frame = read_clip(image_clip(tmp_path / "a.png", 32, 32))[0]
    assert frame.shape == (32, 32, 3)
    assert (frame[:, :16] == 0).all()
    assert (frame[:, 16:] == 255).all()


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 0x8000, np.uint16)).save(tmp_path / "a.png")
    assert (read_clip(image_clip(tmp_path / "a.png", 16, 16)) == 0x80).all()


@pytest.mark.parametrize("layout", ["rgb48be", "rgba64be", "gray16be", "ya16be"])
def test_sixteen_bits_of_every_layout_are_scaled(tmp_path: Path, layout: str) -> None:
    channels = {"rgb48be": 3, "rgba64be": 4, "gray16be": 1, "ya16be": 2}[layout]
    pixels = np.full((16, 16, channels), 0x80FF, ">u2")
    if layout in ("rgba64be", "ya16be"):
        pixels[..., -1] = 0xFFFF
    raw = ("-f", "rawvideo", "-pix_fmt", layout, "-s", "16x16", "-i", "-")
    ffmpeg(*raw, "-frames:v", "1", tmp_path / "a.png", stdin=pixels.tobytes())
    assert (read_clip(image_clip(tmp_path / "a.png", 16, 16)) == 0x80).all()


def test_one_bit_and_palette(tmp_path: Path) -> None:
    Image.new("1", (16, 16), 1).save(tmp_path / "bit.png")
    assert (read_clip(image_clip(tmp_path / "bit.png", 16, 16)) == 255).all()
    Image.new("RGB", (16, 16), (10, 200, 30)).quantize().save(tmp_path / "palette.png")
    frame = read_clip(image_clip(tmp_path / "palette.png", 16, 16))
    assert frame[0, 0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize(("mode", "value"), [("I", 70_000), ("F", 0.5)])
def test_numbers_without_a_white_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    Image.new(mode, (16, 16), value).save(tmp_path / "a.png", format="tiff")
    with pytest.raises(DataError, match=rf"^a\.png: holds 32 bits a pixel \(mode {mode}\), of wh"):
        probe_item(make_item(tmp_path / "a.png"))


def ink_profile() -> bytes:
    """An ICC profile of other inks: the first one prints red, the second black, the others none."""
    corners = [(i // 8, i // 4 % 2) for i in range(16)]  # whether there is first and second ink
    lab = [(0 if black else 255 - 115 * red, 128 + 60 * red, 128) for red, black in corners]
    grid = bytes(value for colour in lab for value in colour)
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + grid + ramp * 3
    header = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    header = header.ljust(128, b"\0")
    body = header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    return struct.pack(">I", len(body)) + body[4:]


def test_inks_are_converted_by_their_profile(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    inks.paste((255, 0, 0, 0), (0, 0, 16, 32))
    inks.save(tmp_path / "plain.jpg", quality=100)
    inks.save(tmp_path / "profile.jpg", quality=100, icc_profile=ink_profile())
    inks.save(tmp_path / "broken.jpg", quality=100, icc_profile=b"no profile")
    for name in ("plain.jpg", "broken.jpg"):
        frame = read_clip(image_clip(tmp_path / name, 32, 32))[0].int()
        assert (frame[0, 31] - torch.tensor([255, 0, 0])).abs().max() < 4
        assert (frame[0, 0] - torch.tensor([0, 255, 255])).abs().max() < 4
    frame = read_clip(image_clip(tmp_path / "profile.jpg", 32, 32))[0].int()
    assert frame[0, 31].sum() < 60  # and not red
    red, green, blue = frame[0, 0].tolist()
    assert red > 200 > 150 > max(green, blue)


def test_huge_picture_is_refused_without_decoding_it(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + bytes(4)

    for size in (9_500, 60_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
        checked = header[:-4] + struct.pack(">I", zlib.crc32(header[4:-4]))
        content = b"\x89PNG\r\n\x1a\n" + checked + chunk(b"IDAT", zlib.compress(bytes(9)))
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"^a\.png: has more than 89 million pixels; make it"):
            probe_item(make_item(tmp_path / "a.png"))


def test_animated_webp_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert probe_item(make_item(tmp_path / "a.webp")) == MediaInfo(1, 0, 32, 32)
    frame = read_clip(image_clip(tmp_path / "a.webp", 32, 32))[0]
    assert frame[3, 3].tolist() == [255, 0, 0]
