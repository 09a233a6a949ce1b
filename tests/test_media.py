"""Decoding: real files, made here with ffmpeg and Pillow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import Bucket, Clip, ClipSettings, Policy, plan_clips
from data.items import DataError, Item, MediaInfo
from data.media import frame_indices, read_clip
from tests.media_files import STEP, encode, ffmpeg, make_item, make_video, probe_item


def clip_of(item: Item, frames: int, fps: float = 8, policy: Policy = "resample") -> Clip:
    settings = ClipSettings((32, 48), frames, fps, policy, 16, 4, "head")
    (clip,) = plan_clips([item], [probe_item(item)], settings).clips
    return clip


def numbers_of(clip: Clip) -> list[int]:
    """The numbers of the source frames that a clip shows, read from their brightness."""
    brightness = read_clip(clip).float().mean(dim=(1, 2, 3))  # (T,)
    return (brightness / STEP).round().int().tolist()


def test_probe_of_video_and_image(tmp_path: Path) -> None:
    Image.new("RGB", (63, 47)).save(tmp_path / "a.png")
    assert probe_item(make_item(tmp_path / "a.png")) == MediaInfo(1, 0, 47, 63)
    video = make_video(tmp_path / "🎈 ñ 日本.mp4", 24, 24, (32, 48))
    assert probe_item(video) == MediaInfo(24, 24, 32, 48)


def test_odd_sizes_and_one_frame(tmp_path: Path) -> None:
    item = make_video(tmp_path / "a.mp4", 1, 24, (47, 63), "-c:v", "libx264", "-pix_fmt", "yuv444p")
    assert probe_item(item) == MediaInfo(1, 24, 47, 63)
    assert read_clip(clip_of(item, 17)).shape == (1, 32, 48, 3)


@pytest.mark.parametrize("width", [16, 24, 48, 50, 72, 426])
def test_pixels_are_in_place_at_any_width(tmp_path: Path, width: int) -> None:
    pixels = np.zeros((3, 32, width, 3), np.uint8)
    pixels[:, :, width // 2 :] = 255
    encode(tmp_path / "a.mp4", pixels)
    item = make_item(tmp_path / "a.mp4")
    frames = read_clip(Clip(item, Bucket(1, 32, width), 0, 8, "keep"))
    assert (frames[0].int() - torch.from_numpy(pixels[0]).int()).abs().max() < 16


def test_names_of_any_kind(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 250) / ("e" * 250) / "a b'c"
    folder.mkdir(parents=True)
    for name in ("🎈 ñ 日本.mp4", "%d #1?.mp4", "-i.mp4", f"{'f' * 250}.mp4"):
        make_video(tmp_path / "plain.mp4", 2, 8, (16, 16))
        (tmp_path / "plain.mp4").rename(folder / name)
        assert probe_item(make_item(folder / name)) == MediaInfo(2, 8, 16, 16)


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
    assert probe_item(item) == MediaInfo(24, 24, 32, 48)
    assert numbers_of(clip_of(item, 9, fps=16)) == [0, 1, 3, 4, 6, 7, 9, 10, 12]


def test_gif_is_a_video(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (48, 32), (STEP * i,) * 3) for i in range(20)]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)
    assert probe_item(make_item(path)) == MediaInfo(20, 20, 32, 48)
    assert numbers_of(clip_of(make_item(path), 5, fps=10)) == [0, 2, 4, 6, 8]


def test_variable_rate_is_read_by_its_timestamps(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 48, 24, (32, 48))
    fewer = "select='lt(n,12)+not(mod(n,6))'"  # 24 fps for half a second, then 4 fps
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", fewer, "-fps_mode", "vfr", tmp_path / "b.mkv")
    item = make_item(tmp_path / "b.mkv")
    info = probe_item(item)
    assert info.frames == 18
    assert info.frames / info.fps == pytest.approx(43 / 24, abs=0.01)
    assert numbers_of(clip_of(item, 13)) == [0, 3, 6, 9, 12, 12, 18, 18, 24, 24, 30, 30, 36]


@pytest.mark.parametrize("size", [(64, 128), (32, 72)])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, size: tuple[int, int], degrees: int) -> None:
    height, width = size
    pixels = np.zeros((2, height, width, 3), np.uint8)  # four colours, one in each quarter
    pixels[:, : height // 2, :, 0] = pixels[:, :, : width // 2, 1] = 255
    encode(tmp_path / "a.mp4", pixels)
    turn = ("-display_rotation", str(degrees))  # counterclockwise, for who shows it
    ffmpeg(*turn, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mp4")
    expected = torch.from_numpy(np.rot90(pixels[0], degrees // 90).copy())
    item = make_item(tmp_path / "b.mp4")
    assert probe_item(item) == MediaInfo(2, 8, *expected.shape[:2])
    frames = read_clip(Clip(item, Bucket(1, *expected.shape[:2]), 0, 8, "keep"))
    assert (frames[0].int() - expected.int()).abs().max() < 16


def test_windows_begin_at_their_start() -> None:
    times = np.arange(48) / 24
    item = Item(Path("a.mp4"), ("a",), "video", "a.mp4")
    resampled = Clip(item, Bucket(5, 16, 16), 0.5, 8, "resample")
    assert frame_indices(times, resampled) == [12, 15, 18, 21, 24]
    kept = Clip(item, Bucket(5, 16, 16), 43 / 24, 24, "keep")
    assert frame_indices(times, kept) == [43, 44, 45, 46, 47]


def problem_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        probe_item(make_item(path))
    return str(caught.value)


def test_unreadable_files_are_named_with_what_was_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello\n" * 99)
    whole = make_video(tmp_path / "whole.mp4", 24, 24, (32, 48))
    (tmp_path / "cut.mp4").write_bytes(whole.path.read_bytes()[:1500])
    (tmp_path / "no.gif").write_bytes(b"GIF89a\0\0")
    assert problem_of(tmp_path / "zero.mp4").startswith("zero.mp4: is empty (0 bytes)")
    assert problem_of(tmp_path / "text.mp4").startswith("text.mp4: holds text ('hello")
    cut = problem_of(tmp_path / "cut.mp4")
    assert cut.startswith("cut.mp4: is damaged or cut short")
    assert f"ffmpeg -i {tmp_path / 'cut.mp4'} fixed.mp4" in cut
    assert problem_of(tmp_path / "no.gif").startswith("no.gif: is damaged or cut short")
    assert problem_of(tmp_path / "cut.png").startswith("cut.png: is damaged or cut short")
    for name in ("whole.png", "whole.mp4"):
        assert probe_item(make_item(tmp_path / name)).frames > 0


def test_videos_that_decord_cannot_decode_are_named_with_the_mend(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / "sound.mp4")
    make_video(tmp_path / "new.mp4", 2, 8, (64, 64), "-c:v", "libaom-av1", "-cpu-used", "8")
    for name in ("sound.mp4", "new.mp4"):
        problem = problem_of(tmp_path / name)
        assert problem.startswith(f"{name}: holds no video stream that decord can decode (it has")
        assert "re-encode what is left with `ffmpeg -i " in problem


def test_missing_tail_is_found_before_training(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8)
    encode(tmp_path / "a.mp4", noise, "-c:v", "libx264", "-movflags", "faststart")
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) * 6 // 10])
    assert "cut short" in problem_of(tmp_path / "a.mp4")


def test_nothing_after_the_end_of_a_window_is_shown(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4", 16, 4, (32, 48))
    part = replace(video, start=1.0, end=2.0)  # frames 4 to 7
    # The frame nearest to the last instants, at 1.9 s, is that of 2 s.
    assert numbers_of(clip_of(part, 99, fps=24)) == [4] * 4 + [5] * 6 + [6] * 6 + [7] * 5
    assert numbers_of(clip_of(part, 99, fps=4)) == [4]
    whole = numbers_of(clip_of(video, 99, fps=24))
    assert whole[24:45] == [4] * 4 + [5] * 6 + [6] * 6 + [7] * 5


def test_file_that_vanished_is_named_when_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mp4: cannot be opened \(No such file"):
        read_clip(Clip(make_item(tmp_path / "a.mp4"), Bucket(1, 16, 16), 0, 8, "keep"))
