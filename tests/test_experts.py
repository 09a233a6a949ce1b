"""The pair of experts: a mapping that hands out loaded models, and the base beneath adapters."""

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.experts import Experts, base_only, load_experts
from wan.lora import adapter_parameters, adapter_state, attach
from wan.variants import EXPERTS, Expert

CPU = torch.device("cpu")


@pytest.fixture
def experts(toy_model: Path) -> Experts:
    return load_experts(find_model(ModelPaths(str(toy_model)), "tiny"), torch.float32, CPU)


def adapt(transformer: WanTransformer3DModel, seed: int) -> None:
    """Attach an adapter that does something."""
    attach(transformer, 2, 2.0, target_modules("all"), 0.0, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def output(transformer: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 1, 4, 4, generator=generator)
    text = torch.randn(1, 6, 32, generator=generator)
    return transformer(latents, torch.tensor([900.0]), text, return_dict=False)[0]


def test_both_experts_are_there_by_name(experts: Experts) -> None:
    assert tuple(experts) == EXPERTS
    assert len(experts) == 2
    assert "low" in experts
    with pytest.raises(KeyError):
        experts["medium"]  # type: ignore[index]


def test_asking_again_gives_the_same_model(experts: Experts) -> None:
    assert experts["high"] is experts["high"]
    assert experts["high"] is not experts["low"]
    assert all(transformer.device == CPU for transformer in experts.values())


def test_each_expert_has_the_weights_of_its_folder(toy_model: Path, experts: Experts) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    for expert in EXPERTS:
        alone = load_transformer(folder, expert, torch.float32, CPU)
        assert torch.equal(output(experts[expert]), output(alone))
    assert not torch.equal(output(experts["high"]), output(experts["low"]))


def test_experts_are_loaded_frozen_in_the_dtype_asked_for(toy_model: Path) -> None:
    loaded = load_experts(find_model(ModelPaths(str(toy_model)), "tiny"), torch.bfloat16, CPU)
    for transformer in loaded.values():
        assert transformer.dtype == torch.bfloat16
        assert not transformer.training
        assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_base_only_gives_the_base_and_then_the_adapters_back(experts: Experts) -> None:
    base = {expert: output(experts[expert]) for expert in EXPERTS}
    for seed, expert in enumerate(EXPERTS):
        adapt(experts[expert], seed)
    adapted = {expert: output(experts[expert]) for expert in EXPERTS}
    before = {expert: adapter_state(experts[expert]) for expert in EXPERTS}
    with base_only(experts, EXPERTS):
        for expert in EXPERTS:
            assert torch.equal(output(experts[expert]), base[expert])
    for expert in EXPERTS:
        assert not torch.equal(adapted[expert], base[expert])
        assert torch.equal(output(experts[expert]), adapted[expert])
        assert all(p.requires_grad for p in adapter_parameters(experts[expert]))
        after = adapter_state(experts[expert])
        assert all(torch.equal(after[name], before[expert][name]) for name in after)


@pytest.mark.parametrize("trained", EXPERTS)
def test_base_only_with_one_adapted_expert(experts: Experts, trained: Expert) -> None:
    base = {expert: output(experts[expert]) for expert in EXPERTS}
    adapt(experts[trained], 1)
    with base_only(experts, [trained]):
        assert all(torch.equal(output(experts[e]), base[e]) for e in EXPERTS)
    assert not torch.equal(output(experts[trained]), base[trained])


def test_base_only_restores_after_an_error(experts: Experts) -> None:
    adapt(experts["low"], 1)
    adapted = output(experts["low"])
    with pytest.raises(RuntimeError, match="out of memory"), base_only(experts, ["low"]):
        raise RuntimeError("out of memory")
    assert torch.equal(output(experts["low"]), adapted)
    assert all(p.requires_grad for p in adapter_parameters(experts["low"]))


GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def load_pair(path: Path) -> dict[Expert, WanTransformer3DModel]:
    model = find_model(ModelPaths(str(path)), "tiny")
    return {expert: load_transformer(model, expert, torch.float32, "cpu") for expert in EXPERTS}


@pytest.mark.gpu
@needs_gpu
def test_only_the_expert_that_was_asked_for_is_on_the_device(toy_model: Path) -> None:
    pair = load_pair(toy_model)
    experts = Experts(dict(pair), GPU)
    for asked, other in [("high", "low"), ("low", "high")]:
        assert experts[asked].device.type == "cuda"
        assert pair[other].device.type == "cpu"


@pytest.mark.gpu
@needs_gpu
def test_weights_and_training_survive_being_swapped(toy_model: Path) -> None:
    before = {
        e: {n: p.clone() for n, p in t.named_parameters()} for e, t in load_pair(toy_model).items()
    }
    experts = Experts(dict(load_pair(toy_model)), GPU)
    adapt(experts["high"], 1)
    adapters = {name: tensor.clone() for name, tensor in adapter_state(experts["high"]).items()}
    for _ in range(3):
        for expert in EXPERTS:
            for parameter in adapter_parameters(experts[expert]):
                assert parameter.device == GPU
            base = {
                name.replace(".base_layer", ""): parameter.cpu()
                for name, parameter in experts[expert].named_parameters()
                if "lora_" not in name
            }
            assert all(torch.equal(base[name], before[expert][name]) for name in base)
    after = adapter_state(experts["high"])
    assert all(torch.equal(after[name], adapters[name].to(after[name].device)) for name in after)


@pytest.mark.gpu
@needs_gpu
def test_both_experts_may_stay_on_the_device(toy_model: Path) -> None:
    pair = load_pair(toy_model)
    experts = Experts(dict(pair), GPU, placement="resident")
    assert all(experts[expert].device == GPU for expert in EXPERTS)
    assert all(transformer.device == GPU for transformer in pair.values())
