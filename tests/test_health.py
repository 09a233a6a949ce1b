"""Health of an adapter: the figures of a singular value decomposition, without one."""

import pytest
import torch
from adapter_examples import tiny_transformer
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from train.health import adapter_health, singular_values, spread, summarised
from wan.adapter_choices import KINDS, Kind, target_modules
from wan.adapter_kinds import plain_factors, weight_change
from wan.lora import ADAPTER, adapter_layers, adapter_parameters, adapter_state, attach

RANK, ALPHA = 4, 6


def moved(transformer: WanTransformer3DModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def attached(kind: Kind) -> WanTransformer3DModel:
    transformer = tiny_transformer()
    attach(transformer, RANK, ALPHA, target_modules("all"), 0.0, 7, kind)
    return transformer


@pytest.mark.parametrize(
    ("rank", "wide", "out"), [(4, 32, 16), (1, 8, 8), (24, 16, 32), (24, 32, 16)]
)
def test_singular_values_are_those_of_the_product(rank: int, wide: int, out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rank, wide, generator=generator, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    b[:, 0] *= 1e-4
    true = torch.linalg.svdvals(b @ a)[: min(rank, wide, out)]
    torch.testing.assert_close(singular_values(a, b), true, rtol=1e-6, atol=1e-6)
    assert not singular_values(a, 0 * b).any()


def test_the_effective_rank_counts_directions_that_are_used() -> None:
    assert spread(torch.tensor([2.0, 2.0, 2.0, 2.0])) == (pytest.approx(4), 0.0)
    assert spread(torch.tensor([5.0, 0.0, 0.0, 0.0])) == (pytest.approx(1), 0.75)
    effective, dead = spread(torch.tensor([1.0, 0.5, 0.02, 0.009]))
    assert 1 < effective < 4
    assert dead == 0.25
    assert spread(torch.zeros(4)) == (0.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_matrices(kind: Kind) -> None:
    transformer = attached(kind)
    moved(transformer, 1)
    earlier = adapter_state(transformer)
    before = {m: _product(layer) for m, layer in adapter_layers(transformer).items()}
    moved(transformer, 2)
    state = adapter_state(transformer)
    health = adapter_health(transformer, earlier)
    assert health.keys() == before.keys()
    for module, layer in adapter_layers(transformer).items():
        norm = weight_change(layer, ADAPTER).norm().item()
        assert health[module].norm == pytest.approx(norm, rel=1e-4)
        change = (_product(layer) - before[module]).norm().item()
        assert health[module].update == pytest.approx(change, rel=1e-4)
        assert 1 <= health[module].effective_rank <= 32
    after = adapter_state(transformer)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def _product(layer: torch.nn.Module) -> torch.Tensor:
    """s B A (out, in)."""
    a, b = plain_factors(layer, ADAPTER)  # pyright: ignore[reportArgumentType]
    return (layer.scaling[ADAPTER] * (b @ a)).detach().clone()  # pyright: ignore


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_all_dead_and_has_not_moved(kind: Kind) -> None:
    transformer = attached(kind)
    figures = summarised(adapter_health(transformer, adapter_state(transformer)))
    assert figures["norm"] == pytest.approx(0, abs=1e-5)
    assert (figures["update"], figures["dead"]) == (pytest.approx(0, abs=1e-6), 1.0)
    assert figures["effective_rank"] == 0


def test_without_an_earlier_state_the_update_is_all_of_it() -> None:
    transformer = attached("lora")
    moved(transformer, 1)
    for layer in adapter_health(transformer, None).values():
        assert layer.update == pytest.approx(layer.norm, rel=1e-6)


def test_figures_add_up_by_block_and_by_kind_of_linear() -> None:
    transformer = attached("lora")
    moved(transformer, 1)
    figures = summarised(adapter_health(transformer, None))
    for name in ("norm", "update"):
        blocks = [v for n, v in figures.items() if n.startswith(f"{name}/block_")]
        kinds = [figures[f"{name}/{kind}"] for kind in target_modules("all")]
        assert len(blocks) == len(transformer.blocks)
        assert f"{name}/block_00" in figures
        for parts in (blocks, kinds):
            whole = sum(value**2 for value in parts) ** 0.5
            assert whole == pytest.approx(figures[name], rel=1e-9)
    assert figures["effective_rank/ffn.net.2"] > 1
