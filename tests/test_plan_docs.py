"""What docs/plan.md says can be typed, and its figures are those that the program has."""

import re
from pathlib import Path

import pytest

from tests.test_footprint import ROWS, predicted
from tools import plan as program
from train.compose import compose

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "plan.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"    python -m tools\.plan (.*)", DOCS))
def test_its_commands_run(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    program.main(command.split())
    assert "take       speed=" in capsys.readouterr().out


def test_its_training_command_composes() -> None:
    (words,) = re.findall(r"    python train/lora\.py (.*)", DOCS)
    assert compose(words.split()).dry_run


def test_its_table_is_what_is_predicted_now(monkeypatch: pytest.MonkeyPatch) -> None:
    written = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|", DOCS)
    assert len(written) == 6
    for measured, told in written:
        row = next(row for row in ROWS if row["gib"] == measured)
        assert predicted(row, monkeypatch) == pytest.approx(float(told), abs=0.06)
