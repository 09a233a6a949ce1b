"""merge, resize and diff of tools.lora on adapters, as a user runs them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO, random_state
from adapter_sums import apart, run, total
from layout_adapters import adapter, write
from safetensors.torch import load_file, save_file

from tools import lora
from wan.adapter_check import check_adapter
from wan.adapter_layouts import read_any
from wan.adapter_pair import pair_findings
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.lora_format import export_adapter

ROOT = Path(__file__).parents[1]
EXPERTS = ("high", "low")


def trained(folder: Path, name: str, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """The high file of a finished pair."""
    for number, expert in enumerate(EXPERTS):
        info = replace(INFO, expert=expert, title=name, trigger=f"a {name}", pair_id=f"{name}-1")
        export_adapter(folder, name, random_state(seed + 10 * number), info, dtype)
    return folder / f"{name}_high_noise.safetensors"


def low(path: Path) -> Path:
    return path.with_name(path.name.replace("high", "low"))


def test_a_pair_is_merged_by_one_file_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fox, style = trained(tmp_path, "fox", 1), trained(tmp_path, "style", 2)
    out = tmp_path / "out"
    words = ("merge", f"{fox}:0.8", f"{low(style)}:-0.5", "--pair", "--out", out)
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert re.search(r"0\.8 x fox_low_noise \+ -0\.5 x style_low_noise\n", said)
    assert re.search(r"self_attn\.q +2 +8 +[\d.]+ +0\.00%\n", said)
    assert "load_into_transformer_2" in said
    files = sorted(out.iterdir())
    assert [f.name for f in files] == [f"fox+style_{e}_noise.safetensors" for e in EXPERTS]
    assert apart(total((files[0], 1)), total((fox, 0.8), (style, -0.5))) < 1e-6
    assert apart(total((files[1], 1)), total((low(fox), 0.8), (low(style), -0.5))) < 1e-6
    high, lower = (read_any(file).metadata for file in files)
    assert high["wan_lora.expert"] == "high"
    assert high["wan_lora.variant"] == "t2v_a14b"
    assert high["modelspec.merged_from"] == "fox_high_noise:0.8, style_high_noise:-0.5"
    assert high["modelspec.trigger_phrase"] == "a fox, a style"
    assert high["ss_network_dim"] == "8"
    assert "wan_lora.heldout_loss" not in high
    assert high["wan_lora.pair_id"] == lower["wan_lora.pair_id"] != "fox-1"
    again = (*words[:-1], tmp_path / "again")
    assert run(monkeypatch, *again) == 0
    for file in files:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert not pair_findings(check_adapter(files[0]), check_adapter(files[1]))


@pytest.mark.parametrize("layout", ["comfy", "kohya", "diffusers", "peft", "official"])
def test_files_of_any_layout_rank_and_scale_add_up(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write(tmp_path / "one", layout, adapter(0.5)).path  # type: ignore[arg-type]
    small = {m: Factors(f.a[:1], f.b[:, :1], 3.0) for m, f in adapter(1.0, 2, "ffn").items()}
    two = write(tmp_path / "two", "kohya", small).path
    words = ("merge", f"{one}:2", two, "--to", layout, "--name", "sum", "--out", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    (made,) = (tmp_path / "out").rglob("*.safetensors")
    assert read_any(made).layout == layout
    assert apart(total((made, 1)), total((one, 2), (two, 1))) < 1e-6
    assert {f.rank for f in read_any(made).modules.values()} == {5}


def test_a_merge_is_resized_and_rounded_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fox, style = trained(tmp_path, "fox", 1), trained(tmp_path, "style", 2)
    out = tmp_path / "out"
    words = ("merge", fox, style, "--rank", "6", "--dtype", "bf16", "--name", "both", "--out", out)
    assert run(monkeypatch, *words) == 0
    made = out / "both_high_noise.safetensors"
    assert {f.a.dtype for f in read_any(made).modules.values()} == {torch.bfloat16}
    assert {f.rank for f in read_any(made).modules.values()} == {6}
    expected, found = total((fox, 1), (style, 1)), total((made, 1))
    lost = sum(float((found[m] - expected[m]).square().sum()) for m in found)
    best = sum(float(torch.linalg.svdvals(d)[6:].square().sum()) for d in expected.values())
    norm = sum(float(d.square().sum()) for d in expected.values())
    assert best < lost < best + 1e-4 * norm
    printed = re.search(r"all +20 +6 +[\d.]+ +([\d.]+)%", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(100 * (lost / norm) ** 0.5, abs=0.01)


@pytest.mark.parametrize("words", [("--rank", "2"), ("--energy", "0.9")])
def test_resize_is_the_svd_of_each_module(
    words: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fox = trained(tmp_path, "fox", 1)
    out = tmp_path / "out"
    assert run(monkeypatch, "resize", low(fox), "--pair", *words, "--out", out) == 0
    for file in (fox, low(fox)):
        made = read_any(out / file.name)
        assert made.metadata["modelspec.title"] == read_any(file).metadata["modelspec.title"]
        for module, delta in total((file, 1)).items():
            u, values, vh = torch.linalg.svd(delta)
            energies = values.square().cumsum(0) / values.square().sum()
            rank = 2 if words[0] == "--rank" else int((energies < 0.9).sum()) + 1
            best = (u[:, :rank] * values[:rank]) @ vh[:rank]
            factors = made.modules[module]
            found = factors.scale * factors.b @ factors.a
            assert (found - best).norm() < 1e-5 * delta.norm(), module


def test_diff_tells_blocks_and_kinds_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = adapter(1.0), adapter(1.0)
    other = {m: replace(f, scale=2.0) if m.startswith("blocks.1") else f for m, f in other.items()}
    other.pop("blocks.0.ffn.2")
    files = [tmp_path / name / "x.safetensors" for name in ("a", "b")]
    for file, modules in zip(files, (one, other), strict=True):
        file.parent.mkdir()
        write_layout(file, modules, "comfy", torch.float32, {})
    assert run(monkeypatch, "diff", *files, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    block = found["blocks"]["1"]
    assert (block["cosine"], block["difference"]) == (pytest.approx(1), pytest.approx(1))
    assert block["norm_b"] == pytest.approx(2 * block["norm_a"])
    ours, theirs = total((files[0], 1)), total((files[1], 1))
    names = ("blocks.0.ffn.0", "blocks.1.ffn.0")
    x, y = (torch.cat([side[n].flatten() for n in names]) for side in (ours, theirs))
    kind = found["kinds"]["ffn.0"]
    assert kind["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-5)
    assert kind["difference"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    alone = found["modules"]["blocks.0.ffn.2"]
    assert (alone["norm_b"], alone["cosine"], alone["difference"]) == (0, None, 1)
    assert found["only_in_a"] == ["blocks.0.ffn.2"]
    assert run(monkeypatch, "diff", *files) == 0
    text = capsys.readouterr().out
    assert re.search(r"block 1 +[\d.]+ +[\d.]+ +100\.00% +1\.0000\n", text)
    assert "1 modules are in A alone, such as blocks.0.ffn.2" in text


def test_diff_compares_the_experts_of_two_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fox, style = trained(tmp_path, "fox", 1), trained(tmp_path, "style", 2)
    assert run(monkeypatch, "diff", fox, low(style), "--pair", "--json") == 0
    found = json.loads(capsys.readouterr().out)["comparisons"]
    assert [Path(one["b"]).name for one in found] == [style.name, low(style).name]
    assert run(monkeypatch, "diff", fox, fox) == 0
    assert re.search(r"all +([\d.]+) +\1 +0\.00% +1\.0000\n", capsys.readouterr().out)


def test_what_cannot_be_done_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fox, style = trained(tmp_path, "fox", 1), trained(tmp_path, "style", 2)
    lone = write(tmp_path / "lone", "comfy", adapter()).path
    of_i2v = tmp_path / "of_i2v_high_noise.safetensors"
    entries = read_any(fox).metadata | {"wan_lora.variant": "i2v_a14b"}
    write_layout(of_i2v, read_any(fox).modules, "comfy", torch.float32, entries)
    wide = tmp_path / "wide_high_noise.safetensors"
    wider = {m: Factors(f.a.repeat(1, 2), f.b, 1.0) for m, f in adapter().items()}
    write_layout(wide, wider, "comfy", torch.float32, {})
    swapped = tmp_path / "swapped_low_noise.safetensors"
    swapped.write_bytes(fox.read_bytes())
    broken, dora = tmp_path / "nan.safetensors", tmp_path / "dora.safetensors"
    tensors = load_file(lone)
    save_file({k: t * float("nan") for k, t in tensors.items()}, broken)
    save_file(tensors | {"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(40, 1)}, dora)
    out = ("--out", tmp_path / "out")
    taken = ("--out", tmp_path)
    for words, message in (
        (("merge", tmp_path / "no.safetensors", fox, *out), "is missing"),
        (("merge", f"{tmp_path / 'no.safetensors'}:0.5", *out), "is missing"),
        (("merge", f"{fox}:nan", style, *out), "'nan' is no strength"),
        (("merge", f"{fox}:0", style, *out), "'0' is no strength"),
        (("merge", f"{fox}:much", style, *out), "'much' is no strength"),
        (("merge", fox, low(style), *out), "each expert needs its own file"),
        (("merge", fox, of_i2v, *out), "is for t2v_a14b and .* is for i2v_a14b"),
        (("merge", fox, wide, *out), "are for two models: blocks.0.cross_attn.k is"),
        (("merge", fox, lone, "--pair", *out), "the other expert's file is not beside it"),
        (("merge", swapped, *out), "were two files swapped"),
        (("merge", fox, broken, *out), "has NaN"),
        (("merge", fox, dora, *out), "holds a DoRA"),
        (("merge", fox, "--name", "fox", *taken), "exists; choose another folder"),
        (("merge", fox, style, "--name", "a/b", *out), "cannot name a file"),
        (("merge", fox, style, "--rank", "0", *out), "--rank is 0"),
        (("resize", fox, "--rank", "-1", *out), "--rank is -1"),
        (("resize", fox, "--energy", "nan", *out), "--energy is nan"),
        (("resize", fox, *out), "needs --rank, --energy or both"),
        (("resize", fox, "--rank", "2", *taken), "exists; choose another folder"),
        (("diff", fox, wide), "are for two models"),
        (("diff", fox, lone, "--pair"), "the other expert's file is not beside it"),
    ):
        assert run(monkeypatch, *words) == 2, message
        said = capsys.readouterr()
        assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", said.err), said.err
        assert not said.out
    assert not (tmp_path / "out").exists()


def test_a_reader_who_has_seen_enough_gives_no_traceback(tmp_path: Path) -> None:
    """Checking leaves with a status of its own, which does not hide that nobody reads."""
    fox = trained(tmp_path, "fox", 1)
    command = [sys.executable, "-m", "tools.lora", "check", str(fox), "--json"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()  # before a line is written
        said = child.stderr.read()
    assert b"BrokenPipe" not in said
    assert b"Traceback" not in said
    assert child.returncode == lora.READER_GONE


def test_the_program_explains_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for subcommand in ("merge", "resize", "extract", "diff"):
        assert run(monkeypatch, subcommand, "--help") == 0
        assert f"tools.lora {subcommand}" in capsys.readouterr().out
