"""Our forward pass: the library's mathematics in fp32, nearer to it than the library in bf16."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn

from tools.measure_precision import load_in_bf16, measure, random_inputs, random_transformer
from wan import lora
from wan.adapter_choices import target_modules
from wan.flow import noise_like
from wan.speed import prepare_blocks
from wan.transformer import block_forward, embed_time, predict_velocity, sinusoid

TEXT_DIM = 64
FRAMES, ROWS, COLUMNS = 3, 2, 4  # of tokens
TIMESTEP = torch.tensor([957.0, 833.0])
TEXT = torch.cat([noise_like((2, 20, TEXT_DIM), 0, "text"), torch.zeros(2, 492, TEXT_DIM)], dim=1)


class OfficialSinusoid(Timesteps):
    """In place of the library's, which computes in fp32 and is off by 3e-5: see test_official."""

    def forward(self, timesteps: Tensor) -> Tensor:
        return sinusoid(timesteps, self.num_channels)


def transformer_of(in_channels: int = 16, layers: int = 2) -> WanTransformer3DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_layers=layers,
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=in_channels,
            out_channels=16,
            ffn_dim=96,
            freq_dim=32,
            text_dim=TEXT_DIM,
        )
    return transformer.eval()


def give_official_sinusoid(transformer: WanTransformer3DModel) -> None:
    proj = OfficialSinusoid(num_channels=32, flip_sin_to_cos=True, downscale_freq_shift=0)
    transformer.condition_embedder.timesteps_proj = proj


def with_adapter(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    lora.attach(transformer, 4, 4.0, target_modules("all"), dropout=0.0, seed=0)
    for place, parameter in enumerate(lora.adapter_parameters(transformer)):
        parameter.data.add_(noise_like(parameter.shape, 1, place), alpha=0.05)
    return transformer.train()


def latents(channels: int = 16, frames: int = FRAMES) -> Tensor:
    return noise_like((2, channels, frames, 2 * ROWS, 2 * COLUMNS), 0, "x")


def library_velocity(
    transformer: WanTransformer3DModel, x: Tensor, given: Sequence[bool] | None = None
) -> Tensor:
    """The library's forward pass: with `given`, a timestep for each token, as its pipelines do."""
    timestep = TIMESTEP
    if given is not None:
        timestep = TIMESTEP[:, None].repeat(1, x.shape[2] * ROWS * COLUMNS)  # (B, L)
        timestep[list(given), : ROWS * COLUMNS] = 0
    return transformer(x, timestep, TEXT, return_dict=False)[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("given", [None, (True, True), (True, False), (False, False)])
@pytest.mark.parametrize("in_channels", [16, 36, 48])
@torch.no_grad()
def test_equals_the_library_in_fp32(in_channels: int, given: tuple[bool, bool] | None) -> None:
    transformer, x = transformer_of(in_channels), latents(in_channels)
    flags = None if given is None else torch.tensor(given)
    found = predict_velocity(transformer, x, TIMESTEP, TEXT, flags)
    assert relative(found, library_velocity(transformer, x, given)) < 1e-5
    give_official_sinusoid(transformer)
    assert relative(found, library_velocity(transformer, x, given)) < 1e-6


@torch.no_grad()
def test_a_given_first_frame_shows_in_its_own_sample_only() -> None:
    transformer, x = transformer_of(), latents()
    plain = predict_velocity(transformer, x, TIMESTEP, TEXT)
    mixed = predict_velocity(transformer, x, TIMESTEP, TEXT, torch.tensor([True, False]))
    assert relative(mixed[0], plain[0]) > 1e-3
    torch.testing.assert_close(mixed[1], plain[1])
    image = latents(frames=1)
    found = predict_velocity(transformer, image, TIMESTEP, TEXT, torch.tensor([True, False]))
    alone = predict_velocity(transformer, image, torch.tensor([0.0, 833.0]), TEXT)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("given", [None, torch.tensor([True, False])])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_the_library(recompute: bool, given: Tensor | None) -> None:
    transformer, x = with_adapter(transformer_of()), latents()
    give_official_sinusoid(transformer)
    flags = None if given is None else given.tolist()
    expected = adapter_gradient(transformer, lambda: library_velocity(transformer, x, flags))
    if recompute:
        prepare_blocks(transformer, ("nothing",) * len(transformer.blocks), False, x.device)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    transformer.blocks[0].get_submodule("ffn").register_forward_hook(count)
    found = adapter_gradient(
        transformer, lambda: predict_velocity(transformer, x, TIMESTEP, TEXT, given)
    )
    assert passes == (2 if recompute else 1)
    # 448 rows of zeros one by one: the library's own error, against fp64, is 2e-6, ours 3e-7.
    assert relative(found, expected) < 4e-6


@pytest.mark.parametrize("words", [0, 1, 63, 64, 200, 511, 512])
def test_rows_of_zeros_are_computed_once_and_count_as_many(words: int) -> None:
    """Equal to the library, which computes all; a batch has as many rows as its longest text."""
    transformer, x = with_adapter(transformer_of()), latents()
    give_official_sinusoid(transformer)
    text = torch.zeros_like(TEXT)
    text[0, :words] = noise_like((words, TEXT_DIM), 1, "long")
    text[1, : words // 2] = noise_like((words // 2, TEXT_DIM), 1, "short")
    computed: list[int] = []
    transformer.blocks[0].get_submodule("attn2.to_k").register_forward_pre_hook(
        lambda _, inputs: computed.append(inputs[0].shape[1])
    )
    found = predict_velocity(transformer, x, TIMESTEP, text)
    expected = transformer(x, TIMESTEP, text, return_dict=False)[0]
    assert computed == [min(512, 64 * (words // 64 + 1)), 512]
    assert relative(found, expected) < 1e-6
    gradients = [adapter_gradient(transformer, lambda v=v: v) for v in (found, expected)]
    assert relative(*gradients) < 4e-6


@torch.no_grad()
def test_bf16_has_all_rows_of_text() -> None:
    """The logarithm of how often a row counts would be rounded there."""
    transformer, computed = load_in_bf16(transformer_of()), list[torch.Size]()
    transformer.condition_embedder.text_embedder.register_forward_pre_hook(
        lambda _, inputs: computed.append(inputs[0].shape)
    )
    predict_velocity(transformer, latents(), TIMESTEP, TEXT)
    assert computed == [TEXT.shape]


def adapter_gradient(transformer: WanTransformer3DModel, forward: Callable[[], Tensor]) -> Tensor:
    transformer.zero_grad()
    forward().square().mean().backward()
    gradients = [
        p.grad.flatten() for p in lora.adapter_parameters(transformer) if p.grad is not None
    ]
    assert len(gradients) == 2 * 10 * len(transformer.blocks)
    return torch.cat(gradients)


def test_bf16_is_nearer_to_fp32_than_the_library() -> None:
    errors = measure(random_transformer(layers=6), random_inputs())
    assert errors.ours < 0.5 * errors.library
    # What is left is the rounding of the weights, which no forward pass can undo.
    assert errors.ours < 1.2 * errors.weights


def test_the_residual_stream_stays_in_fp32() -> None:
    transformer = load_in_bf16(transformer_of())
    dtypes: dict[str, torch.dtype] = {}

    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dtypes[name] = inputs[0].dtype

    for name in ("proj_out", "blocks.1.norm1", "blocks.1.attn1", "condition_embedder.time_proj"):
        transformer.get_submodule(name).register_forward_pre_hook(partial(record, name))
    velocity = predict_velocity(transformer, latents(), TIMESTEP, TEXT)
    attention = dtypes.pop("blocks.1.attn1")
    assert attention == torch.bfloat16
    assert {velocity.dtype, *dtypes.values()} == {torch.float32}
    assert transformer.proj_out.weight.dtype == torch.bfloat16  # cast for the call, not for good


@torch.no_grad()
def test_833_is_not_832_in_a_bf16_model() -> None:
    transformer, x = load_in_bf16(transformer_of()), latents()
    found = predict_velocity(transformer, x, torch.tensor([833.0, 833.0]), TEXT)
    other = predict_velocity(transformer, x, torch.tensor([832.0, 832.0]), TEXT)
    assert relative(found, other) > 1e-4
    with pytest.raises(AssertionError, match="833"):
        predict_velocity(transformer, x, TIMESTEP.bfloat16(), TEXT)


def test_what_would_be_silently_wrong_is_refused() -> None:
    transformer, x = transformer_of(), latents()
    with pytest.raises(AssertionError, match="pad the text"):
        predict_velocity(transformer, x, TIMESTEP, TEXT[:, :77])
    transformer.rope.bfloat16()
    with pytest.raises(AssertionError, match="angles"):
        predict_velocity(transformer, x, TIMESTEP, TEXT)


@torch.no_grad()
def test_time_has_a_row_for_each_distinct_timestep() -> None:
    transformer = transformer_of()
    computed: list[tuple[int, ...]] = []
    transformer.condition_embedder.time_proj.register_forward_pre_hook(
        lambda _, inputs: computed.append(tuple(inputs[0].shape))
    )
    time, modulation = embed_time(transformer, TIMESTEP, 5, None)
    assert (time.shape, modulation.shape) == ((2, 1, 48), (2, 1, 6, 48))
    given = torch.tensor([True, False])
    by_frame, modulation_by_frame = embed_time(transformer, TIMESTEP, 5, given)
    assert computed == [(2, 1, 48), (2, 2, 48)]
    assert (by_frame.shape, modulation_by_frame.shape) == ((2, 5, 48), (2, 5, 6, 48))
    torch.testing.assert_close(modulation_by_frame[0, 1:], modulation[0].expand(4, -1, -1))
    torch.testing.assert_close(modulation_by_frame[1], modulation[1].expand(5, -1, -1))


def test_a_block_can_be_compiled_whole() -> None:
    transformer, x = with_adapter(transformer_of(layers=1)), latents()
    block = transformer.blocks[0]
    assert isinstance(block, WanTransformerBlock)
    hidden, text = noise_like((2, 24, 48), 0, "hidden"), noise_like((2, 512, 48), 0, "text")
    modulation = embed_time(transformer, TIMESTEP, FRAMES, torch.tensor([True, False]))[1]
    arguments = (block, hidden, text, modulation, transformer.rope(x))
    compiled = torch.compile(block_forward, backend="eager", fullgraph=True)  # raises at a break
    torch.testing.assert_close(compiled(*arguments), block_forward(*arguments))
