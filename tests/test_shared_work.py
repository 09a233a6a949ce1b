"""Two processes encode and render half each, and have together what one has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.resumable_runs import config_of, make_data, run
from tests.two_processes import launch

FEW = [
    "steps=1", "optim.warmup_steps=0", "accumulate=1", "eval.every=0", "preview.every=0",
    "preview.prompts=[one,two,three]", "optim.learning_rate=1e-12",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def said(home: Path, toy_model: Path) -> str:
    """What a run of two processes says; it encodes into an empty cache."""
    said = launch(home, toy_model, "two", *FEW, f"data.cache={home / 'two'}", launcher=True)
    assert (home / "out" / "two" / "summary.json").exists(), said[-3000:]
    return said


def samples(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "samples" / "base.safetensors")


def test_what_two_processes_render_is_what_one_does(home: Path, toy_model: Path, said: str) -> None:
    one = run(config_of(home, toy_model, "one", *FEW))
    alone, shared = samples(one), samples(home / "out" / "two")
    assert len(alone) == 3
    for name, video in alone.items():
        assert video.float().std() > 0
        difference = (video.int() - shared[name].int()).abs().max()
        assert difference <= 1, name  # of 255: sums may round otherwise
    assert not torch.equal(alone["0000"], alone["0001"])
    found = [p.name for p in sorted((home / "out" / "two" / "samples" / "step_000002").iterdir())]
    assert len([name for name in found if name.endswith("_adapters.mp4")]) == 6
    assert "samples    " in said


def test_two_processes_encode_each_clip_once(home: Path, said: str) -> None:
    entries = [path for path in (home / "two").rglob("*.safetensors") if "latents" in path.parts]
    assert len(entries) == 5
    assert "latents: 0 reused, 5 encoded" in said
