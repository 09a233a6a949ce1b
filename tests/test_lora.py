import pytest
import torch
from adapter_examples import predict, random_state, tiny_transformer
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan.adapter_choices import BLOCK_LINEARS, target_modules
from wan.lora import (
    adapter_layers,
    adapter_parameters,
    adapter_state,
    attach,
    delta_norms,
    load_adapter_state,
)
from wan.strengths import adapter_strengths, load_adapter, set_strengths, without_adapter


def adapted(
    targets: str = "all", rank: int = 3, alpha: float = 6.0, dtype: torch.dtype = torch.float32
) -> WanTransformer3DModel:
    transformer = tiny_transformer().to(dtype)
    names = target_modules(targets) if targets in ("all", "attention", "ffn") else targets
    attach(transformer, rank, alpha, names, dropout=0.0, seed=7)
    return transformer


def randomise(transformer: WanTransformer3DModel, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def scaled_product(state: dict[str, Tensor], module: str, scale: float) -> Tensor:
    return scale * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]


@pytest.mark.parametrize(
    ("preset", "count"), [("all", 10), ("attention", 8), ("self_attention", 4), ("ffn", 2)]
)
def test_a_preset_wraps_its_linears_in_every_block(preset: str, count: int) -> None:
    transformer = tiny_transformer()
    attach(transformer, 2, 2.0, target_modules(preset), 0.0, seed=0)
    expected = {f"blocks.{i}.{linear}" for i in range(2) for linear in target_modules(preset)}
    assert set(adapter_layers(transformer)) == expected
    assert len(expected) == count * 2


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'atention'.*all, attention, self_attention, ffn"):
        target_modules("atention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_adapter_changes_no_bit_of_the_output(dtype: torch.dtype) -> None:
    transformer = tiny_transformer().to(dtype)
    before = predict(transformer)
    attach(transformer, 3, 6.0, target_modules("all"), 0.0, seed=7)
    assert torch.equal(predict(transformer), before)
    randomise(transformer)
    assert not torch.equal(predict(transformer), before)


def test_adapters_are_fp32_on_a_bf16_base_and_the_output_stays_bf16() -> None:
    transformer = adapted(dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(transformer)} == {torch.float32}
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    assert predict(transformer).dtype == torch.bfloat16


def test_only_adapters_get_gradients() -> None:
    transformer = adapted()
    randomise(transformer)
    predict(transformer).square().mean().backward()
    with_gradient = {id(p) for p in transformer.parameters() if p.grad is not None}
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    adapters = {id(p) for p in adapter_parameters(transformer)}
    assert with_gradient == trainable == adapters
    assert len(adapters) == 2 * 10 * 2
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(transformer))


def test_merged_weights_give_the_forward_of_the_adapter() -> None:
    transformer = adapted()
    randomise(transformer)
    state, merged = adapter_state(transformer), tiny_transformer()
    base = predict(merged)
    with torch.no_grad():
        for module in adapter_layers(transformer):
            merged.get_submodule(module).weight += scaled_product(state, module, 6.0 / 3)
    torch.testing.assert_close(predict(merged), predict(transformer), rtol=1e-4, atol=1e-5)
    assert (predict(merged) - base).abs().max() > 0.05


def test_the_start_is_a_function_of_seed_and_module_name() -> None:
    whole, again = adapter_state(adapted()), adapter_state(adapted())
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    part = adapter_state(adapted("attention"))
    assert part
    assert all(torch.equal(part[name], whole[name]) for name in part)
    other = tiny_transformer()
    attach(other, 3, 6.0, target_modules("all"), 0.0, seed=8)
    q = "blocks.0.attn1.to_q.lora_A.weight"
    assert not torch.equal(adapter_state(other)[q], whole[q])
    assert not torch.equal(whole["blocks.1.attn1.to_q.lora_A.weight"], whole[q])


def test_a_is_uniform_within_the_bound_of_kaiming_and_b_is_zero() -> None:
    state = adapter_state(adapted(rank=64, alpha=64.0))
    a = state["blocks.0.ffn.net.2.lora_A.weight"]  # (64, 40)
    bound = 40**-0.5
    assert 0.98 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert all(not tensor.any() for name, tensor in state.items() if ".lora_B." in name)


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    transformer, other = tiny_transformer(), tiny_transformer()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    attach(transformer, 3, 6.0, target_modules("all"), 0.0, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    attach(other, 3, 6.0, target_modules("all"), 0.0, seed=7)
    ours, theirs = adapter_state(transformer), adapter_state(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_survives_a_round_trip_and_does_not_share_memory() -> None:
    transformer = adapted()
    randomise(transformer)
    state, output = adapter_state(transformer), predict(transformer)
    copies = {name: tensor.clone() for name, tensor in state.items()}
    randomise(transformer, seed=4)
    assert all(torch.equal(state[name], copies[name]) for name in state)
    assert not torch.equal(predict(transformer), output)
    load_adapter_state(transformer, state)
    assert torch.equal(predict(transformer), output)
    assert all(
        tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in state.values()
    )


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    transformer = adapted()
    before = adapter_state(transformer)
    with pytest.raises(ValueError, match=r"the model's adapter; use the same targets"):
        load_adapter_state(transformer, adapter_state(adapted("attention")))
    with pytest.raises(ValueError, match=r"is \(2, 24\), the model needs \(3, 24\)"):
        load_adapter_state(transformer, adapter_state(adapted(rank=2)))
    assert all(torch.equal(before[name], now) for name, now in adapter_state(transformer).items())


def test_without_the_adapter_the_base_speaks_and_afterwards_all_is_back() -> None:
    transformer = adapted()
    randomise(transformer)
    base, with_adapter = predict(tiny_transformer()), predict(transformer)
    frozen = adapter_parameters(transformer)[0].requires_grad_(False)
    with without_adapter(transformer):
        assert torch.equal(predict(transformer), base)
        with without_adapter(transformer):
            assert torch.equal(predict(transformer), base)
        assert torch.equal(predict(transformer), base)
    assert torch.equal(predict(transformer), with_adapter)
    assert [p.requires_grad for p in adapter_parameters(transformer)].count(False) == 1
    assert not frozen.requires_grad


def test_without_adapter_restores_after_an_exception() -> None:
    transformer = adapted()
    randomise(transformer)
    with_adapter = predict(transformer)
    with pytest.raises(RuntimeError, match="preview failed"), without_adapter(transformer):
        raise RuntimeError("preview failed")
    assert torch.equal(predict(transformer), with_adapter)
    assert all(p.requires_grad for p in adapter_parameters(transformer))


def test_delta_norms_are_those_of_the_whole_products() -> None:
    transformer = adapted()
    assert set(delta_norms(transformer).values()) == {0.0}
    randomise(transformer)
    state, norms = adapter_state(transformer), delta_norms(transformer)
    assert list(norms) == list(adapter_layers(transformer))
    for module, norm in norms.items():
        assert norm == pytest.approx(scaled_product(state, module, 2.0).norm().item(), rel=1e-5)


def test_a_regex_chooses_full_module_names() -> None:
    transformer = adapted(r"blocks\.1\.attn[12]\.to_(q|k)")
    assert set(adapter_layers(transformer)) == {
        f"blocks.1.attn{a}.to_{x}" for a in (1, 2) for x in "qk"
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (r"blocks\.9\..*", "matches no linear of the model"),
        (["attn1.to_q", "attn3.to_q"], r"attn3.* matches no linear of the model"),
        (["to_q"], "matches no linear of the model"),
        (r"patch_embedding", "the linears of blocks .* mean patch_embedding"),
        (r".*", "the linears of blocks .* mean patch_embedding"),
        ([], "mean nothing"),
    ],
)
def test_targets_that_mean_nothing_or_too_much_are_refused(
    targets: list[str] | str, message: str
) -> None:
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match=message):
        attach(transformer, 2, 2.0, targets, 0.0, seed=0)
    assert not adapter_layers(transformer)


@pytest.mark.parametrize(
    ("rank", "alpha", "dropout"), [(0, 1.0, 0.0), (4, 0.0, 0.0), (4, -4.0, 0.0), (4, 4.0, 1.0)]
)
def test_an_adapter_that_cannot_be_is_refused(rank: int, alpha: float, dropout: float) -> None:
    with pytest.raises(ValueError, match="adapter"):
        attach(tiny_transformer(), rank, alpha, target_modules("all"), dropout, seed=0)


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(adapted(), 2, 2.0, target_modules("all"), 0.0, seed=0)


def test_dropout_works_in_training_only() -> None:
    transformer = tiny_transformer()
    attach(transformer, 3, 6.0, target_modules("all"), 0.5, seed=7)
    randomise(transformer)
    assert torch.equal(predict(transformer), predict(transformer))
    transformer.train()
    assert not torch.equal(predict(transformer), predict(transformer))


def test_the_key_map_is_one_to_one_and_complete() -> None:
    block = tiny_transformer().blocks[0]
    linears = {
        name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert linears == set(BLOCK_LINEARS)
    assert len(set(BLOCK_LINEARS.values())) == len(BLOCK_LINEARS) == 10


def merged(*adapters: tuple[dict[str, Tensor], float]) -> WanTransformer3DModel:
    """The base with the products of states, times their strengths, in its weights."""
    transformer = tiny_transformer()
    with torch.no_grad():
        for state, strength in adapters:
            for module in {key.rpartition(".lora_")[0] for key in state}:
                weight = transformer.get_submodule(module).weight
                weight += scaled_product(state, module, strength)
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_at_0_is_the_base_and_at_1_as_trained(dtype: torch.dtype) -> None:
    trained = adapted(alpha=3.0, dtype=dtype)
    randomise(trained)
    transformer = tiny_transformer().to(dtype)
    base = predict(transformer)
    load_adapter(transformer, adapter_state(trained), "fox")
    assert adapter_strengths(transformer) == {"fox": 1.0}
    assert torch.equal(predict(transformer), predict(trained))
    set_strengths(transformer, {"fox": 0.0})
    assert torch.equal(predict(transformer), base)
    set_strengths(transformer, {"fox": 1.0})
    assert torch.equal(predict(transformer), predict(trained))
    set_strengths(transformer, {})
    assert torch.equal(predict(transformer), base)
    assert not any(p.requires_grad for n, p in transformer.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("strength", [0.5, -0.7, 1.5])
def test_a_strength_scales_the_change_of_the_weights(strength: float) -> None:
    state, transformer = random_state(1), tiny_transformer()
    load_adapter(transformer, state, "fox")
    set_strengths(transformer, {"fox": strength})
    expected = predict(merged((state, strength)))
    torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-5)
    assert adapter_strengths(transformer)["fox"] == pytest.approx(strength)


def test_several_adapters_add_up_each_with_its_strength() -> None:
    fox, owl, transformer = random_state(1), random_state(2, preset="attention"), tiny_transformer()
    thin = {key: tensor[:, :1] if "_B" in key else tensor[:1] for key, tensor in owl.items()}
    thin |= {key: tensor for key, tensor in owl.items() if "to_q" in key}  # ranks may differ
    load_adapter(transformer, fox, "fox")
    set_strengths(transformer, {"fox": 0.5})
    load_adapter(transformer, owl, "owl")
    load_adapter(transformer, thin, "thin")
    assert adapter_strengths(transformer) == {"fox": 0.5, "owl": 1.0, "thin": 1.0}
    for strengths in ({"fox": 0.5, "owl": 1.0, "thin": 1.0}, {"owl": -0.25, "fox": 0.8}):
        set_strengths(transformer, strengths)
        states = {"fox": fox, "owl": owl, "thin": thin}
        expected = predict(merged(*((states[name], s) for name, s in strengths.items())))
        torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-5)
    with without_adapter(transformer):
        assert torch.equal(predict(transformer), predict(tiny_transformer()))


def test_the_adapter_in_training_stays_what_it_is_beside_others() -> None:
    transformer, state = adapted(), random_state(1, preset="ffn")
    randomise(transformer)
    own, output = adapter_state(transformer), predict(transformer)
    parameters = adapter_parameters(transformer)
    load_adapter(transformer, state, "distilled")
    expected = predict(merged((own, 2.0), (state, 1.0)))
    torch.testing.assert_close(predict(transformer), expected, rtol=1e-4, atol=1e-5)
    set_strengths(transformer, {"distilled": 1.0})
    set_strengths(transformer, {"default": 1.0})
    assert torch.equal(predict(transformer), output)
    now = adapter_parameters(transformer)
    assert [id(p) for p in now] == [id(p) for p in parameters]
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters}
    assert all(torch.equal(own[name], t) for name, t in adapter_state(transformer).items())


def test_a_loaded_adapter_that_does_not_fit_is_refused_whole() -> None:
    transformer, state = tiny_transformer(), random_state(1)
    wrong = {k: torch.cat([t, t], dim=1) if "_A" in k else t for k, t in state.items()}
    for name, tensors, message in [
        ("fox", random_state(1, blocks=3), "the model has no blocks.2.attn1.to_q"),
        ("fox", wrong, r"to_q is \(24, 48\) \(out, in\), that of the model \(24, 24\)"),
        ("a.b", state, "'a.b': it is taken, empty or has a dot"),
        ("", state, "cannot be called ''"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapter(transformer, tensors, name)
        assert adapter_strengths(transformer) == {}
    load_adapter(transformer, state, "fox")
    with pytest.raises(ValueError, match="'fox': it is taken"):
        load_adapter(transformer, state, "fox")
    with pytest.raises(ValueError, match="has an adapter already"):
        attach(transformer, 2, 2.0, target_modules("all"), 0.0, seed=0)


def test_strengths_that_cannot_be_are_refused() -> None:
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match="no adapter is called 'fox'; known: none"):
        set_strengths(transformer, {"fox": 1.0})
    load_adapter(transformer, random_state(1), "owl")
    with pytest.raises(ValueError, match="no adapter is called 'fox'; known: owl"):
        set_strengths(transformer, {"fox": 1.0})
    with pytest.raises(ValueError, match="must be a number; found nan"):
        set_strengths(transformer, {"owl": float("nan")})


def test_loading_neither_uses_nor_moves_the_global_generator() -> None:
    transformer = tiny_transformer()
    before = torch.get_rng_state()
    load_adapter(transformer, random_state(1), "fox")
    assert torch.equal(torch.get_rng_state(), before)
