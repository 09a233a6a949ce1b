"""The proof of an export finds a good file good and a bad one bad, and leaves the models alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model
from wan.experts import Experts, load_experts
from wan.lora import adapter_layers, adapter_parameters, adapter_state, attach
from wan.lora_format import export_adapter
from wan.reload import TOLERANCE, reload_errors
from wan.speed import blocks_of, prepare_blocks
from wan.variants import EXPERTS, Expert, variant

TINY = variant("tiny")
RANK, ALPHA = 3, 4.5  # a scale other than 1


@pytest.fixture
def experts(toy_model: Path, request: pytest.FixtureRequest) -> Experts:
    """A pair in training whose adapters look trained; fp32 unless the test asks for another."""
    dtype = getattr(request, "param", torch.float32)
    pair = load_experts(find_model(ModelPaths(str(toy_model)), "tiny"), dtype, torch.device("cpu"))
    for seed, expert in enumerate(EXPERTS):
        attach(pair[expert], RANK, ALPHA, target_modules("all"), dropout=0.5, seed=seed)
        pair[expert].train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(pair[expert]):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return pair


def export(
    folder: Path, experts: Experts, dtype: torch.dtype = torch.float32
) -> dict[Expert, Path]:
    info = replace(INFO, variant=TINY, rank=RANK, alpha=ALPHA)
    return {
        expert: export_adapter(
            folder, "toy", adapter_state(experts[expert]), replace(info, expert=expert), dtype
        ).path
        for expert in EXPERTS
    }


def errors_of(experts: Experts, files: dict[Expert, Path]) -> dict[Expert, float]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 2, 4, 4, generator=generator)
    text = torch.randn(5, 32, generator=generator)
    return reload_errors(experts, files, TINY, latents, text)


def tamper(path: Path, factor: float) -> None:
    tensors = load_file(path)
    save_file({name: t * factor if "lora_B" in name else t for name, t in tensors.items()}, path)


def snapshot(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in transformer.state_dict().items()}


def switches(transformer: nn.Module) -> list[tuple[str, bool]]:
    modes = [(name, module.training) for name, module in transformer.named_modules()]
    return modes + [(name, p.requires_grad) for name, p in transformer.named_parameters()]


def test_what_was_exported_in_fp32_is_what_was_trained(tmp_path: Path, experts: Experts) -> None:
    errors = errors_of(experts, export(tmp_path, experts))
    assert set(errors) == {"high", "low"}
    assert all(error < 1e-4 for error in errors.values())


def test_blocks_that_are_prepared_are_so_afterwards(tmp_path: Path, experts: Experts) -> None:
    """What `wan.speed` gave them takes other arguments than the library's forward hands over."""
    prepared = blocks_of(experts["low"])
    prepare_blocks(experts["low"], ("nothing",) * len(prepared), False, torch.device("cpu"))
    forwards = [block.forward for block in prepared]
    errors = errors_of(experts, export(tmp_path, experts))
    assert all(error < 1e-4 for error in errors.values())
    assert [block.forward for block in prepared] == forwards
    assert all("forward" not in vars(block) for block in blocks_of(experts["high"]))


def test_rounding_to_bf16_is_seen_and_small(tmp_path: Path, experts: Experts) -> None:
    errors = errors_of(experts, export(tmp_path, experts, torch.bfloat16))
    assert all(1e-4 < error < 0.02 for error in errors.values())


@pytest.mark.parametrize("experts", [torch.bfloat16], indirect=True)
def test_a_bf16_base_can_be_proved_too(tmp_path: Path, experts: Experts) -> None:
    errors = errors_of(experts, export(tmp_path, experts, torch.bfloat16))
    assert all(error < 0.05 for error in errors.values())


def test_a_file_that_is_wrong_by_a_tenth_is_found(tmp_path: Path, experts: Experts) -> None:
    files = export(tmp_path, experts)
    tamper(files["low"], 1.1)
    errors = errors_of(experts, files)
    assert errors["high"] < 1e-4
    assert 0.05 < errors["low"] < 0.2


def test_the_files_of_the_pair_must_not_be_swapped(tmp_path: Path, experts: Experts) -> None:
    files = export(tmp_path, experts)
    errors = errors_of(experts, {"high": files["low"], "low": files["high"]})
    assert all(error > 0.5 for error in errors.values())


def test_one_expert_alone_can_be_proved(tmp_path: Path, experts: Experts) -> None:
    files = export(tmp_path, experts)
    errors = errors_of(experts, {"low": files["low"]})
    assert list(errors) == ["low"]
    assert errors["low"] < 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_the_trained_adapters_are_as_before(
    tmp_path: Path, experts: Experts, training: bool
) -> None:
    files = export(tmp_path, experts)
    for transformer in experts.values():
        transformer.train(training)
    before = {expert: snapshot(experts[expert]) for expert in EXPERTS}
    modes = {expert: switches(experts[expert]) for expert in EXPERTS}
    errors_of(experts, files)
    for expert in EXPERTS:
        after = experts[expert].state_dict()
        assert after.keys() == before[expert].keys()
        assert all(torch.equal(after[name], before[expert][name]) for name in after)
        assert switches(experts[expert]) == modes[expert]
        assert experts[expert].active_adapters() == ["default"]
        layers = adapter_layers(experts[expert]).values()
        assert not any(layer.disable_adapters for layer in layers)


def test_the_proof_can_be_repeated(tmp_path: Path, experts: Experts) -> None:
    files = export(tmp_path, experts)
    assert errors_of(experts, files) == errors_of(experts, files)


def test_an_untrained_adapter_divides_by_no_zero(tmp_path: Path, toy_model: Path) -> None:
    pair = load_experts(
        find_model(ModelPaths(str(toy_model)), "tiny"), torch.float32, torch.device("cpu")
    )
    for seed, expert in enumerate(EXPERTS):
        attach(pair[expert], RANK, ALPHA, target_modules("all"), 0.0, seed)
    assert errors_of(pair, export(tmp_path, pair)) == {"high": 0, "low": 0}


def test_a_file_that_cannot_be_loaded_leaves_the_adapters_as_they_were(
    tmp_path: Path, experts: Experts
) -> None:
    files = export(tmp_path, experts)
    before, modes = snapshot(experts["high"]), switches(experts["high"])
    files["high"].write_bytes(b"no adapter")
    with pytest.raises(Exception, match=r"toy_high_noise|[Ss]afetensors|header"):
        errors_of(experts, files)
    after = experts["high"].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert switches(experts["high"]) == modes


@pytest.mark.parametrize("experts", [torch.bfloat16], indirect=True)
def test_a_model_in_bf16_is_proved_by_its_weights(tmp_path: Path, experts: Experts) -> None:
    """Its output rounds by more than a young adapter changes it."""
    files = export(tmp_path, experts, torch.bfloat16)
    assert all(error < TOLERANCE for error in errors_of(experts, files).values())
    tamper(files["low"], 1.1)
    errors = errors_of(experts, files)
    assert errors["high"] < TOLERANCE < errors["low"]
