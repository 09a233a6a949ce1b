import pytest
import torch
from adapter_examples import FFN, WIDTH, predict, tiny_transformer
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.loha.layer import Linear as PeftLoha
from peft.tuners.lokr.layer import Linear as PeftLokr
from peft.tuners.lora.layer import Linear as PeftLora
from torch import Tensor, nn

from wan.adapter_choices import KINDS, Kind, module_ranks, target_modules
from wan.adapter_kinds import base_linear, kron_sides, weight_change
from wan.lora import (
    ADAPTER,
    adapter_layers,
    adapter_parameters,
    adapter_state,
    attach,
    delta_norms,
    load_adapter_state,
    named_adapter_parameters,
)
from wan.strengths import without_adapter

RANK, ALPHA = 4, 6


def attached(kind: Kind, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    transformer = tiny_transformer().to(dtype)  # pyright: ignore[reportArgumentType] (decorated)
    attach(transformer, RANK, ALPHA, target_modules("all"), 0.0, 7, kind)
    return transformer


def trained(kind: Kind, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """As after training: what is zero at the start is not."""
    transformer = attached(kind, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def seen_change(layer: PeftLora) -> Tensor:
    """What a layer adds to W, (out, in), measured by what it does to unit vectors."""
    unit = torch.eye(base_linear(layer).in_features)
    with torch.no_grad():
        return (layer(unit) - layer.base_layer(unit)).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_does(
    kind: Kind, dtype: torch.dtype
) -> None:
    base = predict(tiny_transformer().to(dtype))  # pyright: ignore[reportArgumentType]
    assert torch.equal(predict(attached(kind, dtype)), base)
    transformer = trained(kind, dtype)
    assert not torch.equal(predict(transformer), base)
    with without_adapter(transformer):
        assert torch.equal(predict(transformer), base)
    assert {p.dtype for p in adapter_parameters(transformer)} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_that_is_told_is_the_one_that_is_seen(kind: Kind) -> None:
    layers = adapter_layers(trained(kind))
    for module, layer in layers.items():
        told = weight_change(layer, ADAPTER)
        torch.testing.assert_close(seen_change(layer), told, rtol=1e-4, atol=1e-5, msg=module)
        assert told.norm() > 0.01
    assert delta_norms(trained(kind)) == pytest.approx(
        {m: weight_change(layer, ADAPTER).norm().item() for m, layer in layers.items()}, rel=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_model_computes_about_the_same(kind: Kind) -> None:
    exact, rounded = trained(kind), trained(kind, torch.bfloat16)
    change = predict(exact) - predict(tiny_transformer())
    error = predict(rounded).float() - predict(exact)
    assert error.norm() < 0.2 * change.norm()  # that of the base is half of it


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_of_a_kind_are_trained_and_nothing_else(kind: Kind) -> None:
    transformer = trained(kind)
    predict(transformer).square().mean().backward()
    for name, parameter in named_adapter_parameters(transformer).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(transformer)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_a_kind_survives_a_round_trip(kind: Kind) -> None:
    transformer, other = trained(kind), attached(kind)
    load_adapter_state(other, adapter_state(transformer))
    assert torch.equal(predict(other), predict(transformer))


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_the_start_is_a_function_of_seed_and_module_name(kind: Kind) -> None:
    part = tiny_transformer()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    attach(part, RANK, ALPHA, target_modules("ffn"), 0.0, 7, kind)
    assert torch.equal(torch.get_rng_state(), before)
    whole, some = adapter_state(attached(kind)), adapter_state(part)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in some.items())
    attach(other := tiny_transformer(), RANK, ALPHA, target_modules("ffn"), 0.0, 8, kind)
    assert any(not torch.equal(t, some[name]) for name, t in adapter_state(other).items())


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    for layer in adapter_layers(attached("rslora")).values():
        assert layer.scaling[ADAPTER] == pytest.approx(ALPHA / RANK**0.5)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_products_are_those_of_peft(kind: Kind) -> None:
    layer = adapter_layers(trained(kind))["blocks.0.ffn.net.0.proj"]  # (40, 24)
    ours = dict(layer.lora_A[ADAPTER].named_parameters())
    base = nn.Linear(WIDTH, FFN)
    (p, m), (q, n) = kron_sides(FFN), kron_sides(WIDTH)
    if kind == "loha":
        theirs = PeftLoha(base, "x", config=LoHaConfig(), r=RANK, alpha=ALPHA)
    else:
        theirs = PeftLokr(base, "x", config=LoKrConfig(), r=RANK, alpha=ALPHA)
        theirs.lokr_w1["x"] = nn.Parameter(torch.zeros(p, q))
        theirs.lokr_w2["x"] = nn.Parameter(torch.zeros(m, n))
        ours["lokr_w2"] = nn.Parameter(ours.pop("lokr_w2_a") @ ours.pop("lokr_w2_b"))
    for name, tensor in ours.items():
        getattr(theirs, name)["x"] = tensor
    torch.testing.assert_close(theirs.get_delta_weight("x"), weight_change(layer, ADAPTER))


def test_a_dora_is_that_of_peft() -> None:
    layer = adapter_layers(trained("dora"))["blocks.0.ffn.net.0.proj"]
    config = LoraConfig(use_dora=True)
    theirs = PeftLora(layer.base_layer, "x", config, r=RANK, lora_alpha=ALPHA)
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(theirs, name)["x"].weight = getattr(layer, name)[ADAPTER].weight
    x = torch.randn(3, WIDTH)
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected)
    parameters = [getattr(layer, n)[ADAPTER].weight for n in ("lora_A", "lora_B")]
    parameters.append(layer.lora_magnitude_vector[ADAPTER].weight)
    gradients = torch.autograd.grad(ours.square().sum(), parameters)
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_a_kind_compiles_in_one_graph(kind: Kind) -> None:
    transformer = trained(kind, torch.bfloat16)
    expected = predict(transformer)
    torch._dynamo.reset()
    for block in transformer.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(predict(transformer), expected)


LINEARS = [f"blocks.{i}.{linear}" for i in range(12) for linear in target_modules("all")]


def test_a_pattern_gives_blocks_another_rank_and_the_scale_stays() -> None:
    pattern = {r"blocks\.1\.ffn.*": 2, r"blocks\.1\..*": 8}
    here = LINEARS[:20]
    ranks = module_ranks(here, target_modules("all"), RANK, pattern)
    assert ranks["blocks.0.ffn.net.2"] == RANK
    assert ranks["blocks.1.ffn.net.2"] == 2
    assert ranks["blocks.1.attn1.to_q"] == 8
    for kind in KINDS:
        attach(transformer := tiny_transformer(), RANK, ALPHA, ranks, 0.0, 7, kind)
        layers = adapter_layers(transformer)
        assert {module: layer.r[ADAPTER] for module, layer in layers.items()} == ranks
        root = RANK**0.5 if kind == "rslora" else RANK
        for layer in layers.values():
            assert layer.scaling[ADAPTER] == pytest.approx(ALPHA / root)


@pytest.mark.parametrize(
    ("targets", "pattern", "message"),
    [
        (r"blocks\.[", {}, "is no regular expression"),
        (r"blocks\.[0-9]\.ffn.*", {r"blocks\.11\.ffn.*": 2}, "no linear that gets an adapter"),
        (r"blocks\.1", {}, "matches no linear of the model"),
    ],
)
def test_regexes_that_mean_nothing_are_refused(
    targets: str, pattern: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module_ranks(LINEARS, targets, RANK, pattern)
