"""Copies of the demo's clips are found, and no two of its clips are taken for one."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tools.near_duplicates import Duplicates, find_duplicates, look_of

DEMO = Path(__file__).parent.parent / "datasets" / "demo"
FILES = sorted(path for path in DEMO.rglob("*") if path.suffix in (".mp4", ".png"))
VIDEOS = [path for path in FILES if path.suffix == ".mp4"]


def frames_of(path: Path) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def looks_of(paths: Sequence[Path]) -> np.ndarray:
    return np.stack([look_of(frames_of(path)) for path in paths])


def names(count: int) -> list[str]:
    return [f"digest {index}" for index in range(count)]


@pytest.fixture(scope="module")
def demo() -> np.ndarray:
    return looks_of(FILES)


def test_different_clips_are_not_taken_for_one(demo: np.ndarray) -> None:
    assert len(demo) == 57
    assert find_duplicates(names(len(demo)), demo) == []


@pytest.mark.parametrize(
    "change",
    [
        ("-crf", "35"),
        ("-vf", "scale=32:32"),
        ("-vf", "scale=160:160"),
        ("-vf", "eq=brightness=0.1"),
        ("-vf", "eq=gamma=1.3:contrast=0.85"),
    ],
    ids=lambda change: change[1],
)
def test_a_changed_copy_is_found(change: tuple[str, str], demo: np.ndarray, tmp_path: Path) -> None:
    chosen = VIDEOS[::5]
    for index, path in enumerate(chosen):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-threads", "1"]
        subprocess.run([*command, *change, tmp_path / f"{index:02}.mp4"], check=True)
    copies = looks_of(sorted(tmp_path.glob("*.mp4")))
    found = find_duplicates(names(len(demo) + len(copies)), np.concatenate([demo, copies]))
    wanted = [(FILES.index(path), len(demo) + index) for index, path in enumerate(chosen)]
    assert found == [Duplicates(pair, exact=False) for pair in wanted]


def test_equal_bytes_are_found_by_digest_whatever_they_show() -> None:
    nothing = np.zeros((4, 12), np.float32)
    assert find_duplicates(["a", "", "a", ""], nothing) == [Duplicates((0, 2), exact=True)]


def test_groups_join_what_is_alike_through_a_third() -> None:
    angles = np.radians([0, 9, 18, 90])  # cos 9° = 0.988, cos 18° = 0.951
    looks = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert find_duplicates(names(4), looks) == [Duplicates((0, 1, 2), exact=False)]
    two = find_duplicates(["a", "b", "c", "c"], looks)
    assert two == [Duplicates((0, 1, 2, 3), exact=False)]


def test_a_pair_is_found_across_blocks() -> None:
    generator = np.random.default_rng(0)
    looks = generator.standard_normal((2500, 64)).astype(np.float32)
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    looks[2400] = looks[3]
    looks[1024:1026] = looks[1023]  # over the edge of a block
    found = find_duplicates(names(2500), looks)
    assert [group.members for group in found] == [(3, 2400), (1023, 1024, 1025)]


def test_frames_of_one_grey_look_like_nothing() -> None:
    grey = np.full((5, 32, 48, 3), 80, np.uint8)
    grey[2, 3, 4] += 9  # one pixel of noise
    assert not look_of(grey).any()


def test_a_still_is_alike_its_image() -> None:
    image = frames_of(next(path for path in FILES if path.suffix == ".png"))
    still = np.repeat(image, 7, axis=0)
    assert look_of(still) @ look_of(image) == pytest.approx(1)
