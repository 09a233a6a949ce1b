"""Sequences shared by processes: the velocity, gradients and samples of one process.

Four processes, in one group or in two; the tokens cannot be divided evenly, and slices begin in the
middle of frames.
"""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, distributed

from tests.conftest import TEXT_DIM, toy_transformer
from tests.processes import run_processes
from wan import lora
from wan.adapter_choices import target_modules
from wan.context import (
    Context,
    context_of,
    make_context,
    most_of_all,
    rows_of_tokens,
    share_sequence,
    whole_sequences,
)
from wan.flow import noise_like
from wan.sample_settings import SampleSettings
from wan.sampler import sample_latents
from wan.speed import prepare_blocks
from wan.speed_choices import Keep
from wan.transformer import TEXT_LEN, predict_velocity
from wan.variants import Guidance, variant

CPU = torch.device("cpu")
PROCESSES = 4
KEPT: tuple[Keep, ...] = ("attention", "host")  # by block
TIMESTEP = torch.tensor([957.0, 833.0])
GIVEN = torch.tensor([True, False])
ROUNDING = 1e-5

Prepare = Callable[[WanTransformer3DModel], None]


def adapted_transformer() -> WanTransformer3DModel:
    """Two blocks with four heads and an adapter that does something; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=12,
            ffn_dim=48,
            freq_dim=32,
            text_dim=TEXT_DIM,
            rope_max_seq_len=64,
        )
    lora.attach(transformer, 4, 4.0, target_modules("all"), dropout=0.0, seed=0)
    for place, parameter in enumerate(lora.adapter_parameters(transformer)):
        parameter.data.add_(noise_like(parameter.shape, 1, place), alpha=0.1)
    return transformer.train()


def keep_some(transformer: WanTransformer3DModel) -> None:
    prepare_blocks(transformer, KEPT, compiled=False, device=CPU)


def step(
    transformer: WanTransformer3DModel, video: int, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The velocity of a made-up video, and the gradient of its loss: all of it, in one row."""
    transformer.zero_grad()
    x = noise_like((2, 16, 3, 6, 10), video, "x")  # 45 tokens, 15 in a frame
    text = noise_like((2, TEXT_LEN, TEXT_DIM), video, "text")
    velocity = predict_velocity(transformer, x, TIMESTEP, text, given)
    (velocity - noise_like(velocity.shape, video, "target")).square().mean().backward()
    gradients = [parameter.grad for parameter in lora.adapter_parameters(transformer)]
    return velocity.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


def error(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm() / expected.norm()


def mean_over_processes(gradient: Tensor) -> Tensor:
    distributed.all_reduce(gradient)
    return gradient / distributed.get_world_size()


def errors_of_a_step(context: Context, prepare: Prepare, given: Tensor | None) -> Tensor:
    """Of the velocity, and of the gradient as training averages it, when all see one video."""
    velocity, gradient = step(adapted_transformer(), 0, given)
    shared = adapted_transformer()
    prepare(shared)
    share_sequence(shared, context)
    found, part = step(shared, 0, given)
    assert error(part, gradient) > 0.1, "each process must have a part of the gradient"
    return torch.stack([error(found, velocity), error(mean_over_processes(part), gradient)])


def error_of_two_groups(context: Context) -> Tensor:
    """Of the gradient when each pair of processes has a video of its own."""
    both = [step(adapted_transformer(), video)[1] for video in (0, 1)]
    shared = adapted_transformer()
    share_sequence(shared, context)
    _, part = step(shared, distributed.get_rank() // context.size)
    return error(mean_over_processes(part), (both[0] + both[1]) / 2)


def sample(transformer: WanTransformer3DModel) -> Tensor:
    """One video in two steps, both prompts in one batch."""
    settings = SampleSettings(2, 5.0, Guidance(low=3.0, high=4.0), frames=9, height=48, width=80)
    text = noise_like((2, TEXT_LEN, TEXT_DIM), 0, "prompts")
    experts = {"high": transformer, "low": transformer}
    return sample_latents(experts, settings, variant("tiny"), text[:1], text[1:], [0])  # pyright: ignore[reportArgumentType] (names of experts)


def error_alone(shared: WanTransformer3DModel) -> Tensor:
    """Of the velocity that one process computes while the others do something else."""
    with whole_sequences(shared):
        alone, _ = step(shared, 0)
    assert context_of(shared) is not None
    return error(alone, step(adapted_transformer(), 0)[0])


def compare() -> dict[str, Tensor]:
    """What each process finds: errors, relative."""
    four, two = make_context(4), make_context(2)
    shared = adapted_transformer()
    expected = sample(shared)
    share_sequence(shared, four)
    with pytest.raises(ValueError, match="4 processes cannot share sequences 3 to one"):
        make_context(3)
    return {
        "four": errors_of_a_step(four, lambda _: None, None),
        "first_frame_given": errors_of_a_step(four, lambda _: None, GIVEN),
        "kept": errors_of_a_step(four, keep_some, GIVEN),
        "two": errors_of_a_step(two, keep_some, GIVEN),
        "two_groups": error_of_two_groups(two),
        "sample": error(sample(shared), expected),
        "alone": error_alone(shared) if distributed.get_rank() == 0 else torch.tensor(0.0),
        "own": torch.tensor([*four.own(45)]),
        "most": torch.tensor(most_of_all(two, CPU, distributed.get_rank(), -5)),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return run_processes(compare, PROCESSES, tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("case", ["four", "first_frame_given", "kept", "two"])
def test_velocity_and_gradient_are_those_of_one_process(
    case: str, found: list[dict[str, Tensor]]
) -> None:
    errors = torch.stack([process[case] for process in found])
    assert errors.max() < ROUNDING, errors


def test_groups_that_see_different_videos_train_on_their_mean(
    found: list[dict[str, Tensor]],
) -> None:
    assert max(process["two_groups"] for process in found) < ROUNDING


def test_a_sample_is_that_of_one_process(found: list[dict[str, Tensor]]) -> None:
    assert max(process["sample"] for process in found) < ROUNDING


def test_one_process_may_compute_alone(found: list[dict[str, Tensor]]) -> None:
    assert found[0]["alone"] < ROUNDING


def test_each_token_has_one_owner(found: list[dict[str, Tensor]]) -> None:
    assert [len(process["own"]) for process in found] == [12, 11, 11, 11]
    assert torch.cat([process["own"] for process in found]).tolist() == [*range(45)]


def test_those_who_share_agree_on_a_number(found: list[dict[str, Tensor]]) -> None:
    assert [process["most"].tolist() for process in found] == [[1, -5], [1, -5], [3, -5], [3, -5]]


@pytest.mark.parametrize("own", [range(12), range(12, 23), range(30, 45), range(20, 21)])
def test_each_token_has_the_row_of_its_frame(own: range) -> None:
    rows = torch.arange(3.0).view(1, 3, 1)
    chosen = rows_of_tokens(rows, own, 45)  # (1, R', 1)
    of_tokens = chosen.repeat_interleave(len(own) // chosen.shape[1], dim=1).flatten()
    assert of_tokens.tolist() == [token // 15 for token in own]


def test_heads_must_be_divisible() -> None:
    with pytest.raises(ValueError, match="2 heads of attention cannot be divided among 4"):
        share_sequence(toy_transformer(), Context(cast("distributed.ProcessGroup", None), 0, 4))


def test_a_process_has_whole_sequences_unless_told_otherwise() -> None:
    assert context_of(toy_transformer()) is None
