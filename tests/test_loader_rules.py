"""The rules of other loaders: against the matrix of the study, and against diffusers itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from adapter_files import RANK, Tensors, adapter, kohya, our_file, stem, write
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from wan.adapter_check import check_adapter
from wan.adapter_choices import BLOCK_LINEARS
from wan.adapter_names import diffusers_name
from wan.loader_rules import LOADERS, Feature, Outcome
from wan.lora import adapter_layers
from wan.variants import TINY

HALF = RANK / 2
DOWN_UP = ("lora_down", "lora_up")
FIRST = "diffusion_model.blocks.0.self_attn.q"
COLUMNS: dict[str, Callable[[], Tensors]] = {  # of the matrix in spec/lora_formats.md, section 2.0
    "A0": adapter,
    "Aa": lambda: adapter(alpha=HALF),
    "Adu": lambda: adapter(spelling=DOWN_UP),
    "Ba": lambda: kohya(HALF),
    "B0": lambda: kohya(None),
    "C": lambda: adapter("diffusers"),
    "D": lambda: adapter("peft"),
    "N": lambda: adapter("official"),
}
# y applied at the scale of the file, p partly, w at another, n not, e refused; columns as above.
MATRIX = {
    "ComfyUI": "yyyyynnn",
    "WanVideoWrapper": "yyyyypwy",
    "diffusers": "yyyyeynn",
    "diffusers (old)": "yeyyeynn",
    "DiffSynth-Studio": "yyynnnny",
    "LightX2V": "yyynnnny",
    "Wan2GP": "yyyyyeey",
    "stable-diffusion.cpp": "yyyyynnn",
}
LETTERS: dict[str, Outcome] = {
    "y": "yes",
    "p": "partly",
    "w": "wrong strength",
    "n": "no",
    "e": "error",
}


def verdicts(path: Path) -> dict[str, Outcome]:
    return {verdict.loader: verdict.outcome for verdict in check_adapter(path).verdicts}


@pytest.mark.parametrize("column", COLUMNS)
def test_verdicts_are_those_of_the_matrix(tmp_path: Path, column: str) -> None:
    found = verdicts(write(tmp_path / "x.safetensors", COLUMNS[column]()))
    place = list(COLUMNS).index(column)
    assert {name: found[name] for name in MATRIX} == {
        name: LETTERS[row[place]] for name, row in MATRIX.items()
    }


def test_every_loader_but_musubi_takes_a_file_of_ours_at_14b(tmp_path: Path) -> None:
    wide = {name: widened(tensor) for name, tensor in adapter(blocks=[0]).items()}
    found = verdicts(write(tmp_path / "fox_high_noise.safetensors", wide))
    assert {name for name, outcome in found.items() if outcome != "yes"} == {"musubi-tuner"}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    sizes = {TINY.dim: 5120, TINY.ffn_dim: 13824}
    return torch.ones([sizes.get(size, size) for size in tensor.shape])


def test_every_feature_is_minded_by_some_loader_and_every_rule_can_fit() -> None:
    minded = {feature for loader in LOADERS for rule in loader.rules for feature in rule.when}
    assert minded | {"bare"} == set(get_args(Feature))


def one(suffix: str, *shape: int) -> Tensors:
    return {f"{FIRST}.{suffix}": torch.ones(shape)}


TRAPS: dict[str, tuple[Callable[[], Tensors], str, Outcome]] = {
    "DoRA": (lambda: adapter() | one("dora_scale", 192, 1), "LightX2V", "partly"),
    "PEFT's DoRA": (lambda: adapter() | one("lora_magnitude_vector", 192), "ComfyUI", "partly"),
    "diff_m": (
        lambda: adapter() | {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 192)},
        "ComfyUI",
        "partly",
    ),
    "LoKr": (lambda: one("lokr_w1", 4, 4) | one("lokr_w2", 48, 48), "diffusers", "error"),
    "LoKr with alpha": (
        lambda: one("lokr_w1", 4, 4) | one("lokr_w2", 48, 48) | one("alpha"),
        "ComfyUI",
        "wrong strength",
    ),
    "LoHa": (lambda: one("hada_w1_a", 192, 4), "Wan2GP", "error"),
    "alpha 0": (lambda: adapter(alpha=0.0), "LightX2V", "wrong strength"),
    "patch embedding": (
        lambda: (
            adapter()
            | {
                "diffusion_model.patch_embedding.lora_A.weight": torch.ones(RANK, 16, 1, 2, 2),
                "diffusion_model.patch_embedding.lora_B.weight": torch.ones(192, RANK, 1, 1, 1),
            }
        ),
        "WanVideoWrapper",
        "error",
    ),
    "no block 0": (lambda: adapter(blocks=[1]), "SwarmUI", "no"),
    "mixed ranks": (
        lambda: adapter() | adapter(blocks=[1], rank=2),
        "diffusers (old)",
        "wrong strength",
    ),
    "no alpha": (lambda: kohya(None), "musubi-tuner", "partly"),
    "musubi's own": (kohya, "musubi-tuner", "yes"),
    "Wan-Fun": (lambda: adapter("fun", 4.0, DOWN_UP), "ComfyUI", "yes"),
    "Wan-Fun, no block 0": (lambda: adapter("fun", blocks=[1]), "ComfyUI", "no"),
}


@pytest.mark.parametrize("case", TRAPS)
def test_traps_are_told_for_the_loader_that_falls_into_them(tmp_path: Path, case: str) -> None:
    make, loader, expected = TRAPS[case]
    assert verdicts(write(tmp_path / "x.safetensors", make()))[loader] == expected


def test_swarmui_knows_5b_by_its_architecture_only(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in adapter(blocks=[0]).items() if "_attn." in name}
    wide = {
        n: torch.ones([3072 if size == 192 else size for size in t.shape])
        for n, t in tensors.items()
    }
    path = tmp_path / "x.safetensors"
    assert verdicts(write(path, wide))["SwarmUI"] == "no"
    told = {"modelspec.architecture": "wan-2_2-ti2v-5b/lora"}
    assert verdicts(write(path, wide, told))["SwarmUI"] == "yes"


@dataclass(frozen=True)
class Loaded:
    """What diffusers really made of a file."""

    outcome: Outcome
    scale: float | None = None  # of B @ A, measured


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def load_in_diffusers(path: Path, tensors: Tensors, style: str) -> Loaded:
    """Load a file into a fresh model of the tiny width."""
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=small_transformer(),
    )
    assert isinstance(pipe, WanLoraLoaderMixin)
    try:
        pipe.load_lora_weights(str(path), adapter_name="default")
    except (ValueError, KeyError, IndexError, RuntimeError):
        return Loaded("error")
    layers = adapter_layers(pipe.transformer)
    if not layers:
        return Loaded("no")
    if any(parameter.is_meta for parameter in pipe.transformer.parameters()):
        return Loaded("error")  # the forward fails on them, or computes nonsense
    name = stem("blocks.0.self_attn.q", style)
    factors = (
        ("lora_down", "lora_up") if f"{name}.lora_up.weight" in tensors else ("lora_A", "lora_B")
    )
    a, b = (tensors[f"{name}.{factor}.weight"] for factor in factors)
    delta = layers[diffusers_name("blocks.0.self_attn.q")].get_delta_weight("default")
    product = b @ a
    return Loaded("yes", float((delta * product).sum() / product.square().sum()))


def small_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=TINY.heads,
        attention_head_dim=TINY.dim // TINY.heads,
        text_dim=TINY.text_dim,
        freq_dim=TINY.freq_dim,
        ffn_dim=TINY.ffn_dim,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


TWO = range(2)
TOP = {
    "diffusion_model.text_embedding.2.lora_A.weight": torch.ones(RANK, 192),
    "diffusion_model.text_embedding.2.lora_B.weight": torch.ones(192, RANK),
}
FILES: dict[str, tuple[str, Callable[[], Tensors]]] = {  # name -> (layout, tensors)
    "comfy": ("comfy", lambda: adapter(blocks=TWO)),
    "comfy, alpha": ("comfy", lambda: adapter(alpha=HALF, blocks=TWO)),
    "comfy, alpha 0": ("comfy", lambda: adapter(alpha=0.0, blocks=TWO)),
    "comfy, lora_down": ("comfy", lambda: adapter(spelling=DOWN_UP, blocks=TWO)),
    "comfy, .default": (
        "comfy",
        lambda: adapter(spelling=("lora_A.default", "lora_B.default"), blocks=TWO),
    ),
    "comfy, a gap": ("comfy", lambda: without(adapter(blocks=TWO), "blocks.1.ffn.0")),
    "comfy, orphan": ("comfy", lambda: without(adapter(blocks=TWO), "blocks.1.ffn.0.lora_B")),
    "comfy, mixed ranks": (
        "comfy",
        lambda: adapter(blocks=TWO) | adapter(blocks=[1], rank=2),
    ),
    "comfy, top level": ("comfy", lambda: adapter(blocks=TWO) | TOP),
    "comfy, alpha at the top level": (
        "comfy",
        lambda: (
            adapter(alpha=HALF, blocks=TWO)
            | TOP
            | {"diffusion_model.text_embedding.2.alpha": torch.tensor(HALF)}
        ),
    ),
    "comfy, no blocks": ("comfy", lambda: TOP),
    "comfy, patch embedding": ("comfy", TRAPS["patch embedding"][0]),
    "comfy, DoRA": ("comfy", lambda: adapter(blocks=TWO) | one("dora_scale", 192, 1)),
    "comfy, PEFT's DoRA": (
        "comfy",
        lambda: adapter(blocks=TWO) | one("lora_magnitude_vector", 192),
    ),
    "comfy, some diff_b": ("comfy", lambda: adapter(blocks=TWO) | one("diff_b", 192)),
    "comfy, unknown key": ("comfy", lambda: adapter(blocks=TWO) | {"lora_te": torch.ones(1)}),
    "LoKr": ("comfy", TRAPS["LoKr"][0]),
    "kohya": ("kohya", lambda: kohya(HALF, blocks=TWO)),
    "kohya, no alpha": ("kohya", lambda: kohya(None, blocks=TWO)),
    "kohya, a gap": ("kohya", lambda: without(kohya(HALF, blocks=TWO), "blocks_1_ffn_0")),
    "kohya, no block 0": ("kohya", lambda: kohya(HALF, blocks=[1])),
    "Wan-Fun": ("fun", lambda: adapter("fun", HALF, DOWN_UP, blocks=TWO)),
    "diffusers": ("diffusers", lambda: adapter("diffusers", blocks=TWO)),
    "diffusers, alpha": ("diffusers", lambda: adapter("diffusers", HALF, blocks=TWO)),
    "diffusers, lora_down": (
        "diffusers",
        lambda: adapter("diffusers", spelling=DOWN_UP, blocks=TWO),
    ),
    "PEFT": ("peft", lambda: adapter("peft", blocks=TWO)),
    "official": ("official", lambda: adapter("official", blocks=TWO)),
    "SimpleTuner": ("comfy_diffusers", lambda: adapter("comfy_diffusers", blocks=TWO)),
    "transformer_2": ("transformer_2", lambda: adapter("transformer_2", blocks=TWO)),
    "both experts": ("stages", lambda: adapter("stages", blocks=TWO)),
}


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("case", FILES)
def test_the_rules_for_diffusers_say_what_diffusers_does(tmp_path: Path, case: str) -> None:
    style, make = FILES[case]
    tensors = make()
    path = write(tmp_path / "x.safetensors", tensors)
    loaded, module = load_in_diffusers(path, tensors, style), "blocks.0.self_attn.q"
    check = check_adapter(path)
    said = next(verdict for verdict in check.verdicts if verdict.loader == "diffusers")
    assert loaded.outcome == said.outcome
    if loaded.scale is not None:
        assert loaded.scale == pytest.approx(check.contents.modules[module].scale, abs=1e-5)


def test_a_scale_that_diffusers_applies_twice_is_told(tmp_path: Path) -> None:
    tensors = adapter(alpha=HALF, blocks=TWO)
    modules = sorted(
        {diffusers_name(f"blocks.0.{linear}")[9:] for linear in BLOCK_LINEARS.values()}
    )
    config = {"r": RANK, "lora_alpha": HALF, "target_modules": modules}
    entry = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    path = write(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": entry})
    assert load_in_diffusers(path, tensors, "comfy").scale == pytest.approx(0.25)
    assert verdicts(path)["diffusers"] == "wrong strength"
    assert check_adapter(path).has_errors


def test_our_file_is_taken_by_the_installed_diffusers(tmp_path: Path) -> None:
    assert verdicts(our_file(tmp_path, "high"))["diffusers"] == "yes"
