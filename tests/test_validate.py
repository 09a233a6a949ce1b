"""Held-out loss: the same to the bit each time, whatever the batch size and the other clips."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from data.batches import Draws, EncodedClips
from tests.toy_runs import encoded_clips
from train.validate import HeldoutLoss, HeldoutPlan, change, heldout_loss, samples_of
from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.flow import TimestepLaw, bin_edges, expert_range
from wan.lora import adapter_parameters, attach
from wan.variants import EXPERTS, Expert, variant

TINY = variant("tiny")
LAW = TimestepLaw("logit_normal", shift=3.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> EncodedClips:
    """Three clips of different shapes and loudness."""
    folder, generator = tmp_path_factory.mktemp("heldout"), torch.Generator().manual_seed(0)
    shapes = [(16, 1, 4, 4), (16, 2, 4, 6), (16, 1, 6, 4)]
    latents = [(i + 1) * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)]
    text = [torch.randn(rows, 32, generator=generator) for rows in (2, 3, 4, 1)]
    return encoded_clips(folder, latents, text)


@pytest.fixture
def transformer(toy_model: Path) -> WanTransformer3DModel:
    return load_transformer(
        find_model(ModelPaths(str(toy_model)), "tiny"), "low", torch.float32, "cpu"
    )


def plan_of(clips: EncodedClips, bins: int = 3, draws: int = 2, batch_size: int = 2) -> HeldoutPlan:
    return HeldoutPlan(clips, Draws(4), LAW, bins, draws, batch_size, seed=4)


def some(clips: EncodedClips, *indices: int) -> EncodedClips:
    return replace(clips, clips=[clips.clips[index] for index in indices])


def measure(
    transformer: WanTransformer3DModel, plan: HeldoutPlan, expert: Expert = "low"
) -> HeldoutLoss:
    def progress(steps: Iterable[int], _: str) -> Iterable[int]:
        return steps

    return heldout_loss(transformer, expert, TINY, plan, progress)


def adapt(transformer: WanTransformer3DModel, dropout: float = 0.0) -> None:
    attach(transformer, 2, 2.0, target_modules("all"), dropout, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_each_measurement_is_the_same_to_the_bit(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    first = measure(transformer, plan_of(clips))
    torch.manual_seed(99)
    assert measure(transformer, plan_of(clips)) == first


def test_the_mean_is_that_of_the_bins(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    loss = measure(transformer, plan_of(clips))
    assert len(loss.bins) == 3
    assert loss.mean == pytest.approx(sum(loss.bins) / 3, rel=1e-12)


@pytest.mark.parametrize("expert", EXPERTS)
def test_bins_are_those_of_the_law_and_the_expert(
    transformer: WanTransformer3DModel, clips: EncodedClips, expert: Expert
) -> None:
    seen: list[float] = []

    def note(_: nn.Module, inputs: tuple[Tensor]) -> None:  # of the slowest sine, t is legible
        seen.extend((inputs[0][:, 0, -1].double().asin() * 10_000 ** (15 / 16)).tolist())

    hook = transformer.condition_embedder.time_embedder.register_forward_pre_hook(note)
    loss = measure(transformer, plan_of(some(clips, 0), bins=3, draws=2), expert)
    hook.remove()
    assert loss.expert == expert
    assert loss.edges == bin_edges(LAW, expert_range(0.875, expert), 3).tolist()
    bounds = list(zip(loss.edges[:-1], loss.edges[1:], strict=True))
    inside = [sum(low <= t / 1000 < high for t in seen) for low, high in bounds]
    assert inside == [2, 2, 2]  # one in each bin at each draw
    assert len(set(seen)) == 6


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_nothing(
    transformer: WanTransformer3DModel, clips: EncodedClips, batch_size: int
) -> None:
    usual = measure(transformer, plan_of(clips))
    other = measure(transformer, plan_of(clips, batch_size=batch_size))
    assert other.mean == pytest.approx(usual.mean, rel=1e-5)
    assert other.bins == pytest.approx(usual.bins, rel=1e-5)
    assert other.standard_error == pytest.approx(usual.standard_error, rel=1e-4)


def test_training_mode_has_no_say_and_is_left_as_it_was(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    adapt(transformer, dropout=0.9)
    losses = []
    for training in (True, False):
        transformer.train(training)
        losses.append(measure(transformer, plan_of(clips)))
        assert all(module.training == training for module in transformer.modules())
    assert losses[0] == losses[1]
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_adapters_change_the_loss(transformer: WanTransformer3DModel, clips: EncodedClips) -> None:
    base = measure(transformer, plan_of(clips))
    adapt(transformer)
    adapted = measure(transformer, plan_of(clips))
    assert all(abs(b / a - 1) > 1e-4 for a, b in zip(base.bins, adapted.bins, strict=True))


def test_seeds_and_experts_have_noise_of_their_own(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    plan = plan_of(clips)
    means = [
        measure(transformer, plan).mean,
        measure(transformer, replace(plan, seed=5)).mean,
        measure(transformer, plan, "high").mean,
    ]
    assert len(set(means)) == 3


def test_one_clip_does_not_change_what_is_measured_on_another(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    alone = measure(transformer, plan_of(some(clips, 0)))
    pairs = [measure(transformer, plan_of(some(clips, 0, other))) for other in (1, 2)]
    rest = [  # of the second clip: what is left of the mean of two
        [2 * both - first for both, first in zip(pair.bins, alone.bins, strict=True)]
        for pair in pairs
    ]
    swapped = [measure(transformer, plan_of(some(clips, 1, other))) for other in (1, 2)]
    first = [
        [2 * both - second for both, second in zip(pair.bins, part, strict=True)]
        for pair, part in zip(swapped, rest, strict=True)
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-9)


@pytest.mark.parametrize("captions", [(0,), (0, 1, 2, 3)], ids=["one caption", "captions"])
def test_what_a_clip_is_given_does_not_depend_on_the_others(
    transformer: WanTransformer3DModel, clips: EncodedClips, captions: tuple[int, ...]
) -> None:
    several = [replace(clip, captions=captions) for clip in clips.clips]
    means = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        plan = plan_of(replace(clips, clips=[several[index] for index in order]), bins=1, draws=1)
        means.append(measure(transformer, plan).mean)
    assert means == pytest.approx([means[0]] * 3, rel=1e-9)


def test_the_order_of_clips_changes_no_clips_noise(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    forwards = measure(transformer, plan_of(clips))
    backwards = measure(transformer, plan_of(some(clips, 2, 1, 0)))
    assert backwards.bins == pytest.approx(forwards.bins, rel=1e-9)


def test_the_standard_error_is_that_of_a_mean(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    # Of one clip the first draw is the same, however many follow: the second is what is left.
    one = measure(transformer, plan_of(some(clips, 1), draws=1))
    two = measure(transformer, plan_of(some(clips, 1), draws=2))
    second = 2 * two.mean - one.mean
    # Half the distance: std of two values is distance / sqrt(2), of their mean that / sqrt(2).
    assert two.standard_error == pytest.approx(abs(second - one.mean) / 2, abs=1e-6)
    assert two.standard_error > 0
    assert one.standard_error == 0


def test_draws_of_a_clip_are_no_clips_of_their_own() -> None:
    """Of clips that differ the error stays what it is, however often each is measured."""
    start = HeldoutLoss("low", 0.0, 0.0, [0.0], [0.0, 1.0], [0.0] * 12, draws=4)
    by_draw = [value + noise for value in (1.0, 2.0, 6.0) for noise in (0.1, -0.1, 0.1, -0.1)]
    after = replace(start, mean=3.0, by_draw=by_draw)
    # Of 1, 2 and 6 the standard deviation is sqrt(7).
    assert change(start, after) == (3.0, pytest.approx((7 / 3) ** 0.5))
    alike = replace(after, by_draw=[0.1, -0.1, 0.1, -0.1] * 3)  # clips that agree by chance
    assert change(start, alike)[1] == pytest.approx(0.1 / 11**0.5)


def test_the_standard_error_is_what_a_measurement_varies_by_from_clips_to_clips(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    loss = measure(transformer, plan_of(clips, draws=2))
    each = [measure(transformer, plan_of(some(clips, index), draws=2)).mean for index in range(3)]
    spread = torch.tensor(each, dtype=torch.float64).std().item()
    assert loss.draws == 2
    assert loss.standard_error == pytest.approx(spread / 3**0.5, rel=1e-6)
    bins = [measure(transformer, plan_of(some(clips, index), draws=2)).bins for index in range(3)]
    spreads = torch.tensor(bins, dtype=torch.float64).std(dim=0)
    assert loss.bin_errors == pytest.approx((spreads / 3**0.5).tolist(), rel=1e-6)


def test_each_clip_has_noise_of_its_own(
    transformer: WanTransformer3DModel, clips: EncodedClips
) -> None:
    plan = plan_of(some(clips, 0), bins=1, draws=1)
    twin = replace(plan.clips.clips[0], name="the same under another name")
    other = replace(plan, clips=replace(plan.clips, clips=[twin]))
    assert measure(transformer, other).mean != measure(transformer, plan).mean


def test_each_draw_and_bin_has_noise_of_its_own(clips: EncodedClips) -> None:
    plan = plan_of(clips, bins=3, draws=2)
    batches = samples_of(plan, expert_range(0.875, "low"), "low", 0)
    noise = torch.cat([draw.noise for _, draw in batches]).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise) == 6
