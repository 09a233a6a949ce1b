"""Videos fit into the page: as they are, smaller, or the most important of them."""

from base64 import b64decode
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from run_folders import ADAPTED_COLOUR, BASE_COLOUR, film, make_run, noise_film

from tools.report_page import write_page
from tools.report_runs import read_record
from tools.report_samples import films_by_importance, shots_of
from tools.report_videos import SMALLEST, Film, Packed, pack
from train.video_files import side_by_side, write_mp4


def pixels(video: Packed, folder: Path) -> np.ndarray:
    """The frames of a packed video, uint8 (T, H, W, 3)."""
    path = folder / "packed.mp4"
    path.write_bytes(b64decode(video.text))
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_what_fits_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, film((9, 9, 9)), 8)
    reel = pack([Film(path), Film(path)], 4 * SMALLEST)
    assert b64decode(reel.videos[Film(path)].text) == path.read_bytes()
    assert (reel.reduced, reel.left_out) == (0, 0)


def test_the_base_is_the_left_of_a_comparison(tmp_path: Path) -> None:
    alone, compared = tmp_path / "alone.mp4", tmp_path / "compared.mp4"
    base, adapted = film(BASE_COLOUR), film(ADAPTED_COLOUR)
    write_mp4(alone, adapted, 8)
    write_mp4(compared, side_by_side([base, adapted], ["base", "adapters"]), 8)
    (packed,) = pack([Film(compared, size_of=alone)], 10**6).videos.values()
    frames = pixels(packed, tmp_path)
    assert frames.shape == base.shape
    assert (packed.height, packed.width) == base.shape[1:3]
    assert np.abs(frames.astype(int) - base).mean() < 4


def test_large_videos_share_what_small_ones_leave(tmp_path: Path) -> None:
    paths = [noise_film(tmp_path / f"{seed}.mp4", seed) for seed in range(2)]
    write_mp4(tmp_path / "small.mp4", film((9, 9, 9)), 8)
    sizes = [path.stat().st_size for path in paths]
    room = 4 * SMALLEST
    assert sum(sizes) * 4 // 3 > room
    reel = pack([Film(path) for path in (*paths, tmp_path / "small.mp4")], room)
    assert (len(reel.videos), reel.reduced, reel.left_out) == (3, 2, 0)
    assert sum(len(video.text) for video in reel.videos.values()) <= room
    small = reel.videos[Film(tmp_path / "small.mp4")]
    assert b64decode(small.text) == (tmp_path / "small.mp4").read_bytes()
    assert len(pixels(reel.videos[Film(paths[0])], tmp_path)) == 9


def test_the_most_important_are_kept(tmp_path: Path) -> None:
    films = [Film(noise_film(tmp_path / f"{seed}.mp4", seed)) for seed in range(4)]
    reel = pack(films, 2 * 4 * SMALLEST // 3)
    assert set(reel.videos) <= set(films[:2])
    assert reel.left_out == 4 - len(reel.videos)
    assert not pack(films, 0).videos


def test_what_cannot_be_decoded_is_passed_over(tmp_path: Path) -> None:
    broken = tmp_path / "half.mp4"
    write_mp4(tmp_path / "a.mp4", film((9, 9, 9)), 8)
    broken.write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    good = Film(tmp_path / "a.mp4")
    reel = pack([Film(broken), Film(tmp_path / "none.mp4"), good], 10**6)
    assert list(reel.videos) == [good]


def test_the_last_samples_come_before_older_ones(tmp_path: Path) -> None:
    records = [read_record(make_run(tmp_path / "fox", samples=[10, 20, 30], finished=False))]
    films = films_by_importance(records, shots_of(records))
    names = [f"{film.path.parent.name} {film.path.stem}" for film in films]
    assert names == [
        f"step_{step:06d} {shot}_{kind}"
        for step, kind in [
            (30, "base_and_adapters"), (30, "adapters"), (20, "adapters"), (10, "adapters"),
        ]
        for shot in ("00", "01")
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [450_000, 2_000_000])
def test_a_page_stays_under_its_limit_and_says_what_it_did(limit: int, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", samples=[10, 20, 30], finished=False)
    for place, path in enumerate(sorted(folder.glob("samples/*/*_adapters.mp4"))):
        if "base" not in path.stem:
            noise_film(path, place)
    write_page(tmp_path / "page.html", [read_record(folder)], limit)
    size = (tmp_path / "page.html").stat().st_size
    text = (tmp_path / "page.html").read_text()
    assert size < limit
    assert text.count("<video") >= 4
    assert ("older ones were left out" in text) == (limit == 450_000)
    assert ("made smaller" in text) == (limit == 450_000)


def test_a_long_history_makes_a_small_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "fox", steps=40_000, samples=[], finished=False)
    write_page(tmp_path / "page.html", [read_record(folder)])
    assert (tmp_path / "page.html").stat().st_size < 600_000
