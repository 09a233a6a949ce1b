"""Adapter files of all layouts: what is read, refused and written, and what is lost (nothing)."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from adapter_examples import RANK, WIDTH
from layout_adapters import adapter, deltas, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.adapter_layouts import pair_of, read_any
from wan.adapter_names import Layout, diffusers_name, read_stem, stem_of
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.headers import ModelError

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Q, FFN_UP = "blocks.0.self_attn.q", "blocks.1.ffn.0"


# Reading: what tools write, in their own words (spec/lora_formats.md sections 2.A to 2.G)

THEIRS: dict[str, tuple[Layout, str, str, str, str]] = {
    "ComfyUI": (
        "comfy",
        "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.1.ffn.0",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "lightx2v": (
        "comfy",
        "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.1.ffn.0",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "SimpleTuner for ComfyUI": (
        "comfy",
        "diffusion_model.blocks.0.attn1.to_q",
        "diffusion_model.blocks.1.ffn.net.0.proj",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "musubi": (
        "kohya",
        "lora_unet_blocks_0_self_attn_q",
        "lora_unet_blocks_1_ffn_0",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "Wan-Fun": (
        "kohya",
        "lora_unet__blocks_0_self_attn_q",
        "lora_unet__blocks_1_ffn_0",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "diffusers": (
        "diffusers",
        "transformer.blocks.0.attn1.to_q",
        "transformer.blocks.1.ffn.net.0.proj",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "DiffSynth": (
        "official",
        "blocks.0.self_attn.q",
        "blocks.1.ffn.0",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
}


@pytest.mark.parametrize("alpha", [None, RANK / 2, RANK], ids=str)
@pytest.mark.parametrize("tool", THEIRS)
def test_files_of_other_tools_give_the_same_delta(
    tmp_path: Path, tool: str, alpha: float | None
) -> None:
    layout, query, ffn, down, up = THEIRS[tool]
    tensors: dict[str, Tensor] = {}
    for stem, module in ((query, Q), (ffn, FFN_UP)):
        factors = adapter()[module]
        tensors |= {f"{stem}.{down}": factors.a, f"{stem}.{up}": factors.b}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor([int(alpha)])  # int64 and 1-D do exist
    save_file(tensors, tmp_path / "their.safetensors")
    file = read_any(tmp_path / "their.safetensors")
    assert file.layout == layout
    assert file.modules.keys() == {Q, FFN_UP}
    expected = deltas(adapter((alpha or RANK) / RANK))
    for module, delta in deltas(file.modules).items():
        torch.testing.assert_close(delta, expected[module])


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q", "blocks.0.self_attn.q", "transformer."])
def test_peft_files_take_alpha_from_their_configuration(tmp_path: Path, name: str) -> None:
    name = f"{name}blocks.0.attn1.to_q" if name.endswith(".") else name
    stem, factors = f"base_model.model.{name}", adapter()[Q]
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"{stem}.lora_A.weight": factors.a, f"{stem}.lora_B.weight": factors.b}, path)
    with pytest.raises(ModelError, match=r"adapter_config\.json; that is not beside it.*--alpha"):
        read_any(path)
    assert read_any(path, alpha=3.0).modules[Q].scale == 3 / RANK
    for config, scale in (
        ({"r": RANK, "lora_alpha": 2}, 2 / RANK),
        ({"r": RANK, "lora_alpha": 2, "use_rslora": True}, 2 / RANK**0.5),
        ({"r": RANK, "lora_alpha": 2, "alpha_pattern": {"to_q": 6}}, 6 / RANK),
        ({"r": RANK, "lora_alpha": 2, "alpha_pattern": {"to_k": 6}}, 2 / RANK),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        file = read_any(tmp_path)
        assert (file.layout, file.modules[Q].scale) == ("peft", scale)
    for wrong, message in (
        ("{", "damaged adapter_config.json"),
        ("[1]", "expected a JSON object"),
        ('{"r": 4}', "lora_alpha is None; expected a number above 0"),
        ('{"lora_alpha": -4}', "lora_alpha is -4"),
        ('{"lora_alpha": 4, "use_dora": true}', "DoRA"),
        ('{"lora_alpha": 4, "peft_type": "LOKR"}', "expected a plain LoRA"),
        ('{"lora_alpha": 4, "alpha_pattern": {"^(a+)+$": 1}}', "expected names of modules"),
    ):
        (tmp_path / "adapter_config.json").write_text(wrong)
        with pytest.raises(ModelError, match=message):
            read_any(tmp_path)


def test_diffusers_files_take_alpha_from_their_header(tmp_path: Path) -> None:
    write(tmp_path, "diffusers", adapter())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = tmp_path / "x.safetensors"
    config = {"transformer.r": RANK, "transformer.lora_alpha": 2, "transformer.use_rslora": True}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    assert {f.scale for f in read_any(path).modules.values()} == {2 / RANK**0.5}
    for entry, message in (("{", "damaged lora_adapter_metadata"), ('{"r": 4}', "any key that")):
        save_file(tensors, path, {"lora_adapter_metadata": entry})
        with pytest.raises(ModelError, match=message):
            read_any(path)


def test_underscored_names_are_looked_up_and_not_taken_apart() -> None:
    for stem, module in (
        ("lora_unet_text_embedding_0", "text_embedding.0"),
        ("lora_unet_time_projection_1", "time_projection.1"),
        ("lora_unet_blocks_11_cross_attn_k_img", "blocks.11.cross_attn.k_img"),
        ("lora_unet__blocks_39_ffn_2", "blocks.39.ffn.2"),
        ("lora_unet_head_head", "head.head"),
    ):
        assert read_stem(stem) == ("kohya", module)
        assert stem_of(module, "kohya") == stem.replace("__", "_")
        for layout in LAYOUTS:
            assert read_stem(stem_of(module, layout)) == (layout, module)
    assert diffusers_name("blocks.3.self_attn.o") == "blocks.3.attn1.to_out.0"
    for unknown in (
        "lora_unet_blocks_0_attn1_to_q",
        "blocks.01.ffn.0",
        "blocks.1000.ffn.0",
        "ffn.0",
    ):
        assert read_stem(unknown) is None


# The twelve traps of section 5.3, and what else is no plain LoRA of one layout

STEM = "diffusion_model.blocks.0.self_attn.q"
ONE = torch.ones(RANK, WIDTH)
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "1 negative alpha": ({f"{STEM}.alpha": torch.tensor(-4.0)}, r"\.alpha is -4\.0; expected"),
    "1 alpha 0": ({f"{STEM}.alpha": torch.tensor(0)}, r"\.alpha is 0; expected"),
    "1 NaN alpha": ({f"{STEM}.alpha": torch.tensor(torch.nan)}, r"\.alpha is nan; expected"),
    "1 many alphas": ({f"{STEM}.alpha": torch.ones(2)}, r"\.alpha is \[2\]; expected"),
    "4 both experts": ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": ONE}, "file of its own"),
    "4 ai-toolkit": (
        {"diffusion_model.transformer_1.blocks.0.ffn.0.lora_A.weight": ONE},
        "its own",
    ),
    "7 patch": ({"diffusion_model.patch_embedding.lora_A.weight": ONE}, "Control-LoRA"),
    "8 DoRA": ({f"{STEM}.dora_scale": ONE}, "DoRA"),
    "8 DoRA of PEFT": ({f"{STEM}.lora_magnitude_vector.weight": ONE}, "DoRA"),
    "10 bias": ({f"{STEM}.diff_b": ONE}, "change of whole weights"),
    "11 wrong size": (
        {f"{STEM}.lora_A.weight": torch.ones(RANK, 7)},
        r"blocks\.1\.self_attn\.q is \(24, 24\), in other blocks \(24, 7\)",
    ),
    "LoKr": ({f"{STEM}.lokr_w1": ONE}, "LoKr"),
    "LoHa": ({f"{STEM}.hada_w1_a": ONE}, "LoHa"),
    "unknown": ({"diffusion_model.blocks.0.attn9.q.lora_A.weight": ONE}, "no linear of Wan"),
    "naked": ({"alpha": ONE}, "no linear of Wan"),
    "mixed": ({"transformer.blocks.0.attn1.to_q.lora_A.weight": ONE}, "expected one layout"),
    "twice": ({f"{STEM}.lora_down.weight": ONE}, "means the same"),
    "orphan": ({"diffusion_model.blocks.2.ffn.0.lora_A.weight": ONE}, "one is missing"),
    "conv": ({f"{STEM}.lora_A.weight": torch.ones(RANK, WIDTH, 1, 1, 1)}, "expected .rank, in"),
    "scalar": ({f"{STEM}.lora_A.weight": torch.tensor(1.0)}, "expected .rank, in"),
    "rank 0": (
        {f"{STEM}.lora_A.weight": torch.ones(0, 24), f"{STEM}.lora_B.weight": torch.ones(24, 0)},
        "expected .rank, in",
    ),
    "fp8": ({f"{STEM}.lora_A.weight": ONE.to(torch.float8_e4m3fn)}, "holds torch.float8_e4m3fn"),
    "integers": ({f"{STEM}.lora_A.weight": ONE.int()}, "holds torch.int32"),
}


@pytest.mark.parametrize("trap", REFUSED)
def test_what_no_loader_reads_as_meant_is_refused_by_name(tmp_path: Path, trap: str) -> None:
    extra, message = REFUSED[trap]
    write(tmp_path, "comfy", adapter())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | extra, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=rf"odd\.safetensors.*{message}"):
        read_any(tmp_path / "odd.safetensors")


def test_trap_2_alpha_outside_the_blocks_is_read_and_never_written(tmp_path: Path) -> None:
    head = {"head.head": Factors(ONE, torch.ones(8, RANK), 0.5)}
    comfy = write(tmp_path, "comfy", adapter() | head)
    assert not [name for name in load_file(comfy.path) if "alpha" in name]
    assert torch.equal(deltas(comfy.modules)["head.head"], deltas(head)["head.head"])
    with pytest.raises(ModelError, match=r"head\.head, which diffusers cannot read"):
        write(tmp_path / "kohya", "kohya", adapter() | head)


def test_trap_3_writing_twice_scales_once(tmp_path: Path) -> None:
    modules = adapter(0.5)
    first, second = (write(tmp_path / name, "comfy", modules) for name in "ab")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert all(torch.equal(f.b, modules[name].b) for name, f in adapter(0.5).items())


@pytest.mark.parametrize("layout", ["comfy", "kohya", "diffusers", "official"])
def test_trap_5_the_scale_is_told_once(
    tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {f"{STEM}.lora_A.weight": ONE, f"{STEM}.lora_B.weight": ONE.T.contiguous()}
    path = tmp_path / "both.safetensors"
    entry = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1}), "other": "x"}
    save_file(tensors | {f"{STEM}.alpha": torch.tensor(2.0)}, path, entry)
    file = read_any(path)
    assert "lora_adapter_metadata is ignored" in caplog.messages[0]
    assert file.modules[Q].scale == 0.5
    modules = file.modules | {"blocks.0.ffn.0": Factors(ONE, torch.ones(40, RANK), 1.0)}
    write_layout(tmp_path / "x.safetensors", modules, layout, torch.float32, file.metadata)
    back = read_any(tmp_path / "x.safetensors")
    assert (back.modules[Q].scale, back.metadata["other"]) == (1.0, "x")
    assert "lora_adapter_metadata" not in back.metadata


# Pairs


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("fox_high_noise.safetensors", "fox_low_noise.safetensors"),
        ("fox-HIGH-v2.safetensors", "fox-LOW-v2.safetensors"),
        ("Fox.HighNoise.safetensors", "Fox.LowNoise.safetensors"),
        ("lora_High.safetensors", "lora_Low.safetensors"),
        ("high_noise/epoch-4.safetensors", "low_noise/epoch-4.safetensors"),
    ],
)
def test_the_two_files_of_a_pair_find_each_other(tmp_path: Path, high: str, low: str) -> None:
    first, second = tmp_path / high, tmp_path / low
    for path in (first, second):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    expected = {"high": first, "low": second}
    assert pair_of(first) == pair_of(second) == expected
    assert list(pair_of(second)) == ["high", "low"]
    second.unlink()
    noise = "noise" in high.lower()
    assert pair_of(first) == ({"high": first} if noise else {"single": first})


def test_words_that_only_sound_like_an_expert_tell_nothing(tmp_path: Path) -> None:
    for name in ("highlands.safetensors", "lowpoly.safetensors", "fox.safetensors", "high-res.sft"):
        assert pair_of(tmp_path / name) == {"single": tmp_path / name}


# Hostile files


def test_flipped_bits_give_the_adapter_or_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path, "kohya", adapter(blocks=1)).path
    good, whole = path.read_bytes(), read_any(path)
    draw, refused = torch.Generator().manual_seed(0), 0
    for place in torch.randint(len(good) // 2, (400,), generator=draw).tolist():
        flipped = bytes([good[place] ^ 1 << place % 8])
        path.write_bytes(good[:place] + flipped + good[place + 1 :])
        try:
            file = read_any(path)
        except ModelError:
            refused += 1
        else:
            assert file.modules.keys() <= whole.modules.keys()
    assert refused > 100


@pytest.mark.parametrize("dtype", ["F64", "I64", "BOOL", "C64", "F8_E8M0", "F4", "U16", "F32 "])
def test_tensors_of_a_kind_that_no_adapter_has_are_refused(tmp_path: Path, dtype: str) -> None:
    path, stem = tmp_path / "odd.safetensors", f"{STEM}.lora_"
    entries = {
        f"{stem}{factor}.weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": place}
        for factor, place in (("A", [0, 128]), ("B", [128, 256]))
    }
    for size in (1, 2, 4, 8, 16, 32):  # bytes of a row: one of them is right for each dtype
        for place, entry in enumerate(entries.values()):
            entry["data_offsets"] = [4 * size * place, 4 * size * (place + 1)]
        header = json.dumps(entries).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 * size))
        with pytest.raises(ModelError, match=r"odd\.safetensors"):
            read_any(path)


def test_a_header_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    deep = b'{"__metadata__":' + b"[" * 200_000
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_any(path)


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"])
def test_a_model_given_as_an_adapter_is_told_apart(tmp_path: Path, name: str) -> None:
    path = tmp_path / "wan2.2_t2v_high_noise_14B.safetensors"
    save_file({name: torch.ones(4, 4)}, path)
    with pytest.raises(ModelError, match=r"so this is a model, not a LoRA; give the LoRA's file"):
        read_any(path)
