"""What is found in adapter files, one by one and as pairs."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from adapter_files import LAYERS, RANK, Tensors, adapter, kohya, our_file, stem, write
from safetensors import safe_open

from tools import lora_check
from wan.adapter_check import Check, check_adapter
from wan.adapter_keys import Style
from wan.adapter_pair import pair_findings, pairs_among
from wan.headers import ModelError
from wan.safetensors_writer import file_hashes

FIRST = "diffusion_model.blocks.0.self_attn.q"


def checked(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Check:
    return check_adapter(write(folder / "fox_high_noise.safetensors", tensors, metadata))


def texts(check: Check, level: str) -> str:
    return "\n".join(found.text for found in check.findings if found.level == level)


def test_our_own_file_is_right_in_every_respect(tmp_path: Path) -> None:
    path = our_file(tmp_path, "high")
    check = check_adapter(path)
    hashes = file_hashes(path)
    assert check.findings == ()
    assert check.contents.file_sha256 == hashes.sha256
    assert check.contents.data_sha256[:12] == hashes.autov3
    assert check.expert_by_metadata == check.expert_by_name == "high"
    assert check.fit
    assert [variant.name for variant in check.fit.variants] == ["tiny"]
    assert len(check.contents.modules) == 10 * LAYERS
    assert {module.rank for module in check.contents.modules.values()} == {RANK}
    assert check.contents.dtypes == {"BF16": 20 * LAYERS}


def test_norms_and_scales_are_those_of_the_product(tmp_path: Path) -> None:
    tensors = kohya(alpha=2.0)
    modules = checked(tmp_path, tensors).contents.modules
    for name in ("blocks.0.self_attn.q", "blocks.5.ffn.2"):
        key = stem(name, "kohya")
        product = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        assert modules[name].norm == pytest.approx(float(product.norm()), rel=1e-5)
        assert modules[name].width == tuple(product.shape)
        assert modules[name].scale == 2.0 / RANK


@pytest.mark.parametrize(
    "style",
    get_args(Style),
)
def test_layouts_are_told_apart_and_mean_the_same_modules(tmp_path: Path, style: str) -> None:
    contents = checked(tmp_path, adapter(style)).contents
    expected = checked(tmp_path, adapter()).contents.modules
    assert contents.styles == {style: 20 * LAYERS}
    assert contents.modules == expected
    assert not contents.unknown


def without(name: str) -> Tensors:
    return {key: tensor for key, tensor in adapter().items() if key != name}


def with_value(value: float, suffix: str = ".lora_B.weight") -> Tensors:
    tensors = adapter()
    tensors[FIRST + suffix].view(-1)[5] = value
    return tensors


def dead(*linears: str) -> Tensors:
    return {
        key: torch.zeros_like(tensor)
        if "lora_B" in key and any(x in key for x in linears)
        else tensor
        for key, tensor in adapter().items()
    }


A_ROW = {FIRST + ".lora_A.weight": torch.ones(RANK, 192)}
ERRORS: dict[str, tuple[Callable[[], Tensors], str]] = {
    "empty": (dict, "holds no LoRA"),
    "alpha 0": (lambda: adapter(alpha=0.0), "60 alphas that are not in (0, 1e+06]"),
    "negative alpha": (lambda: adapter(alpha=-1.0), "blocks.0.cross_attn.k: -1"),
    "huge alpha": (lambda: adapter(alpha=2e6), "alphas that are not in"),
    "alpha NaN": (lambda: adapter(alpha=float("nan")), "alphas that are not in"),
    "orphan": (lambda: without(FIRST + ".lora_B.weight"), "half a LoRA: blocks.0.self_attn.q"),
    "alpha alone": (
        lambda: adapter() | {"diffusion_model.head.head.alpha": torch.ones(())},
        "half",
    ),
    "mixed layouts": (
        lambda: adapter() | kohya(blocks=[0]),
        "layouts are mixed: kohya (30 keys), comfy",
    ),
    "mixed spellings": (
        lambda: adapter() | adapter(spelling=("lora_down", "lora_up")),
        "spelled in several ways: lora_A, lora_down",
    ),
    "unknown key": (lambda: adapter() | {"lora_te_x.alpha": torch.ones(())}, "1 unknown keys"),
    "NaN": (
        lambda: with_value(float("nan")),
        "1 tensors with NaN or infinity: 'diffusion_model.bl",
    ),
    "infinity": (lambda: with_value(float("inf"), ".lora_A.weight"), "NaN or infinity"),
    "dead": (lambda: dead("."), "never trained, and does nothing"),
    "other widths": (
        lambda: {
            f"{FIRST}.lora_A.weight": torch.ones(2, 5),
            f"{FIRST}.lora_B.weight": torch.ones(7, 2),
        },
        "no Wan model has these shapes: blocks.0.self_attn.q is (7, 5) (out, in)",
    ),
    "one other width": (
        lambda: adapter() | A_ROW | {FIRST + ".lora_B.weight": torch.ones(24, RANK)},
        "1 modules that do not fit tiny (a Wan 2.2 T2V pair at toy size): blocks.0.self_attn.q",
    ),
    "ranks that differ": (
        lambda: adapter() | {FIRST + ".lora_B.weight": torch.ones(192, 3)},
        "expected (rank, in), (out, rank)",
    ),
    "one dimension": (lambda: adapter() | {FIRST + ".lora_A.weight": torch.ones(4)}, "(4,)"),
    "too many blocks": (lambda: adapter(blocks=range(7)), "beyond the 6 blocks of the model"),
    "SimpleTuner": (lambda: adapter("comfy_diffusers"), "SimpleTuner's comfyui format"),
    "transformer_2": (lambda: adapter("transformer_2"), "which diffusers passes over"),
    "both experts": (lambda: adapter("stages"), "both experts in one file"),
    "PEFT": (lambda: adapter("peft"), "not for sharing"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_found_and_named(tmp_path: Path, case: str) -> None:
    make, expected = ERRORS[case]
    assert expected in texts(checked(tmp_path, make()), "error")


WARNINGS: dict[str, tuple[Callable[[], Tensors], str]] = {
    "mixed ranks": (lambda: adapter() | adapter(blocks=[1], rank=2), "mixed ranks (2, 4)"),
    "dead kind": (lambda: dead("ffn.2", "self_attn.k"), "all blocks for ffn.2, self_attn.k"),
    "dead module": (lambda: dead("s.3.ffn.2"), "B @ A is 0 in 1 modules: blocks.3.ffn.2"),
    "uneven blocks": (
        lambda: without_module("blocks.2.ffn.0"),
        "blocks that lack linears which others have: blocks.2",
    ),
    "some alphas": (
        lambda: adapter() | {f"{FIRST}.alpha": torch.tensor(4.0)},
        "59 of 60 modules have no alpha",
    ),
    "images": (lambda: image_attention(), "1 modules for images, which only Wan 2.1 has"),
    "fp8": (
        lambda: {k: v.to(torch.float8_e4m3fn) for k, v in adapter().items()},
        "tensors of F8_E4M3",
    ),
}


def without_module(module: str) -> Tensors:
    return {key: tensor for key, tensor in adapter().items() if module not in key}


def image_attention() -> Tensors:
    extra = adapter(blocks=[0], linears=["self_attn.k"])
    return adapter() | {k.replace("self_attn.k", "cross_attn.k_img"): v for k, v in extra.items()}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_may_be_meant_is_a_warning(tmp_path: Path, case: str) -> None:
    make, expected = WARNINGS[case]
    check = checked(tmp_path, make())
    assert expected in texts(check, "warning")
    assert not check.has_errors


def test_subsets_of_linears_are_no_fault(tmp_path: Path) -> None:
    assert checked(tmp_path, adapter(linears=["self_attn.q", "cross_attn.k"])).findings == ()


def changed(path: Path, **entries: str) -> Path:
    """The file with other metadata, and its data as they were."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | {key.replace("__", "."): v for key, v in entries.items()}
    return write(path, tensors, metadata)


@pytest.mark.parametrize(
    ("entries", "level", "expected"),
    [
        (
            {"sshs_model_hash": "e3b0c442" * 8},
            "error",
            "sshs_model_hash begins with 'e3b0c442e3b0'",
        ),
        ({"modelspec__hash_sha256": "0xabc"}, "error", "modelspec.hash_sha256 begins with 'abc'"),
        ({"sshs_model_hash": ""}, "warning", "sshs_model_hash is missing"),
        ({"ss_network_dim": "64"}, "warning", "ss_network_dim is 64, the tensors have rank 4"),
        ({"wan_lora__expert": "low"}, "error", "name says high, its metadata say low"),
        ({"wan_lora__variant": "ti2v_5b"}, "error", "metadata say ti2v_5b, its shapes tiny"),
        ({"wan_lora__format_version": "2"}, "warning", "our format version '2'"),
        ({"lora_adapter_metadata": "{}"}, "warning", "by which diffusers scales once more"),
        ({"ss_comment": "x" * 1_100_000}, "warning", "keep it under 1 MB"),
    ],
)
def test_metadata_that_contradict_the_file_are_found(
    tmp_path: Path, entries: dict[str, str], level: str, expected: str
) -> None:
    check = check_adapter(changed(our_file(tmp_path, "high"), **entries))
    assert expected in texts(check, level)


def test_a_flipped_bit_of_our_file_is_found_by_its_hash(tmp_path: Path) -> None:
    path = our_file(tmp_path, "high")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "the file is damaged or was changed" in texts(check_adapter(path), "error")


def test_a_wrong_hash_of_another_tool_is_a_warning(tmp_path: Path) -> None:
    check = checked(tmp_path, adapter(), {"sshs_model_hash": "e3b0c442" * 8})
    assert "sites will take it for another" in texts(check, "warning")
    assert not check.has_errors


def test_file_names_that_hide_the_expert_or_the_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    check = check_adapter(write(tmp_path / "plain" / "optimizer.safetensors", adapter()))
    assert "which expert it is for" in texts(check, "warning")
    assert "'optimizer' in their name" in texts(check, "warning")


def test_a_name_with_an_expert_is_told_of_a_model_that_has_one(tmp_path: Path) -> None:
    for name, told in (("fox_high_noise", True), ("fox", False)):
        tensors = {
            f"diffusion_model.blocks.29.self_attn.{linear}.{factor}.weight": torch.ones(shape)
            for linear in "qk"
            for factor, shape in (("lora_A", (1, 3072)), ("lora_B", (3072, 1)))
        }
        check = check_adapter(write(tmp_path / f"{name}.safetensors", tensors))
        assert check.fit is not None
        assert "TI2V-5B" in check.fit.title
        assert ("InvokeAI reads high in its name" in texts(check, "warning")) == told


def our_pair(folder: Path, **low: str) -> tuple[Check, Check]:
    high = check_adapter(our_file(folder, "high"))
    return high, check_adapter(our_file(folder, "low", 1, **low))


def test_the_two_files_of_a_run_are_a_pair(tmp_path: Path) -> None:
    high, low = our_pair(tmp_path)
    assert pairs_among([high, low]) == [(high, low)]
    assert pair_findings(high, low) == pair_findings(low, high) == []


def test_files_of_two_runs_are_told(tmp_path: Path) -> None:
    high, low = our_pair(tmp_path, pair_id="ffff0000")
    assert pairs_among([high, low]) == [(high, low)]
    assert [found.text for found in pair_findings(high, low)] == [
        "they are of two trainings: pair '0123abcd' and 'ffff0000'"
    ]


def test_pairs_are_found_among_many_files_by_their_id(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    pairs = [our_pair(tmp_path), our_pair(tmp_path / "two", pair_id="other")]
    other_high = check_adapter(
        changed(our_file(tmp_path / "two", "high"), wan_lora__pair_id="other")
    )
    files = [pairs[0][0], other_high, pairs[0][1], pairs[1][1]]
    assert pairs_among(files) == [pairs[0], (other_high, pairs[1][1])]
    assert pairs_among([pairs[0][0], other_high]) == []  # two of the same expert are no pair


def test_swapped_names_are_found_in_each_file_and_in_the_pair(tmp_path: Path) -> None:
    paths = [our_file(tmp_path, "high"), our_file(tmp_path, "low", 1)]
    paths[0].rename(tmp_path / "aside")
    paths[1].rename(paths[0])
    (tmp_path / "aside").rename(paths[1])
    called_high, called_low = (check_adapter(path) for path in paths)
    assert called_high.expert == "low"
    assert called_high.has_errors
    assert "names are swapped" in pair_findings(called_high, called_low)[0].text


def test_what_makes_two_files_no_pair_is_named(tmp_path: Path) -> None:
    high = check_adapter(write(tmp_path / "a_high_noise.safetensors", adapter()))
    low = write(tmp_path / "a_low_noise.safetensors", adapter())
    assert "both hold the same data" in pair_findings(high, check_adapter(low))[0].text
    write(low, kohya(alpha=RANK, blocks=[0]) | adapter("kohya", rank=2, blocks=[1]))
    found = "\n".join(finding.text for finding in pair_findings(high, check_adapter(low)))
    assert "their layouts differ: comfy and kohya" in found
    assert "40 modules are in one of them only, such as blocks.2.cross_attn.k" in found
    assert "their ranks differ: [4] and [2, 4]" in found


@pytest.mark.parametrize("timesteps", ["0,800", "100,875", "0,875,1", "low", "875,1000", "nan,875"])
def test_ranges_of_timesteps_must_complement_each_other(tmp_path: Path, timesteps: str) -> None:
    high = check_adapter(our_file(tmp_path, "high"))
    low = check_adapter(changed(our_file(tmp_path, "low", 1), modelspec__timestep_range=timesteps))
    assert "timesteps do not make up 0 to 1000" in pair_findings(high, low)[0].text


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    lora_check.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["check", *arguments])
    with pytest.raises(SystemExit) as left:
        parsed.run(parsed)
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_report_says_what_a_person_wants_to_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(our_file(tmp_path, "high")), str(our_file(tmp_path, "low", 1))]
    assert run(*paths) == 0
    report = capsys.readouterr().out
    for expected in (
        "fox_high_noise.safetensors  (0.3 MB, 120 tensors, BF16)",
        "layout    comfy: diffusion_model. and official names",
        "expert    low, by its metadata and name",
        "modules   10 of 10 linears in each of 6 of 6 blocks",
        "scale     1 (no alpha)",
        "loads in  ComfyUI, WanVideoWrapper, diffusers",
        "musubi-tuner          no              reads lora_unet_ keys only",
        "nothing is wrong",
        "one training, one file for each expert",
    ):
        assert expected in report


def test_text_from_a_file_cannot_reach_the_terminal_as_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2Jwiped\u202e"
    tensors = adapter() | {f"{evil}.alpha": torch.ones(())}
    metadata = {"modelspec.title": evil, "wan_lora.expert": evil, "sshs_model_hash": evil}
    metadata |= {"wan_lora.format_version": evil, "wan_lora.variant": evil}
    path = str(write(tmp_path / "fox_high_noise.safetensors", tensors, metadata))
    run(path)
    run(path, "--json")
    printed = capsys.readouterr().out
    assert "wiped" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def test_json_and_the_exit_status_tell_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = our_file(tmp_path, "high"), write(tmp_path / "x.safetensors", adapter(alpha=-1.0))
    assert run(str(good), str(bad), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert [file["has_errors"] for file in told["files"]] == [False, True]
    assert told["files"][0]["linears_by_block"] == [10] * LAYERS
    assert told["files"][0]["loaders"][0]["outcome"] == "yes"
    assert "not in (0, 1e+06]" in told["files"][1]["findings"][0]["text"]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1])
    assert run(str(good), str(cut), str(tmp_path / "none"), "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert "cut short" in told["unreadable"][str(cut)]
    assert "is missing" in told["unreadable"][str(tmp_path / "none")]
    assert run(str(cut)) == 2
    assert "is cut short" in capsys.readouterr().err


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        check_adapter(tmp_path)
