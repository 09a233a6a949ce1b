"""docs/adapters.md: every command of it runs in its order, every setting composes."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO
from adapter_files import adapter
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from test_tools_lora import run

from tools.lora import make_parser
from train.checkpoint import write_checkpoint
from train.compose import compose, lora_ranks, typed
from wan.adapter_names import diffusers_name, read_stem
from wan.loader_rules import LOADERS, Feature, verdict
from wan.lora_format import export_adapter
from wan.variants import VARIANTS, Expert

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adapters.md").read_text()
COMMANDS = re.findall(r"^    python -m tools\.lora (.+)$", PAGE, re.MULTILINE)
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
T2V = ["model=t2v_a14b", "model.path=wan"]
SHIFTS: dict[Expert, float] = {"high": 0.0, "low": 0.01}
TO_RUN = [command for command in COMMANDS if not command.startswith("fetch")]


def save(folder: Path, name: str, expert: Expert, shift: float) -> dict[str, torch.Tensor]:
    """A file for the toy model, and its state."""
    state = {}
    for key, tensor in adapter().items():
        stem, _, factor = key.partition(".lora_")
        found = read_stem(stem)
        assert found is not None
        state[f"{diffusers_name(found[1])}.lora_{factor}"] = tensor + shift
    info = replace(INFO, variant=VARIANTS["tiny"], expert=expert)
    export_adapter(folder, name, state, info, torch.bfloat16)
    return state


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page speaks of: a run, two pairs, a model."""
    folder = tmp_path / "outputs" / "fox"
    config = "name: fox\noptim:\n  name: torch.optim.AdamW\n"
    states: dict[Expert, dict[str, torch.Tensor]] = {}
    for expert, shift in SHIFTS.items():
        states[expert] = save(tmp_path, "fox", expert, shift)
        save(tmp_path, "style", expert, -shift - 0.02)
        save(folder, "fox", expert, shift)
    tensors: dict[Expert, dict[str, torch.Tensor]] = {
        expert: {f"{part}{n}": t for part in ("adapter.", "ema.") for n, t in state.items()}
        for expert, state in states.items()
    }

    def files(partial: Path) -> None:
        for expert, shift in SHIFTS.items():
            save(partial, "fox_000000500", expert, shift)

    (folder / "config.yaml").write_text(config)
    write_checkpoint(folder / "checkpoints", 500, tensors, {}, config, files)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "wan").symlink_to(ROOT / "wan" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in TO_RUN:
        assert run(monkeypatch, *shlex.split(command)) == 0, (command, capsys.readouterr())
    for folder in ("exported", "for_musubi", "merged", "small", "extracted"):
        assert len([*(home / folder).glob("*_noise.safetensors")]) == 2, folder
    assert [path.name for path in (home / "averaged").iterdir()] == [
        "fox_ema_low_noise.safetensors"
    ]
    change = load_file(home / "extracted" / "found_high_noise.safetensors")
    first = "diffusion_model.blocks.0.ffn.0.lora_"
    expected = load_file(home / "fox_high_noise.safetensors")
    a, b = (expected[f"{first}{factor}.weight"].float() for factor in "AB")
    found = change[f"{first}B.weight"].float() @ change[f"{first}A.weight"].float()
    assert (found - b @ a).norm() < 0.05 * (b @ a).norm()


def test_every_subcommand_has_a_command_that_is_understood() -> None:
    words = {command.split()[0] for command in COMMANDS}
    assert words == {"export", "info", "check", "convert", "merge", "resize", "extract", "diff",
                     "fetch"}  # fmt: skip
    for command in COMMANDS:
        make_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("example", EXAMPLES)
def test_its_settings_compose(example: str) -> None:
    given = OmegaConf.create(example)
    rank = f"lora.rank={given.lora.get('rank', 16)}"  # the experts' ranks follow it
    config = OmegaConf.structured(compose([*T2V, "name=fox", "data.path=clips", rank]))
    merged = OmegaConf.merge(config, given)
    assert isinstance(merged, DictConfig)
    ranks = lora_ranks(typed(merged), 16)
    if "rank_pattern" in example:
        places = ("3.attn1.to_out.0", "30.attn1.to_out.0", "30.attn1.to_q")
        assert [ranks[f"blocks.{place}"] for place in places] == [8, 32, 16]
        assert len(ranks) == 40 * 8


@pytest.mark.parametrize("layout", ["comfy", "kohya", "diffusers", "official"])
def test_its_table_of_readers_is_that_of_the_rules(layout: Feature) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{layout}`")]
    told = {name.strip() for name in row.rstrip("| ").rpartition("|")[2].split(",")}
    takes = {x.name for x in LOADERS if verdict(x, frozenset({layout}))[0] == "yes"}
    assert told == takes - {"diffusers (old)"}


def test_its_sizes_are_those_of_rank_16() -> None:
    for name, size in (("t2v_a14b", 153), ("ti2v_5b", 81)):
        facts = VARIANTS[name].transformer
        widths = 8 * 2 * facts.dim + 2 * (facts.dim + facts.ffn_dim)
        assert round(2 * 16 * facts.layers * widths / 1e6) == size
        assert f"{size} MB" in PAGE
