"""The program for adapter files, as a user runs it."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO, RANK, WIDTH, random_state
from layout_adapters import adapter, deltas, write
from safetensors.torch import load_file, save_file

from tools import lora
from wan.adapter_layouts import read_any
from wan.adapter_values import Factors
from wan.lora_format import export_adapter


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit status of `python -m tools.lora`."""
    monkeypatch.setattr(sys, "argv", ["lora", *map(str, words)])
    try:
        lora.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """The two files of a finished run, which has a checkpoint of its high expert as well."""
    folder = tmp_path / "run"
    files = {}
    for seed, expert in enumerate(("high", "low"), start=1):
        info = replace(INFO, expert=expert)
        files[expert] = export_adapter(folder, "fox", random_state(seed), info, torch.float32).path
        if expert == "high":
            checkpoint = folder / "checkpoints" / "step_000000500"
            export_adapter(checkpoint, "fox_000000500", random_state(3), info, torch.float32)
    (folder / "config.yaml").write_text("name: fox\nlora:\n  rank: 4\n")
    return files


def test_the_program_lists_its_subcommands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("info", "convert", "export", "check", "publish"))


def test_info_tells_a_pair_by_one_of_its_files(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "info", pair["low"], "--pair") == 0
    high, low = capsys.readouterr().out.split("\n\n/")
    for text, expert in ((high, "high"), (low, "low")):
        assert f"fox_{expert}_noise.safetensors\n" in text
        assert re.search(rf"expert +{expert}\n", text)
        assert re.search(r"layout +comfy\n.*modules +20 in 2 blocks\n", text, re.DOTALL)
        assert re.search(r"rank +4\n +scale +1\n +dtype +float32\n", text)
        assert re.search(r"AutoV2 +[0-9a-f]{10} +AutoV3 [0-9a-f]{12}\n", text)
        assert text.index("ModelSpec") < text.index("ss_seed") < text.index("wan_lora.expert")


def test_info_says_that_names_were_swapped_and_shows_no_control_characters(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = pair["high"].rename(pair["high"].with_name("new_low_noise.safetensors"))
    assert run(monkeypatch, "info", swapped) == 0
    assert "high, though the name says low" in capsys.readouterr().out
    stem = "blocks.0.self_attn.q.lora_"
    tensors = {f"{stem}A.weight": torch.ones(4, 8), f"{stem}B.weight": torch.ones(8, 4)}
    save_file(tensors, swapped, {"title": "\x1b[31mred\n" + "x" * 500})
    assert run(monkeypatch, "info", swapped) == 0
    text = capsys.readouterr().out
    assert "low, by its name" in text
    assert "·[31mred·xxx" in text
    assert "… (509 letters)" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft", "official"])
def test_a_pair_is_converted_there_and_back(
    pair: dict[str, Path],
    layout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert run(monkeypatch, "convert", pair["low"], "--pair", "--to", layout, "--out", there) == 0
    said = capsys.readouterr().out
    assert ("load_into_transformer_2=True" in said) == (layout in ("kohya", "diffusers"))
    files = sorted(there.rglob("*.safetensors"))
    assert [read_any(file).layout for file in files] == [layout, layout]
    names = ("--to", "comfy", "--out", back)
    assert run(monkeypatch, "convert", files[0], "--pair", *names) == 0
    for file in pair.values():
        ours, theirs = load_file(file), load_file(back / file.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        # The words about the training are the same, so the bytes are.
        assert file.read_bytes() == (back / file.name).read_bytes()


def test_a_dtype_and_a_lost_alpha_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "my_fox", "peft", adapter(0.5))
    (tmp_path / "my_fox" / "adapter_config.json").unlink()
    wanted = ("convert", tmp_path / "my_fox", "--to", "comfy", "--out", tmp_path / "out")
    assert run(monkeypatch, *wanted) == 2
    assert "give --alpha" in capsys.readouterr().err
    assert run(monkeypatch, *wanted, "--alpha", "2", "--dtype", "bf16") == 0
    made = read_any(tmp_path / "out" / "my_fox.safetensors")
    expected = deltas(adapter(2 / RANK))
    assert made.modules.keys() == file.modules.keys()
    for module, delta in deltas(made.modules).items():
        assert made.modules[module].a.dtype == torch.bfloat16
        assert (delta - expected[module]).norm() < 5e-3 * expected[module].norm()


def test_the_files_of_folders_named_for_experts_get_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expert in ("high", "low"):
        folder = tmp_path / f"fox_{expert}_noise_lora"
        file = write(folder, "official", adapter(), torch.bfloat16)
        file.path.rename(folder / "epoch-4.safetensors")
    one = tmp_path / "fox_low_noise_lora" / "epoch-4.safetensors"
    out = tmp_path / "out"
    assert run(monkeypatch, "convert", one, "--pair", "--to", "comfy", "--out", out) == 0
    names = {"epoch-4_high_noise.safetensors", "epoch-4_low_noise.safetensors"}
    assert {file.name for file in out.iterdir()} == names
    kept = (read_any(file).modules["blocks.0.ffn.0"].b.dtype for file in out.iterdir())
    assert {*kept} == {torch.bfloat16}


def test_linears_outside_the_blocks_are_kept_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"head.head": Factors(torch.ones(RANK, WIDTH), torch.ones(8, RANK), 1.0)}
    file = write(tmp_path / "head", "comfy", adapter() | head).path
    wanted = ("convert", file, "--to", "diffusers", "--out", tmp_path / "out")
    assert run(monkeypatch, *wanted) == 2
    assert re.search(
        r"1 linears outside.*\(head\.head, …\).*--outside-blocks", capsys.readouterr().err
    )
    assert run(monkeypatch, *wanted, "--outside-blocks") == 0
    assert "transformer.proj_out.lora_A.weight" in load_file(tmp_path / "out" / "head.safetensors")


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ((), ["fox_high_noise.safetensors", "fox_low_noise.safetensors"]),
        (("--step", "500"), ["fox_000000500_high_noise.safetensors"]),
    ],
)
def test_a_run_is_exported(
    pair: dict[str, Path],
    step: tuple[str, ...],
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, run_folder = tmp_path / "out", pair["high"].parent
    more = ("--layout", "kohya", "--dtype", "bf16", "--out", out)
    assert run(monkeypatch, "export", run_folder, *step, *more) == 0
    assert sorted(file.name for file in out.iterdir()) == names
    made = [read_any(file) for file in sorted(out.iterdir())]
    assert {file.layout for file in made} == {"kohya"}
    assert made[0].metadata["wan_lora.expert"] == "high"
    assert made[0].metadata["modelspec.title"] == "Blue Fox (high noise)"


def test_what_cannot_be_done_is_one_sentence(
    pair: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    high, folder = pair["high"], pair["high"].parent
    lone = write(tmp_path / "lone", "comfy", adapter()).path
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK\x03\x04" * 100)
    out = ("--out", tmp_path / "out")
    for words, message in (
        (("info", tmp_path / "no.safetensors"), "is missing"),
        (("info", broken), "is not a whole safetensors file"),
        (("info", lone, "--pair"), "the other expert's file is not beside it"),
        (("convert", high, "--to", "comfy", "--out", folder), "exists; choose another folder"),
        (("export", folder, "--step", "7", *out), "there are checkpoints after --step 500"),
        (("export", tmp_path, *out), "not the folder of a run"),
    ):
        assert run(monkeypatch, *words) == 2
        said = capsys.readouterr()
        assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", said.err)
        assert not said.out
    assert not (tmp_path / "out").exists()
