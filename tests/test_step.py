"""The mathematics of one step: noise by sample number, and the error against one by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.batches import Batch
from tests.toy_runs import batch_of
from train.step import NoiseDraw, draw_noise, velocity_error
from wan import lora
from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.flow import TimestepLaw, expert_range
from wan.transformer import TEXT_LEN, TEXT_PART, sinusoid
from wan.variants import EXPERTS, Expert, variant

LAW = TimestepLaw("logit_normal", shift=3.0)
SHAPE = (4, 16, 2, 4, 6)
TINY, FP32 = variant("tiny"), torch.float32


def draw(count: int, first: int, seed: int = 5, low_discrepancy: bool = True) -> NoiseDraw:
    shape = (count, *SHAPE[1:])
    return draw_noise(LAW, expert_range(0.875, "high"), shape, seed, first, low_discrepancy)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def transformer(toy_model: Path, request: pytest.FixtureRequest) -> WanTransformer3DModel:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
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
    model = load_transformer(find_model(ModelPaths(str(toy_model)), "tiny"), "low", FP32, "cpu")
    latents, text = random(2, *SHAPE[1:]), [random(3, 32), random(512, 32)]
    noisy = NoiseDraw(torch.tensor([0.25, 0.8125]), random(2, 16, 2, 4, 6) * 2)
    error = velocity_error(model, batch_of(latents, text), noisy, TINY)

    for row, sigma in enumerate([0.25, 0.8125]):  # each alone: a sample's error is its own
        padded = torch.cat([text[row], torch.zeros(512 - len(text[row]), 32)])
        expected = by_hand(model, latents[row], padded, sigma, noisy.noise[row])
        assert error[row].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def by_hand(
    model: WanTransformer3DModel, x0: Tensor, text: Tensor, sigma: float, noise: Tensor
) -> float:
    """The error of one sample, by the library's own forward pass."""
    x = (1 - sigma) * x0 + sigma * noise
    predicted = model(x[None], torch.tensor([1000 * sigma]), text[None]).sample[0]
    return (((predicted - (noise - x0)) ** 2).sum() / x0.numel()).item()


def test_the_model_gets_its_dtype_and_padded_text_and_fp32_timesteps(
    transformer: WanTransformer3DModel,
) -> None:
    embedder = transformer.condition_embedder
    given: dict[str, Tensor] = {}

    def note(name: str, part: nn.Module) -> RemovableHandle:
        return part.register_forward_pre_hook(lambda _, inputs: given.update({name: inputs[0]}))

    hooks = [
        note("text", embedder.text_embedder),
        note("time", embedder.time_embedder),
        note("attention", transformer.get_submodule("blocks.0.attn1")),
    ]
    noisy = draw(2, 0)
    text = [random(1, 32), random(7, 32)]
    velocity_error(transformer, batch_of(random(2, *SHAPE[1:]), text), noisy, TINY)
    for hook in hooks:
        hook.remove()
    assert given["attention"].dtype == given["text"].dtype == transformer.dtype
    assert given["time"].dtype == torch.float32
    assert torch.equal(given["time"][:, 0], sinusoid(1000 * noisy.sigma, 32))
    rows = TEXT_PART if transformer.dtype == torch.float32 else TEXT_LEN  # of those alike, one
    assert given["text"].shape == (2, rows, 32)
    for row, embedding in zip(given["text"], text, strict=True):
        assert torch.equal(row[: len(embedding)], embedding.to(row.dtype))
        assert not row[len(embedding) :].any()


def test_padding_counts(toy_model: Path) -> None:
    # The model attends to all rows: text that were trimmed would be another condition.
    model = load_transformer(find_model(ModelPaths(str(toy_model)), "tiny"), "low", FP32, "cpu")
    latents, text, noisy = random(1, *SHAPE[1:]), random(3, 32), draw(1, 0)
    error = velocity_error(model, batch_of(latents, [text]), noisy, TINY).item()
    padded, trimmed = (
        by_hand(model, latents[0], rows, noisy.sigma.item(), noisy.noise[0])
        for rows in (torch.cat([text, torch.zeros(509, 32)]), text)
    )
    assert error == pytest.approx(padded, rel=1e-5)
    assert error != pytest.approx(trimmed, rel=1e-4)


def test_the_loss_is_fp32_one_for_each_sample(transformer: WanTransformer3DModel) -> None:
    batch = batch_of(random(2, *SHAPE[1:]), [random(3, 32)] * 2)
    error = velocity_error(transformer, batch, draw(2, 0), TINY)
    assert error.dtype == torch.float32
    assert error.shape == (2,)
    # Not a sum rounded to bf16, whose mantissa ends after 8 bits.
    assert not torch.equal(error, error.bfloat16().float())


def test_bf16_is_close_to_fp32(toy_model: Path) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    batch = batch_of(random(2, *SHAPE[1:]), [random(3, 32)] * 2)
    fine, coarse = (
        velocity_error(load_transformer(folder, "high", dtype, "cpu"), batch, draw(2, 0), TINY)
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

    embedder = transformer.condition_embedder
    hooks = [
        part.register_forward_hook(note) for part in (embedder.time_embedder, embedder.time_proj)
    ]
    velocity_error(transformer, batch_of(random(1, *SHAPE[1:]), [random(3, 32)]), draw(1, 0), TINY)
    for hook in hooks:
        hook.remove()
    assert dtypes == [torch.float32] * 2


def masked(batch: Batch, weights: Tensor) -> Batch:
    return replace(batch, mask=weights.expand(len(batch.latents), *weights.shape[-3:]))


def test_a_mask_of_ones_is_no_mask(transformer: WanTransformer3DModel) -> None:
    batch = batch_of(random(2, *SHAPE[1:]), [random(3, 32)] * 2)
    plain = velocity_error(transformer, batch, draw(2, 0), TINY)
    ones = velocity_error(transformer, masked(batch, torch.ones(2, 4, 6)), draw(2, 0), TINY)
    assert torch.equal(plain, ones)


def test_only_what_a_mask_shows_is_learned(transformer: WanTransformer3DModel) -> None:
    """The error is the weighted mean of the places: what is hidden has no say, and no gradient."""
    batch, noisy = batch_of(random(2, *SHAPE[1:]), [random(3, 32)] * 2), draw(2, 0)
    outputs: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    hook = transformer.proj_out.register_forward_hook(note)
    shown = torch.zeros(2, 4, 6)
    shown[0, :2, :2], shown[1, 2:, 4:] = 1.0, 0.25  # two patches of 2 x 2
    transformer.requires_grad_(True)
    error = velocity_error(transformer, masked(batch, shown), noisy, TINY)
    error.sum().backward()
    hook.remove()
    transformer.requires_grad_(False)
    transformer.zero_grad(set_to_none=True)

    (output,) = outputs  # (B, L, 64) of 2 x 2 x 3 patches
    assert output.grad is not None
    reached = output.grad.abs().amax(dim=(0, 2)).unflatten(0, (2, 2, 3)) > 0
    assert reached.nonzero().tolist() == [[0, 0, 0], [1, 1, 2]]
    alone = [
        velocity_error(transformer, masked(batch, (shown == value).float()), noisy, TINY)
        for value in (1.0, 0.25)
    ]
    assert torch.allclose(error, (alone[0] * 4 + alone[1] * 1) / 5, rtol=1e-5)


def test_samples_of_a_batch_have_masks_of_their_own(transformer: WanTransformer3DModel) -> None:
    batch, noisy = batch_of(random(2, *SHAPE[1:]), [random(3, 32)] * 2), draw(2, 0)
    half = torch.zeros(2, 4, 6)
    half[:, :2] = 1
    mixed = replace(batch, mask=torch.stack([half, torch.ones(2, 4, 6)]))
    plain, halves, both = (
        velocity_error(transformer, each, noisy, TINY)
        for each in (batch, masked(batch, half), mixed)
    )
    assert torch.equal(both, torch.stack([halves[0], plain[1]]))
    assert not torch.equal(halves[0], plain[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_host_never_waits_for_the_device_within_a_step(toy_model: Path) -> None:
    folder = find_model(ModelPaths(str(toy_model)), "tiny")
    transformer = load_transformer(folder, "high", torch.bfloat16, "cuda")
    lora.attach(transformer, 4, 4.0, target_modules("all"), 0.0, seed=0)
    batch = batch_of(random(2, *SHAPE[1:]), [random(3, 32), random(5, 32)])
    for mode in ("default", "error"):  # the first pass makes handles and picks kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            velocity_error(transformer, batch, draw(2, 0), TINY).mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
