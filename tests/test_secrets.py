"""Nothing that a run writes or says tells a key, the home folder, or who ran it on what machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USER = "alice-of-fuzz"
TOKENS = {
    "CIVITAI_TOKEN": "c0ffee5ec2e7c0ffee5ec2e7c0ffee5e",
    "HF_TOKEN": "hf_NoSuchTokenNoSuchTokenNoSuchToken",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
SHORT = (
    *(
        "experiment=smoke",
        "name=toy",
        "data.mix.world.path=clips/world",
        "output_dir=outputs/toy",
        "data.cache=cache",
    ),
    *("data.path=clips/train", "data.heldout_path=clips/heldout", "eval.every=0", "data.workers=0"),
    *("steps=2", "low.steps=2", "checkpoint.every=2", "preview.steps=1", "tracking.mode=offline"),
    *("data.frames=1", "data.height=32", "data.width=32"),
    *("preview.frames=1", "preview.height=32", "preview.width=32"),
    *("eval.bins=1", "eval.draws=1", "tracking.log_every=1"),
)

COMMANDS = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
for words in ("report outputs/toy", "lora check outputs/toy/toy_high_noise.safetensors"):
    name, *sys.argv[1:] = words.split()
    try:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    except SystemExit as leaving:
        assert not leaving.code, words
"""  # each is a program, but what they import takes longer than what they do


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which somebody with accounts everywhere trains and makes the report."""
    home = tmp_path_factory.mktemp("home") / USER
    for clip in ("train/01_rolling", "train/02_bouncing", "heldout/01_bouncing"):
        for suffix in (".mp4", ".txt"):
            place = home / "clips" / f"{clip}{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "datasets" / "demo" / f"{clip}{suffix}", place)
    shutil.copytree(home / "clips" / "train", home / "clips" / "world")
    environment = os.environ | TOKENS | {
        "HOME": str(home), "USER": USER, "LOGNAME": USER, "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with (home / "said.log").open("wb") as said:
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, f"{ROOT}/train/lora.py", *SHORT],
            cwd=home,
            env=environment,
            stdout=said,
            stderr=said,
            check=False,
        )
    assert done.returncode == 0, (home / "said.log").read_text()[-2000:]
    return home


def written(home: Path) -> Iterator[Path]:
    """All that the commands wrote and said; the clips were there before."""
    yield home / "said.log"
    for folder in ("outputs", "cache"):
        yield from (path for path in (home / folder).rglob("*") if path.is_file())


def tell(home: Path, secret: str, *allowed: str) -> list[str]:
    """What of it holds a text, as bytes or in a name; where it may stand, it is overlooked."""

    def content(path: Path) -> bytes:
        data = path.read_bytes()
        for text in allowed:
            data = data.replace(text.encode(), b"")
        return data

    found = [path for path in written(home) if secret.encode() in content(path)]
    found += [path for path in written(home) if secret in path.relative_to(home).as_posix()]
    return [path.relative_to(home).as_posix() for path in found]


def test_everything_is_scanned(home: Path) -> None:
    names = {path.name for path in written(home)}
    assert {"config.yaml", "metrics.jsonl", "report.html", "said.log"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert any(name.endswith("_low_noise.safetensors") for name in names)
    assert tell(home, "toy")  # a text that is there is found


@pytest.mark.parametrize("name", TOKENS)
def test_no_token_is_told(home: Path, name: str) -> None:
    assert tell(home, TOKENS[name]) == []


def test_neither_home_folder_nor_user_is_told(home: Path) -> None:
    # `wandb sync` finds on this machine what it is to send; it sends none of these paths.
    staged = f"{home}/outputs/toy/wandb/artifacts/staging/"
    # The cache's index knows files by their place on this machine, and never leaves it.
    assert tell(home, USER, staged) == ["cache/files.json"]
