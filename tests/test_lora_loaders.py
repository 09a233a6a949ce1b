"""What others make of our files: diffusers by running it, the rest by rules from their sources."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import (
    ALPHA,
    FFN,
    INFO,
    RANK,
    WIDTH,
    predict,
    random_state,
    tiny_transformer,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from wan.adapter_choices import target_modules
from wan.lora import adapter_layers, attach, load_adapter_state
from wan.lora_format import ExportedFile, export_adapter, to_comfy
from wan.lora_metadata import metadata
from wan.safetensors_writer import data_sha256, serialised
from wan.variants import Expert


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def with_adapter(state: dict[str, Tensor], alpha: float = ALPHA) -> WanTransformer3DModel:
    transformer = tiny_transformer()
    attach(transformer, RANK, alpha, target_modules("all"), 0.0, seed=0)
    load_adapter_state(transformer, state)
    return transformer


def pipeline(high: WanTransformer3DModel, low: WanTransformer3DModel) -> WanPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=high,
        transformer_2=low,
        boundary_ratio=0.875,
    )


def render(pipe: WanPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(2, 1, 6, 8, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=4,
        generator=generator,
        output_type="latent",
        return_dict=False,
    )[0]


def export_pair(
    folder: Path, dtype: torch.dtype = torch.float32
) -> dict[Expert, tuple[dict[str, Tensor], ExportedFile]]:
    states: dict[Expert, dict[str, Tensor]] = {"high": random_state(1), "low": random_state(2)}
    return {
        expert: (state, export_adapter(folder, "fox", state, replace(INFO, expert=expert), dtype))
        for expert, state in states.items()
    }


def loaded_pair(folder: Path, dtype: torch.dtype = torch.float32) -> WanPipeline:
    """A fresh pair into which diffusers itself loads the two exported files."""
    files = {expert: str(file.path) for expert, (_, file) in export_pair(folder, dtype).items()}
    pipe = pipeline(tiny_transformer(), tiny_transformer())
    pipe.load_lora_weights(files["high"], adapter_name="hi")
    pipe.load_lora_weights(files["low"], adapter_name="lo", load_into_transformer_2=True)
    return pipe


def relative(difference: Tensor, size: Tensor) -> float:
    return float(difference.norm() / size.norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_diffusers_loads_both_files_and_predicts_what_was_trained(
    tmp_path: Path, dtype: torch.dtype, limit: float
) -> None:
    pipe, base = loaded_pair(tmp_path, dtype), predict(tiny_transformer())
    trained = {"transformer": random_state(1), "transformer_2": random_state(2)}
    for component, state in trained.items():
        ours, theirs = predict(with_adapter(state)), predict(getattr(pipe, component))
        assert relative(theirs - ours, ours - base) < limit
        assert relative(ours - base, base) > 0.1
    ours = render(pipeline(*(with_adapter(state) for state in trained.values())))
    untrained = render(pipeline(tiny_transformer(), tiny_transformer()))
    assert relative(render(pipe) - ours, ours - untrained) < 3 * limit  # four steps add up


@pytest.mark.parametrize("alpha", [RANK, RANK / 2, 2 * RANK, 1.0])
def test_diffusers_applies_the_scale_of_training_to_each_module(
    tmp_path: Path, alpha: float
) -> None:
    state = random_state(1)
    file = export_adapter(tmp_path, "fox", state, replace(INFO, alpha=alpha), torch.float32)
    pipe = pipeline(tiny_transformer(), tiny_transformer())
    pipe.load_lora_weights(str(file.path), adapter_name="default")
    layers = adapter_layers(pipe.transformer)
    assert len(layers) == 20
    for module, layer in layers.items():
        product = state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
        delta = layer.get_delta_weight("default")
        assert float((delta * product).sum() / product.square().sum()) == pytest.approx(
            alpha / RANK
        )
        assert relative(delta - alpha / RANK * product, product) < 1e-6
    assert not adapter_layers(pipe.transformer_2)


def test_strengths_scale_the_files_and_deleting_them_restores_the_base(tmp_path: Path) -> None:
    pipe, base = loaded_pair(tmp_path), predict(tiny_transformer())
    pipe.set_adapters(["hi", "lo"], [0.5, 2.0])
    for transformer, seed, strength in ((pipe.transformer, 1, 0.5), (pipe.transformer_2, 2, 2.0)):
        ours = predict(with_adapter(random_state(seed), ALPHA * strength))
        assert relative(predict(transformer) - ours, ours - base) < 1e-5
    pipe.delete_adapters(["hi", "lo"])
    assert torch.equal(predict(pipe.transformer), base)
    assert torch.equal(predict(pipe.transformer_2), base)


def test_diffusers_loads_a_bf16_file_into_a_bf16_model(tmp_path: Path) -> None:
    state = random_state(1)
    file = export_adapter(tmp_path, "fox", state, INFO, torch.bfloat16)
    transformer = tiny_transformer().to(torch.bfloat16)
    pipe, base = pipeline(transformer, tiny_transformer()), predict(tiny_transformer())
    pipe.load_lora_weights(str(file.path))
    ours = predict(with_adapter(state))
    assert relative(predict(transformer).float() - ours, ours - base) < 5e-2


def official_modules(blocks: int) -> set[str]:
    """The block linears in official names, told by diffusers' own converter of checkpoints."""
    attention = [f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"]
    names = [f"blocks.{i}.{x}" for i in range(blocks) for x in (*attention, "ffn.0", "ffn.2")]
    converted = convert_wan_transformer_to_diffusers(
        {f"{name}.weight": torch.empty(0) for name in names}
    )
    assert set(converted) <= set(tiny_transformer(blocks).state_dict())
    return set(names)


def test_names_are_those_of_the_official_checkpoints() -> None:
    state = {name: torch.full((1, 1), float(i)) for i, name in enumerate(random_state(1))}
    ours = to_comfy(state, 1.0, 1, torch.float32)
    for factor in ("lora_A", "lora_B"):
        weights = {
            name.removeprefix("diffusion_model.").replace(f".{factor}", ""): tensor
            for name, tensor in ours.items()
            if factor in name
        }
        for name, tensor in convert_wan_transformer_to_diffusers(weights).items():
            assert torch.equal(tensor, state[name.replace(".weight", f".{factor}.weight")])


def test_comfyui_maps_every_key_and_every_delta_has_the_shape_of_its_weight() -> None:
    shapes = dict.fromkeys(official_modules(2), (WIDTH, WIDTH))
    shapes |= {name: (FFN, WIDTH) for name in shapes if name.endswith("ffn.0")}
    shapes |= {name: (WIDTH, FFN) for name in shapes if name.endswith("ffn.2")}
    tensors = to_comfy(random_state(1), 0.5, RANK, torch.bfloat16)
    for name, shape in shapes.items():
        a = tensors.pop(f"diffusion_model.{name}.lora_A.weight")
        b = tensors.pop(f"diffusion_model.{name}.lora_B.weight")
        assert (b.float() @ a.float()).shape == shape
    assert not tensors


# What other loaders take a file's keys for: official module names, or nothing if they refuse the
# file. Rules as read in the sources of spec/lora_formats.md (commits there), sections 2.0 and 2.F.


def diffsynth(names: set[str]) -> set[str]:
    keys = {name.removeprefix("diffusion_model.") for name in names}
    found = {key.replace(".lora_B.weight", "") for key in keys if ".lora_B.weight" in key}
    return {module for module in found if f"{module}.lora_A.weight" in keys}


def lightx2v(names: set[str]) -> set[str]:
    down = {
        re.sub(r"lora_A", "lora_down", name)
        for name in names
        if name.startswith("diffusion_model.")
    }
    pattern = r"diffusion_model\.(.+)\.lora_down\.weight"
    return {found[1] for name in down if (found := re.fullmatch(pattern, name))}


def wan2gp(names: set[str]) -> set[str]:
    allowed = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha")
    if not all(name.startswith("diffusion_model.") and name.endswith(allowed) for name in names):
        return set()
    return {re.sub(r"^diffusion_model\.|\.lora_[AB]\.weight$", "", name) for name in names}


def invokeai(names: set[str]) -> set[str]:
    linear = r"(?:self|cross)_attn\.[qkvo]|ffn\.[02]"
    pattern = rf"diffusion_model\.(blocks\.\d+\.(?:{linear}))\.lora_[AB]\.weight"
    return {found[1] for name in names if (found := re.fullmatch(pattern, name))}


def swarmui(names: set[str]) -> set[str]:
    is_wan = "diffusion_model.blocks.0.cross_attn.k.lora_A.weight" in names
    return invokeai(names) if is_wan else set()


def kijai(names: set[str]) -> set[str]:
    rank_stabilised = "base_model.model.blocks.0.cross_attn.k.lora_A.weight" in names
    control_lora = "diffusion_model.patch_embedding.lora_A.weight" in names
    renamed = any(
        ".attn1." in name or name.startswith(("lora_unet", "transformer.")) for name in names
    )
    return set() if rank_stabilised or control_lora or renamed else diffsynth(names)


def diffusers_0_33(names: set[str]) -> set[str]:
    tail = r"\.lora_[AB]\.weight"
    plain = all(re.fullmatch(rf"diffusion_model\.blocks\.\d+\..+{tail}", name) for name in names)
    return invokeai(names) if plain else set()


LOADERS = [diffsynth, lightx2v, wan2gp, invokeai, swarmui, kijai, diffusers_0_33]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda rule: rule.__name__)
def test_the_rules_of_other_loaders_take_every_module(
    loader: Callable[[set[str]], set[str]],
) -> None:
    assert loader(
        set(to_comfy(random_state(1, 12), 1.0, RANK, torch.bfloat16))
    ) == official_modules(12)


def test_the_key_list_of_a14b_has_its_shapes_and_its_size() -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel()  # the library's defaults are A14B
    one, state = torch.ones(1), {}
    for name, module in transformer.named_modules():
        if any(name.endswith(f".{linear}") for linear in target_modules("all")):
            out_features, in_features = module.get_parameter("weight").shape
            state[f"{name}.lora_A.weight"] = one.expand(16, in_features)
            state[f"{name}.lora_B.weight"] = one.expand(out_features, 16)
    tensors = to_comfy(state, 1.0, 16, torch.bfloat16)
    assert len(tensors) == 800
    assert {re.sub(r"\d+", "N", name, count=1) for name in tensors} == {
        f"diffusion_model.{name}.lora_{factor}.weight".replace("blocks.0", "blocks.N")
        for name in official_modules(1)
        for factor in "AB"
    }
    for name, tensor in tensors.items():
        width = 13824 if "ffn.0.lora_B" in name or "ffn.2.lora_A" in name else 5120
        assert tensor.shape == ((16, width) if "lora_A" in name else (width, 16))
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == 4_792_320 * 16 * 2  # 153.4 MB
    header = next(serialised(tensors, metadata(INFO, data_sha256(tensors))))
    assert len(header) < 1_000_000
    assert size + len(header) < 200_000_000
