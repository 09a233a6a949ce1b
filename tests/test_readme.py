"""The README's commands mean something, and its pictures are there."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from train import compose as settings
from train import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().replace("$s", "0")  # of a loop over seeds
COMMANDS = re.findall(r"accelerate launch train/lora\.py((?: \\?\s*[\w.]+=[^\s`;]+)+)", README)
COMMANDS = [command for command in COMMANDS if "my_style" not in command]  # the reader writes it


@pytest.mark.parametrize("command", COMMANDS)
def test_its_training_commands_compose(command: str) -> None:
    overrides = re.findall(r"[\w.]+=\S+", command)
    if "lora.rnak=8" in overrides:
        with pytest.raises(Exception, match="rnak"):
            settings.compose(overrides)
    else:
        settings.compose(overrides)


def test_it_has_the_two_commands_and_they_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"    make {target}" in README
        assert f"\n{target}:" in makefile
    assert len(COMMANDS) >= 3


def test_its_files_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


def test_its_example_experiment_composes(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    keys = re.findall(r"^(\w+):", example, re.MULTILINE)
    assert set(keys) <= {path.split(".")[0] for path in config.schema()}
    path = tmp_path / "my_style.yaml"
    path.write_text(example)
    merged = OmegaConf.merge(OmegaConf.structured(config.Config), OmegaConf.load(path))
    assert merged.high.rank == 16
