"""What adapters start from, and their average."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from train.compose import compose, lora_ranks
from train.config import Config
from train.encode import model_paths
from train.rules import ConfigError
from train.start import begin, plan_starts
from wan.adapter_choices import BLOCK_LINEARS, Kind
from wan.adapter_kinds import weight_change
from wan.adapter_layouts import read_any
from wan.adapter_names import Layout, diffusers_name
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.checkpoints import find_model, load_transformer
from wan.lora import ADAPTER, adapter_layers, attach
from wan.lora_format import export_adapter
from wan.variants import VARIANTS

TINY = VARIANTS["tiny"]
RANK = 4


def config_of(*settings: str) -> Config:
    return compose(["experiment=demo", *settings])


def adapter(rank: int = RANK, dim: int = TINY.transformer.dim) -> dict[str, Factors]:
    """A trained-looking adapter of the first block's attention, of scale 1/2."""
    generator, modules = torch.Generator().manual_seed(5), {}
    for official in BLOCK_LINEARS.values():
        if "attn" in official:
            a = torch.randn(rank, dim, generator=generator)
            b = torch.randn(dim, rank, generator=generator)
            modules[f"blocks.0.{official}"] = Factors(a, b, 0.5)
    return modules


def write(path: Path, modules: dict[str, Factors], layout: Layout = "comfy") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_layout(path, modules, layout, torch.float32, {})
    return path


def begun(config: Config, kind: Kind = "lora", seed: int = 7) -> WanTransformer3DModel:
    """The low expert as its training would begin."""
    start = plan_starts(config, TINY)["low"]
    model = find_model(model_paths(config.model), "tiny")
    transformer = load_transformer(model, "low", torch.float32, "cpu")
    ranks = lora_ranks(config, config.low.rank)
    attach(transformer, config.low.rank, config.low.alpha, ranks, 0.0, seed, kind)
    begin(transformer, start)
    return transformer


def changes(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    layers = adapter_layers(transformer)
    return {module: weight_change(layer, ADAPTER) for module, layer in layers.items()}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("comfy", "lora"), ("kohya", "rslora"), ("diffusers", "dora"), ("peft", "lora")],
)
def test_a_higher_rank_starts_exactly_from_a_file_of_any_layout(
    tmp_path: Path, layout: Layout, kind: Kind
) -> None:
    path = write(tmp_path / "adapter_model.safetensors", adapter(), layout)
    settings = (f"lora.init={path}", "lora.rank=6", "lora.alpha=2", f"lora.kind={kind}")
    transformer = begun(config_of(*settings), kind)
    given = {diffusers_name(n): f.scale * f.b @ f.a for n, f in adapter().items()}
    for module, change in changes(transformer).items():
        expected = given.get(module, torch.zeros_like(change))
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4)
    layer = adapter_layers(transformer)["blocks.0.attn1.to_q"]
    # A row of zeros beside a column of zeros would never learn.
    assert layer.lora_A.get_parameter("default.weight").any(dim=1).all()
    assert not layer.lora_B.get_parameter("default.weight")[:, RANK:].any()


def test_a_lower_rank_starts_from_the_nearest_and_says_how_near(tmp_path: Path) -> None:
    path = write(tmp_path / "fox.safetensors", adapter())
    config = config_of(f"lora.init={path}", "lora.rank=3", "lora.targets=self_attention")
    told = plan_starts(config, TINY)["low"].told
    lost, whole = 0.0, 0.0
    for module, change in changes(begun(config)).items():
        if module.startswith("blocks.0."):
            official = f"blocks.0.{BLOCK_LINEARS[module.removeprefix('blocks.0.')]}"
            given = 0.5 * adapter()[official].b @ adapter()[official].a
            values = torch.linalg.svdvals(given)
            error = (change - given).norm().item()
            assert error == pytest.approx(values[3:].norm().item(), rel=1e-3)
            lost, whole = lost + error**2, whole + given.norm().item() ** 2
    assert f"rank 4 cut to 3, which changes it by {(lost / whole) ** 0.5:.2%} of its norm" in told
    assert told.startswith("low        starts from fox.safetensors: 4 of 24 layers; ")
    assert "4 layers of the file are not trained (blocks.0.attn2.to_k …)" in told


def test_a_loha_can_be_the_start_of_a_lora(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {
        f"blocks.0.attn1.to_q.hada_{name}": torch.randn(*shape, generator=generator)
        for name, shape in {
            "w1_a": (192, 2), "w1_b": (2, 192), "w2_a": (192, 2), "w2_b": (2, 192),
        }.items()
    }  # fmt: skip
    info = replace(INFO, variant=TINY, expert="low", kind="loha", rank=2, alpha=2.0)
    path = export_adapter(tmp_path, "fox", state, info, torch.float32).path
    transformer = begun(config_of(f"lora.init={path}", "experts=[low]"))
    file = read_any(path).modules["blocks.0.self_attn.q"]
    expected = file.b @ file.a
    torch.testing.assert_close(
        changes(transformer)["blocks.0.attn1.to_q"], expected, rtol=1e-3, atol=1e-3
    )


def test_of_a_pair_each_expert_starts_from_its_own(tmp_path: Path) -> None:
    high = write(tmp_path / "fox_high_noise.safetensors", adapter(2))
    write(tmp_path / "fox_low_noise.safetensors", adapter(3))
    starts = plan_starts(config_of(f"lora.init={high}"), TINY)
    assert {e: next(iter(s.modules.values())).rank for e, s in starts.items()} == {
        "high": 2,
        "low": 3,
    }
    assert plan_starts(config_of(), TINY) == {}


def mistake(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_starts(config_of(*settings), TINY)
    return str(caught.value)


def test_files_that_do_not_fit_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    high = write(tmp_path / "fox_high_noise.safetensors", adapter())
    assert "no file for low is beside it" in mistake(f"lora.init={high}")
    assert plan_starts(config_of(f"lora.init={high}", "experts=[high]"), TINY)["high"].modules
    assert "does not exist" in mistake("lora.init=nowhere.safetensors")
    wide = write(tmp_path / "wide.safetensors", adapter(dim=256))
    assert "was made for another model" in mistake(f"lora.init={wide}")
    assert "has none of the layers" in mistake(f"lora.init={high}", "lora.targets=ffn",
                                               "experts=[high]")  # fmt: skip
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no adapter")
    assert "not a whole safetensors file" in mistake(f"lora.init={broken}")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"expert": "high"}, "trained for the expert high, and this run trains low"),
        ({"expert": "single", "variant": "i2v_a14b"}, "trained for the variant i2v_a14b"),
    ],
)
def test_another_expert_or_variant_is_known_by_the_metadata(
    tmp_path: Path, facts: dict[str, str], message: str
) -> None:
    state = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 192),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(192, 2),
    }
    variant = VARIANTS[facts.get("variant", "tiny")]
    expert = "high" if facts["expert"] == "high" else "single"
    info = replace(INFO, variant=variant, expert=expert)
    path = export_adapter(tmp_path, "fox", state, info, torch.float32).path
    renamed = path.rename(tmp_path / "renamed.safetensors")
    assert message in mistake(f"lora.init={renamed}", "experts=[low]")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.kind=loha", "lora.init=fox.safetensors"], "Set lora.kind=lora, rslora or dora"),
        (["lora.kind=lokr", "optim.b_ratio=16"], "has no factors A and B"),
        (["optim=schedulefree", "lora.ema=0.9"], "keeps an average by itself"),
        (["export.weights=both"], "Set lora.ema=0.999, or export.weights=live"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(*settings)
