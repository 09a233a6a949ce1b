"""The mathematics of one step: noise by sample number, and the error against one by hand."""

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from train.step import NoiseDraw, draw_noise, velocity_error
from wan.checkpoints import find_model, load_transformer
from wan.flow import TimestepLaw, expert_range
from wan.variants import EXPERTS, Expert

LAW = TimestepLaw("logit_normal", shift=3.0)
SHAPE = (4, 16, 2, 4, 6)
TEXT_LEN = 20


def draw(count: int, first: int, seed: int = 5, low_discrepancy: bool = True) -> NoiseDraw:
    shape = (count, *SHAPE[1:])
    return draw_noise(LAW, expert_range(0.875, "high"), shape, seed, first, low_discrepancy)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def transformer(toy_model: Path, request: pytest.FixtureRequest) -> WanTransformer3DModel:
    folder = find_model(str(toy_model), "tiny")
    return load_transformer(folder, "high", getattr(torch, request.param), "cpu")


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_a_sample_has_its_noise_whatever_the_batch_it_is_in(low_discrepancy: bool) -> None:
    together = draw(4, 8, low_discrepancy=low_discrepancy)
    alone = [draw(1, 8 + i, low_discrepancy=low_discrepancy) for i in range(4)]
    assert torch.equal(together.noise, torch.cat([one.noise for one in alone]))
    assert torch.equal(together.sigma, torch.cat([one.sigma for one in alone]))


def test_the_global_generator_has_no_say() -> None:
    torch.manual_seed(1)
    first, state = draw(2, 0), torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(1).get_state())  # and is left alone
    torch.manual_seed(2)
    assert torch.equal(draw(2, 0).noise, first.noise)


def test_samples_and_seeds_differ() -> None:
    noise = [*draw(4, 0).noise, *draw(4, 0, seed=6).noise]
    assert len({tuple(row.flatten()[:4].tolist()) for row in noise}) == 8
    assert not torch.equal(draw(4, 0).sigma, draw(4, 0, seed=6).sigma)


def test_noise_is_standard_normal_in_fp32() -> None:
    noise = draw(64, 0).noise
    assert noise.dtype == draw(1, 0).sigma.dtype == torch.float32
    assert noise.shape == (64, *SHAPE[1:])
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("shift", [0.2, 1.0, 12.0])
def test_sigma_is_always_in_the_range_of_the_expert(
    expert: Expert, low_discrepancy: bool, shift: float
) -> None:
    levels = expert_range(0.875, expert)
    law = TimestepLaw("logit_normal", shift, scale=2.0)
    sigma = draw_noise(law, levels, (2000, 1, 1, 1, 1), 3, 0, low_discrepancy).sigma
    assert ((sigma >= levels.low) & (sigma <= levels.high)).all()
    assert ((sigma >= 0.875) == (expert == "high")).all()
    assert sigma.unique().numel() > 1000


def test_the_error_is_that_of_a_computation_by_hand(toy_model: Path) -> None:
    model = load_transformer(find_model(str(toy_model), "tiny"), "low", torch.float32, "cpu")
    latents, text = random(2, *SHAPE[1:]), [random(3, 32), random(TEXT_LEN, 32)]
    noisy = NoiseDraw(torch.tensor([0.25, 0.8125]), random(2, 16, 2, 4, 6) * 2)
    error = velocity_error(model, latents, text, noisy, TEXT_LEN)

    for row, sigma in enumerate([0.25, 0.8125]):  # each alone: a sample's error is its own
        x0, noise = latents[row], noisy.noise[row]
        padded = torch.cat([text[row], torch.zeros(TEXT_LEN - len(text[row]), 32)])
        x = (1 - sigma) * x0 + sigma * noise
        predicted = model(x[None], torch.tensor([1000 * sigma]), padded[None]).sample[0]
        by_hand = ((predicted - (noise - x0)) ** 2).sum() / x0.numel()
        assert error[row].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_model_gets_its_dtype_and_padded_text_and_fp32_timesteps(
    transformer: WanTransformer3DModel,
) -> None:
    given: list[Tensor] = []
    hook = transformer.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    noisy = draw(2, 0)
    text = [random(1, 32), random(7, 32)]
    velocity_error(transformer, random(2, *SHAPE[1:]), text, noisy, TEXT_LEN)
    hook.remove()
    x, timestep, padded = given
    assert x.dtype == padded.dtype == transformer.dtype
    assert timestep.dtype == torch.float32
    assert torch.equal(timestep, 1000 * noisy.sigma)
    assert padded.shape == (2, TEXT_LEN, 32)
    for row, embedding in zip(padded, text, strict=True):
        assert torch.equal(row[: len(embedding)], embedding.to(padded.dtype))
        assert not row[len(embedding) :].any()


def test_padding_counts() -> None:
    # The model attends to all rows: text that were trimmed would be another condition.
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=8, freq_dim=8,
        text_dim=32,
    )  # fmt: skip
    latents, text, noisy = random(1, *SHAPE[1:]), [random(3, 32)], draw(1, 0)
    errors = [velocity_error(model, latents, text, noisy, length) for length in (3, TEXT_LEN)]
    assert not torch.equal(*errors)


def test_the_loss_is_fp32_one_for_each_sample(transformer: WanTransformer3DModel) -> None:
    latents, text = random(2, *SHAPE[1:]), [random(3, 32)] * 2
    error = velocity_error(transformer, latents, text, draw(2, 0), TEXT_LEN)
    assert error.dtype == torch.float32
    assert error.shape == (2,)
    # Not a sum rounded to bf16, whose mantissa ends after 8 bits.
    assert not torch.equal(error, error.bfloat16().float())


def test_bf16_is_close_to_fp32(toy_model: Path) -> None:
    folder = find_model(str(toy_model), "tiny")
    latents, text = random(2, *SHAPE[1:]), [random(3, 32)] * 2
    fine, coarse = (
        velocity_error(
            load_transformer(folder, "high", dtype, "cpu"), latents, text, draw(2, 0), TEXT_LEN
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.allclose(fine, coarse, rtol=0.01)
    assert not torch.equal(fine, coarse)


def test_the_time_path_is_fp32_in_training_as_in_sampling(
    transformer: WanTransformer3DModel,
) -> None:
    dtypes: list[torch.dtype] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes.append(output.dtype)

    hook = transformer.condition_embedder.time_embedder.register_forward_hook(note)
    velocity_error(transformer, random(1, *SHAPE[1:]), [random(3, 32)], draw(1, 0), TEXT_LEN)
    hook.remove()
    assert dtypes == [torch.float32]
