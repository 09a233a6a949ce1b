"""One expert in training: exact repetition, a frozen base, and no step on a NaN."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.batches import happens
from tests import toy_runs
from tests.toy_runs import Training, batch_of, encoded, make_image, planned, start
from train.config import Config
from train.encode import EncodedDataset
from train.learner import make_learner, step_places
from train.optim import learning_rate_at
from train.step import draw_noise, velocity_error
from wan.checkpoints import Model, ModelPaths, find_model
from wan.flow import bin_edges, expert_range, mix_seed
from wan.lora import adapter_parameters
from wan.variants import EXPERTS, variant

TINY = variant("tiny")


@pytest.fixture(scope="module")
def model(toy_model: Path) -> Model:
    return find_model(ModelPaths(str(toy_model)), "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images; one or more of them will be held out."""
    path = tmp_path_factory.mktemp("learner") / "data"
    for seed in range(6):
        make_image(path / f"picture_{seed}.png", seed, f"caption {seed}")
    return path


def config_of(folder: Path, *overrides: str) -> Config:
    return toy_runs.config_of(
        folder, Path("embedded"), "data.frames=1", "steps=9", "optim.warmup_steps=3",
        "optim.learning_rate=0.01", "batch_size=2", "accumulate=2", "data.caption_dropout=0.5",
        "eval.bins=3", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(folder: Path, toy_model: Path) -> EncodedDataset:
    return encoded(config_of(folder, f"model.path={toy_model}"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_learner_has_the_settings_of_its_expert(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    config = config_of(folder, "high.rank=3", "high.learning_rate=0.5", "high.steps=7")
    for expert in EXPERTS:
        training = start(config, model, dataset, expert)
        learner = training.learner
        assert learner.expert == expert
        ranks = {p.shape[0] for n, p in training.adapter().items() if "lora_A" in n}
        assert ranks == {3 if expert == "high" else 2}
        assert learner.optimizer.defaults["lr"] == (0.5 if expert == "high" else 0.01)
        assert learner.sigma_range == expert_range(0.875, expert)
        assert torch.equal(learner.edges, bin_edges(learner.law, learner.sigma_range, 3))
        assert learner.seed == mix_seed(0, expert)
        assert training.experts[expert].training


def test_the_optimizer_moves_the_adapter_and_nothing_else(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    training = start(config_of(folder), model, dataset)
    transformer = training.experts["low"]
    adapter = {id(parameter) for parameter in adapter_parameters(transformer)}
    groups = training.learner.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == adapter

    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    other = {name: t.clone() for name, t in training.experts["high"].state_dict().items()}
    for step in range(3):
        training.step(step)
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in adapter), name
        assert parameter.grad is None
    assert same(dict(training.experts["high"].state_dict()), other)


def test_two_trainings_of_one_config_are_the_same_to_the_bit(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    runs = []
    for rng in (1, 2):
        torch.manual_seed(rng)  # must have no say
        training = start(config_of(folder), model, dataset)
        runs.append(([training.step(step) for step in range(3)], training.adapter()))
    (first, first_state), (second, second_state) = runs
    assert same(first_state, second_state)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.losses, other.losses)
        assert torch.equal(one.sigmas, other.sigmas)
        assert one.grad_norm == other.grad_norm


def test_dropout_of_the_adapter_is_a_function_of_the_place_too(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    states = []
    for rng in (1, 2):
        torch.manual_seed(rng)
        training = start(config_of(folder, "lora.dropout=0.5"), model, dataset)
        training.step(0)
        training.step(1)
        states.append(training.adapter())
    assert same(*states)


def test_turns_of_the_other_expert_change_nothing(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    alone = start(config_of(folder), model, dataset)
    beside = start(config_of(folder), model, dataset)
    high = make_learner("high", beside.config, TINY, beside.experts, dataset)
    other = Training(beside.config, beside.experts, high, dataset)
    for step in range(2):
        alone.step(step)
        other.step(step)
        beside.step(step)
    assert same(alone.adapter(), beside.adapter())


def test_seeds_and_experts_train_differently(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    first = start(config_of(folder), model, dataset)
    reseeded = start(config_of(folder, "seed=1"), model, dataset)
    assert not same(first.adapter(), reseeded.adapter())
    assert not torch.equal(first.step(0).sigmas, reseeded.step(0).sigmas)


def test_a_step_is_what_its_places_say(folder: Path, model: Model, dataset: EncodedDataset) -> None:
    training = start(config_of(folder, "optim.max_grad_norm=1e9"), model, dataset)
    learner, step = training.learner, 4
    losses, sigmas = [], []
    for place in (8, 9):  # two batches of two clips in each step
        clips = [dataset.train.clips[index] for index in learner.order.indices(place)]
        latents = torch.stack([dataset.train.pictures.latents.read(clip.latents) for clip in clips])
        dropped = [happens(learner.seed, "dropout", place, slot, 0.5) for slot in range(2)]
        text = [
            dataset.train.text.read(dataset.train.no_caption if drop else clip.captions[0])
            for clip, drop in zip(clips, dropped, strict=True)
        ]
        draw = draw_noise(
            learner.law, learner.sigma_range, latents.shape, learner.seed, 2 * place, True
        )
        losses.append(velocity_error(training.experts["low"], batch_of(latents, text), draw, TINY))
        sigmas.append(draw.sigma)
    gradients = torch.autograd.grad(torch.cat(losses).mean(), learner.parameters)
    norm = torch.cat([g.flatten() for g in gradients]).norm()

    figures = training.step(step)
    assert torch.equal(figures.sigmas, torch.cat(sigmas))
    assert torch.allclose(figures.losses, torch.cat(losses).detach())
    assert figures.loss == pytest.approx(torch.cat(losses).mean().item())
    assert figures.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert learner.steps_done == 5


def test_gradients_are_clipped_and_told_before_clipping(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    # Plain gradient descent shows the length of its gradient.
    config = config_of(folder, "optim.name=torch.optim.SGD", "optim.max_grad_norm=1e-6")
    config.optim.args = {}
    training = start(config, model, dataset)
    before = training.adapter()
    figures = training.step(5)
    moved = torch.cat([(t - before[n]).flatten() for n, t in training.adapter().items()])
    assert figures.grad_norm > 1e-3
    assert moved.norm().item() == pytest.approx(figures.learning_rate * 1e-6, rel=0.01)


def test_the_learning_rate_is_that_of_the_expert_and_the_step(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    config = config_of(folder, "optim.schedule=linear", "low.learning_rate=0.25", "low.steps=8")
    training = start(config, model, dataset)
    for step in (0, 1, 5):
        figures = training.step(step)
        assert figures.learning_rate == learning_rate_at(step, 8, config.optim, 0.25)
        assert training.learner.optimizer.param_groups[0]["lr"] == figures.learning_rate


def test_training_learns(folder: Path, model: Model, dataset: EncodedDataset) -> None:
    config = config_of(folder, "steps=40", "optim.learning_rate=0.03", "data.caption_dropout=0")
    training = start(config, model, dataset)
    losses = [training.step(step).loss for step in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_what_blocks_keep_changes_no_step(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    states = []
    for keep in ("nothing", "everything"):
        training = start(config_of(folder, f"speed.keep={keep}"), model, dataset)
        assert set(training.learner.kept) == {keep}
        training.step(3)
        training.step(4)
        states.append(training.adapter())
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-6) for name in states[0])


def test_a_bf16_base_trains_fp32_adapters(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    training = start(config_of(folder, "model.dtype=bfloat16"), model, dataset)
    before = training.adapter()
    figures = training.step(5)
    assert figures.losses.dtype == torch.float32
    assert {p.dtype for p in training.learner.parameters} == {torch.float32}
    assert not same(before, training.adapter())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_skips_the_step_and_is_told(
    folder: Path, model: Model, dataset: EncodedDataset, value: float
) -> None:
    config = config_of(folder, "accumulate=1")
    training = start(config, model, dataset, "high")
    training.step(0)
    learner = training.learner
    with torch.no_grad():
        learner.parameters[0][0, 0] = value
    before = training.adapter()
    moments = {k: v.clone() for k, v in learner.optimizer.state[learner.parameters[1]].items()}
    figures = training.step(1)
    assert figures.problem is not None
    assert figures.problem.startswith("step 2: the ")
    assert "is not finite, nothing was updated" in figures.problem
    for sigma in figures.sigmas.tolist():
        assert f"sigma {sigma:.4f}" in figures.problem
    clips = planned(config).train
    for index in learner.order.indices(1):
        assert clips[index].item.name in figures.problem
    after = training.adapter()
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in after)
    state = learner.optimizer.state[learner.parameters[1]]
    assert all(torch.equal(state[name], moments[name]) for name in moments)
    assert all(parameter.grad is None for parameter in learner.parameters)
    assert (learner.steps_done, learner.bad_steps, learner.bad_in_row) == (2, 1, 1)


def test_a_good_step_ends_the_row_of_bad_ones_and_learns_as_if_they_had_not_been(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    skipping = start(config_of(folder), model, dataset)
    learner = skipping.learner
    first = learner.parameters[0]
    kept = first.detach().clone()
    with torch.no_grad():
        first[0, 0] = float("nan")
    assert skipping.step(0).problem
    assert skipping.step(1).problem
    assert learner.bad_in_row == 2
    with torch.no_grad():
        first.copy_(kept)
    assert skipping.step(2).problem is None
    assert (learner.bad_steps, learner.bad_in_row) == (2, 0)
    other = start(config_of(folder), model, dataset)
    other.step(2)
    assert same(skipping.adapter(), other.adapter())


def test_a_gradient_that_is_not_finite_skips_the_step_too(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    training = start(config_of(folder), model, dataset)
    parameter = training.learner.parameters[1]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = training.adapter()
    figures = training.step(0)
    assert figures.problem is not None
    assert "the gradient is not finite" in figures.problem
    assert torch.isfinite(figures.losses).all()
    assert same(training.adapter(), before)


def test_only_the_clips_whose_loss_is_not_finite_are_named(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    training = start(config_of(folder, "accumulate=2", "batch_size=1"), model, dataset)
    order, clips = training.learner.order, planned(training.config).train
    step = next(s for s in range(50) if order.indices(2 * s) != order.indices(2 * s + 1))
    passes: list[int] = []

    def spoil(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        passes.append(1)
        return output * float("nan") if len(passes) == 2 else output

    training.experts["low"].patch_embedding.register_forward_hook(spoil)
    problem = training.step(step).problem
    assert problem is not None
    assert "the loss is not finite" in problem
    (good,), (bad,) = order.indices(2 * step), order.indices(2 * step + 1)
    assert clips[bad].item.name in problem
    assert clips[good].item.name not in problem


def test_steps_of_other_sizes_take_the_items_where_the_last_ended(
    folder: Path, model: Model, dataset: EncodedDataset
) -> None:
    learner = start(config_of(folder), model, dataset).learner
    assert list(step_places(learner, 3, 2, 2)) == [12, 13, 14, 15]
    learner.first_place = 12 - 3 * 1  # three steps of 4 batches; now a step has one
    assert list(step_places(learner, 3, 1, 1)) == [12]
    assert list(step_places(learner, 4, 1, 1)) == [13]
