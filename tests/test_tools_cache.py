"""`python -m tools.cache` as a program: alone, again, and two at once on one cache."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from data.items import DataError
from tests.toy_runs import config_of, encoded, make_image, make_video
from tools.cache import main

ROOT = Path(__file__).parent.parent
SIZE = ["data.height=32", "data.width=48", "data.frames=5", "data.workers=1", "model=tiny"]
CLIPS, TEXTS = 24, 26  # each clip has a caption of its own, and there is "" and a prompt


@pytest.fixture
def program(
    folder: Path,
    toy_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs it in this process, with further settings; gives what it prints."""

    def run(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["", *arguments(folder, toy_model), *overrides])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(CLIPS - 2):
        make_image(tmp_path / "data" / f"{seed:02d}.png", seed, f"picture {seed}")
    for frames in (5, 9):
        make_video(tmp_path / "data" / f"{frames}.mp4", frames, f"a video of {frames} frames")
    return tmp_path / "data"


def arguments(folder: Path, model: Path) -> list[str]:
    return [
        "name=toy", *SIZE, f"model.path={model}", f"data.path={folder}",
        f"data.cache={folder.parent / 'cache'}", "preview.prompts=[a prompt]",
        "preview.negative_prompt=''",
    ]  # fmt: skip


def made(output: str, kind: str) -> tuple[int, int]:
    """(reused, encoded by that program) of a kind of entries, as it says."""
    found = re.search(rf"{kind}: (\d+) reused, (\d+) encoded(?: \((\d+) here)?", output)
    assert found is not None, output
    reused, encoded_, here = found.groups()
    return int(reused), int(here or encoded_)


def test_two_at_once_share_the_work_and_a_third_finds_it_done(
    folder: Path, toy_model: Path, program: Callable[..., str]
) -> None:
    command = [sys.executable, "-m", "tools.cache", *arguments(folder, toy_model)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    for kind, total in (("latents", CLIPS), ("text", TEXTS)):
        assert sum(made(output, kind)[1] for output in outputs) == total  # nothing twice
        files = list((folder.parent / "cache" / kind).rglob("*.safetensors"))
        assert len(files) == total
        for file in files:
            with safe_open(file, "pt") as entry:
                assert entry.keys() == [kind]
    for output in outputs:  # what is used of the data
        assert re.search(r"train +20 clips: 19 of 1x32x48, 1 of 5x32x48", output), output

    again = program()
    assert made(again, "latents") == (CLIPS, 0)
    assert made(again, "text") == (TEXTS, 0)


def test_training_finds_what_it_made(
    folder: Path, toy_model: Path, program: Callable[..., str]
) -> None:
    config = config_of(folder, toy_model, "data.frames=5", "data.encode=false")
    with pytest.raises(DataError, match=r"python -m tools\.cache"):
        encoded(config)
    program()
    assert len(encoded(config, ["a prompt"]).train) > 0


def test_it_fills_the_cache_even_where_training_may_not(program: Callable[..., str]) -> None:
    """It is what the message of `data.encode=false` asks for, "with the settings of this run"."""
    assert made(program("data.encode=false"), "latents") == (0, CLIPS)
