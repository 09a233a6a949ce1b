"""Videos on a disk that is full: none bears its name that is not whole, and it is told."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.resumable_runs import config_of, make_data, run
from tests.test_resume_faults import PLAIN
from tools import render
from train.checkpoint import checkpoints_in
from train.video_files import write_mp4

NOISE = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, of this process and of the encoder of videos."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_a_video_that_does_not_fit_is_not_there(tmp_path: Path, size: int) -> None:
    write_mp4(tmp_path / "a.mp4", NOISE[:1], 8)
    before = (tmp_path / "a.mp4").read_bytes()
    with room_for(size), pytest.raises(OSError, match=r"a\.mp4 was not kept whole"):
        write_mp4(tmp_path / "a.mp4", NOISE, 8)
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_rendering_tells_it_in_a_sentence(
    tmp_path: Path,
    toy_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    size = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "1"]
    words = ["a ball", *size, "--model", str(toy_model), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["tools.render", *words])
    with room_for(1000), pytest.raises(SystemExit):
        render.main()
    assert f"error: --out {tmp_path} cannot be written (" in capfd.readouterr().err
    assert not list(tmp_path.glob("[!.]*"))


def test_a_run_goes_on_without_samples_that_do_not_fit(
    tmp_path: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_data(tmp_path)
    previews = ["preview.prompts=[a noise]", "preview.every=1", "steps=2"]
    config = config_of(home, toy_model, "run", *PLAIN, *previews)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "samples").write_text("in the way")
    run(config)
    said = capsys.readouterr().out
    assert said.count("cannot be written") == 4
    assert len(checkpoints_in(folder / "checkpoints")) == 4
