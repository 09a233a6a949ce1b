"""Decoding: real files, made here with ffmpeg and Pillow."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import Bucket, Clip, ClipSettings, Policy, plan_clips
from data.media import frame_indices, probe, probe_all, read_clip
from data.sources import DataError, Item, MediaInfo

STEP = 5  # brightness added by each frame, so that a frame's number can be read from it


def make_item(path: Path) -> Item:
    kind = "image" if path.suffix in (".png", ".jpg") else "video"
    return Item(path, "a caption", kind, path.name)


def ffmpeg(*arguments: str | Path, stdin: bytes = b"") -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-threads", "1"]
    subprocess.run([*command, *map(str, arguments)], input=stdin, check=True)


def make_video(path: Path, frames: int, fps: float, size: tuple[int, int], *options: str) -> Item:
    """A video of `size` (height, width) whose frame i has brightness STEP * i."""
    height, width = size
    pixels = np.repeat(np.arange(frames, dtype=np.uint8) * STEP, height * width * 3)
    options = options or ("-c:v", "libx264", "-crf", "4", "-preset", "ultrafast")
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps),
        "-i", "-", *options, path, stdin=pixels.tobytes(),
    )  # fmt: skip
    return make_item(path)


def clip_of(item: Item, frames: int, fps: float = 8, policy: Policy = "resample") -> Clip:
    settings = ClipSettings((32, 48), frames, fps, policy, 16, 4, "head")
    return plan_clips([item], [probe(item)], settings)[0]


def numbers_of(clip: Clip) -> list[int]:
    """The numbers of the source frames that a clip shows, read from their brightness."""
    brightness = read_clip(clip).float().mean(dim=(1, 2, 3))  # (T,)
    return (brightness / STEP).round().int().tolist()


def test_probe_of_video_and_image(tmp_path: Path) -> None:
    Image.new("RGB", (63, 47)).save(tmp_path / "a.png")
    assert probe(make_item(tmp_path / "a.png")) == MediaInfo(1, 0, 47, 63)
    video = make_video(tmp_path / "🎈 ñ 日本.mp4", 24, 24, (32, 48))
    assert probe(video) == MediaInfo(24, 24, 32, 48)


def test_odd_sizes_and_one_frame(tmp_path: Path) -> None:
    item = make_video(tmp_path / "a.mp4", 1, 24, (47, 63), "-c:v", "libx264", "-pix_fmt", "yuv444p")
    assert probe(item) == MediaInfo(1, 24, 47, 63)
    assert read_clip(clip_of(item, 17)).shape == (1, 32, 48, 3)


@pytest.mark.parametrize("width", [16, 24, 48, 50, 72, 426])
def test_pixels_are_in_place_at_any_width(tmp_path: Path, width: int) -> None:
    pixels = np.zeros((3, 32, width, 3), np.uint8)
    pixels[:, :, width // 2 :] = 255
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x32", "-r", "8", "-i", "-",
        "-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv444p", tmp_path / "a.mp4",
        stdin=pixels.tobytes(),
    )  # fmt: skip
    item = make_item(tmp_path / "a.mp4")
    frames = read_clip(Clip(item, Bucket(1, 32, width), 0, 8, "keep"))
    assert (frames[0].int() - torch.from_numpy(pixels[0]).int()).abs().max() < 16


def test_resample_picks_frames_by_time(tmp_path: Path) -> None:
    item = make_video(tmp_path / "a.mp4", 48, 24, (32, 48))
    frames = read_clip(clip_of(item, 13))
    assert frames.dtype == torch.uint8
    assert frames.shape == (13, 32, 48, 3)
    assert numbers_of(clip_of(item, 13)) == list(range(0, 39, 3))
    assert numbers_of(clip_of(item, 99)) == list(range(0, 39, 3))  # 16 at 8 fps: 13 of 4n+1
    assert numbers_of(clip_of(item, 13, policy="keep")) == list(range(13))
    assert numbers_of(clip_of(item, 5, fps=48)) == [0, 0, 1, 1, 2]  # ties go to the earlier one


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mov", ".avi"])
def test_other_containers_give_the_same_frames(tmp_path: Path, suffix: str) -> None:
    codec = {".webm": ("-c:v", "libvpx-vp9", "-crf", "10", "-cpu-used", "8"), ".avi": ("-q:v", "2")}
    item = make_video(tmp_path / f"a{suffix}", 24, 24, (32, 48), *codec.get(suffix, ()))
    assert probe(item) == MediaInfo(24, 24, 32, 48)
    assert numbers_of(clip_of(item, 9, fps=16)) == [0, 1, 3, 4, 6, 7, 9, 10, 12]


def test_gif_is_a_video(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (48, 32), (STEP * i,) * 3) for i in range(20)]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)
    assert probe(make_item(path)) == MediaInfo(20, 20, 32, 48)
    assert numbers_of(clip_of(make_item(path), 5, fps=10)) == [0, 2, 4, 6, 8]


def test_variable_rate_is_read_by_its_timestamps(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 48, 24, (32, 48))
    fewer = "select='lt(n,12)+not(mod(n,6))'"  # 24 fps for half a second, then 4 fps
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", fewer, "-fps_mode", "vfr", tmp_path / "b.mkv")
    item = make_item(tmp_path / "b.mkv")
    info = probe(item)
    assert info.frames == 18
    assert info.frames / info.fps == pytest.approx(43 / 24, abs=0.01)
    assert numbers_of(clip_of(item, 13)) == [0, 3, 6, 9, 12, 12, 18, 18, 24, 24, 30, 30, 36]


def test_rotation_is_applied(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 2, 8, (64, 128))
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    assert probe(make_item(tmp_path / "b.mp4")) == MediaInfo(2, 8, 128, 64)


def test_windows_begin_at_their_start() -> None:
    times = np.arange(48) / 24
    item = Item(Path("a.mp4"), "a", "video", "a.mp4")
    resampled = Clip(item, Bucket(5, 16, 16), 0.5, 8, "resample")
    assert frame_indices(times, resampled) == [12, 15, 18, 21, 24]
    kept = Clip(item, Bucket(5, 16, 16), 43 / 24, 24, "keep")
    assert frame_indices(times, kept) == [43, 44, 45, 46, 47]


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
    assert probe(make_item(tmp_path / "a.jpg")) == MediaInfo(1, 0, 64, 32)
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


def test_unreadable_files_are_named_with_what_was_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 99)
    whole = make_video(tmp_path / "whole.mp4", 24, 24, (32, 48))
    (tmp_path / "cut.mp4").write_bytes(whole.path.read_bytes()[:1500])
    (tmp_path / "no.gif").write_bytes(b"GIF89a\0\0")
    names = ["whole.mp4", "zero.mp4", "text.mp4", "cut.mp4", "no.gif", "cut.png", "whole.png"]
    with pytest.raises(DataError) as caught:
        probe_all([make_item(tmp_path / name) for name in names])
    message = str(caught.value)
    assert "5 problems" in message
    assert "zero.mp4: is empty (0 bytes)" in message
    assert "text.mp4: holds text ('hello" in message
    assert "cut.mp4: is damaged or cut short" in message
    assert f"ffmpeg -i {tmp_path / 'cut.mp4'} fixed.mp4" in message
    assert "no.gif: is damaged or cut short" in message
    assert "cut.png: is damaged or cut short" in message
    assert "whole" not in message


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / "a.mp4")
    with pytest.raises(DataError, match=r"a\.mp4: holds no video stream"):
        probe(make_item(tmp_path / "a.mp4"))


def test_missing_tail_is_found_before_training(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
    ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-r", "24", "-i", "-",
        "-c:v", "libx264", "-preset", "ultrafast", "-movflags", "faststart", tmp_path / "a.mp4",
        stdin=noise.tobytes(),
    )  # fmt: skip
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(DataError, match=r"a\.mp4: .*cut short"):
        probe(make_item(tmp_path / "a.mp4"))


def test_file_that_vanished_is_named_when_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mp4: cannot be opened \(No such file"):
        read_clip(Clip(make_item(tmp_path / "a.mp4"), Bucket(1, 16, 16), 0, 8, "keep"))
