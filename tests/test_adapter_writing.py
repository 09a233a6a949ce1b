"""Adapter files as written in each layout: nothing is lost, and loaders apply them at scale 1."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from adapter_examples import ALPHA, INFO, RANK, predict, random_state, tiny_transformer
from layout_adapters import adapter, deltas, same_bits, write
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora_loaders import pipeline

from wan.adapter_layouts import read_any
from wan.adapter_names import Layout, diffusers_name
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.headers import ModelError
from wan.lora import adapter_layers
from wan.lora_format import export_adapter
from wan.safetensors_writer import file_hashes

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Q = "blocks.0.self_attn.q"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_way_of", LAYOUTS)
def test_there_and_back_keeps_every_bit(
    tmp_path: Path, by_way_of: Layout, dtype: torch.dtype
) -> None:
    partial = {name: f for name, f in adapter(0.3).items() if "cross_attn" not in name}
    there = write(tmp_path / "1", "comfy", partial, dtype)
    other = write(tmp_path / "2", by_way_of, there.modules, dtype)
    assert other.layout == by_way_of
    back = write(tmp_path / "3", "comfy", other.modules, dtype)
    assert same_bits(load_file(there.path), load_file(back.path))
    assert file_hashes(there.path).autov3 == file_hashes(back.path).autov3


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_delta_stays_within_the_rounding_of_the_dtype(
    tmp_path: Path, layout: Layout, dtype: torch.dtype, limit: float
) -> None:
    modules = adapter(0.3)
    file = write(tmp_path, layout, modules, dtype)
    assert {f.scale for f in file.modules.values()} == {0.3 if layout == "peft" else 1.0}
    expected = deltas(modules)
    for module, delta in deltas(file.modules).items():
        assert (delta - expected[module]).norm() < limit * expected[module].norm()


def test_a_file_tells_its_own_rank_alpha_and_hash(tmp_path: Path) -> None:
    alphas: dict[Layout, str] = {"kohya": "4", "peft": "2"}
    for layout, alpha in alphas.items():
        file = write(tmp_path / layout, layout, adapter(0.5))
        entries = file.metadata
        assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == ("4", alpha)
        assert entries["note"] == "kept"
        assert entries["sshs_model_hash"][:12] == file_hashes(file.path).autov3
        assert entries["modelspec.hash_sha256"] == f"0x{entries['sshs_model_hash']}"


def test_mixed_ranks_become_one_and_mixed_scales_are_folded(tmp_path: Path) -> None:
    modules = adapter(0.5)
    modules[Q] = Factors(modules[Q].a[:2], modules[Q].b[:, :2], 0.25)
    for layout in LAYOUTS:
        file = write(tmp_path / layout, layout, modules)
        assert {(f.rank, f.scale) for f in file.modules.values()} == {(RANK, 1.0)}
        torch.testing.assert_close(deltas(file.modules)[Q], deltas(modules)[Q])


def test_kohya_files_hold_every_linear_of_the_model(tmp_path: Path) -> None:
    one = {"blocks.0.self_attn.q": Factors(torch.ones(1, 3072), torch.ones(3072, 1), 2.0)}
    path = tmp_path / "five.safetensors"
    write_layout(path, one, "kohya", torch.bfloat16, {})
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert len(shapes) == 900
    assert shapes["lora_unet_blocks_29_ffn_0.lora_up.weight"] == (14336, 1)
    assert shapes["lora_unet_blocks_29_ffn_2.lora_down.weight"] == (1, 14336)
    assert shapes["lora_unet_blocks_0_self_attn_q.alpha"] == ()
    assert list(read_any(path).modules) == [Q]  # the zeros are no modules
    attention = adapter(preset="attention")
    with pytest.raises(ModelError, match="no model of width 24 is known"):
        write_layout(tmp_path / "odd.safetensors", attention, "kohya", torch.float32, {})
    assert not (tmp_path / "odd.safetensors").exists()


def test_nothing_is_written_that_would_not_load(tmp_path: Path) -> None:
    bad = adapter()
    bad[Q] = Factors(bad[Q].a * torch.nan, bad[Q].b, 1.0)
    cases: tuple[tuple[dict[str, Factors], Layout, torch.dtype, str], ...] = (
        (bad, "comfy", torch.float32, "NaN or infinite"),
        (adapter(1e7), "diffusers", torch.float16, "does not fit into fp16"),
        (adapter(-1.0), "comfy", torch.float32, "must be positive"),
        (adapter(), "comfy", torch.float64, "bf16, fp16 or fp32"),
        ({}, "comfy", torch.float32, "no modules"),
        (adapter(), "peft", torch.float32, "reads no file but adapter_model.safetensors"),
    )
    for modules, layout, dtype, message in cases:
        with pytest.raises(ModelError, match=message):
            write_layout(tmp_path / "x.safetensors", modules, layout, dtype, {})
    assert not list(tmp_path.iterdir())


def test_fp16_stays_fp16_however_small_its_values_are(tmp_path: Path) -> None:
    modules = {n: Factors(f.a.half(), (f.b * 1e-6).half(), 1.0) for n, f in adapter().items()}
    file = write(tmp_path, "diffusers", modules, torch.float16)
    assert all(torch.equal(f.b, modules[name].b) for name, f in file.modules.items())


def test_a_few_bytes_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    thin = {
        f"blocks.{i}.self_attn.q": Factors(torch.ones(1, 900), torch.ones(900, 1), 1.0)
        for i in range(40)
    }
    wide = {"blocks.0.ffn.0": Factors(torch.ones(9000, 1), torch.ones(1, 9000), 1.0)}
    one = torch.ones(1, 5120)
    beyond = {"blocks.40.self_attn.q": Factors(one, one.T, 1.0)}
    far = {"blocks.999.ffn.0": Factors(torch.ones(1, 24), torch.ones(40, 1), 1.0)}
    cases: tuple[tuple[dict[str, Factors], Layout, str], ...] = (
        (thin | wide, "comfy", "values would become"),
        (far, "kohya", "values would become"),
        (beyond, "kohya", "has a block 40; models of its width, 5120, have 40 blocks"),
    )
    for modules, layout, message in cases:
        with pytest.raises(ModelError, match=message):
            write_layout(path, modules, layout, torch.float32, {})


SCRIPT = """
import pathlib, sys, torch
from adapter_examples import INFO, random_state
from layout_adapters import adapter, write
from wan.lora_format import export_adapter
folder = pathlib.Path(sys.argv[1])
for layout in sys.argv[2:]:
    write(folder / layout, layout, adapter(0.3, 12), torch.bfloat16)
export_adapter(folder, "fox", random_state(1), INFO, torch.bfloat16)
"""


def test_every_process_writes_the_same_bytes(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "there"), *LAYOUTS]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for layout in LAYOUTS:
        write(tmp_path / "here" / layout, layout, adapter(0.3, 12), torch.bfloat16)
    export_adapter(tmp_path / "here", "fox", random_state(1), INFO, torch.bfloat16)
    files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert len(files) == len(LAYOUTS) + 2
    for path in files:
        there = tmp_path / "there" / path.relative_to(tmp_path / "here")
        assert path.read_bytes() == there.read_bytes()


def test_peft_itself_loads_what_is_written_for_it(tmp_path: Path) -> None:
    modules = adapter(ALPHA / RANK)
    write(tmp_path, "peft", modules)
    loaded = PeftModel.from_pretrained(tiny_transformer(), str(tmp_path))
    layers = adapter_layers(loaded.get_base_model())
    assert len(layers) == len(modules)
    for official, delta in deltas(modules).items():
        layer = layers[diffusers_name(official)]
        assert layer.scaling["default"] == ALPHA / RANK
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


@pytest.mark.parametrize("layout", ["comfy", "kohya", "diffusers"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_diffusers_measures_scale_one_in_every_layout(
    tmp_path: Path, layout: Layout, scale: float
) -> None:
    modules = {n: f for n, f in adapter(scale).items() if "cross_attn" not in n}  # kohya: filled
    file = write(tmp_path, layout, modules)
    transformer, base = tiny_transformer(), predict(tiny_transformer())
    pipe = pipeline(transformer, tiny_transformer())
    pipe.load_lora_weights(str(tmp_path), weight_name=file.path.name, adapter_name="default")
    pipe.load_lora_weights(
        str(tmp_path), weight_name=file.path.name, adapter_name="low", load_into_transformer_2=True
    )
    for found, name in ((transformer, "default"), (pipe.transformer_2, "low")):
        layers = adapter_layers(found, name)
        for official, factors in modules.items():
            delta, product = (
                layers[diffusers_name(official)].get_delta_weight(name),
                factors.b @ factors.a,
            )
            measured = float((delta * product).sum() / product.square().sum())
            assert measured == pytest.approx(scale)
            torch.testing.assert_close(delta, scale * product)
    assert (predict(transformer) - base).norm() > 0.05 * base.norm()


def test_an_adapter_that_does_nothing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idle = {name: Factors(f.a, 0 * f.b, 1.0) for name, f in adapter().items()}
    with caplog.at_level(logging.WARNING):
        file = write(tmp_path, "kohya", idle)
    assert "has no effect in any block" in caplog.text
    assert file.modules.keys() == idle.keys()  # A is there: no zeros that only fill up
