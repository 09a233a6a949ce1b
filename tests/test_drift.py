"""Prior drift, the choice of clips for it, and the running loss of training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from data.batches import Draws, EncodedClips
from data.buckets import Clip
from tests import toy_runs
from tests.toy_runs import encoded_clips, make_image, silent
from train.drift import DriftPlan, plan_drift, prior_drift
from train.running_loss import RunningLoss
from train.validate import HeldoutPlan, fixed_choice, plan_checks, plan_train_checks
from wan.adapter_choices import target_modules
from wan.checkpoints import ModelPaths, find_model, load_transformer
from wan.flow import TimestepLaw, bin_of, uniforms
from wan.lora import adapter_parameters, attach
from wan.strengths import set_strengths
from wan.variants import EXPERTS, variant

TINY = variant("tiny")
LAW = TimestepLaw("logit_normal", shift=3.0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> EncodedClips:
    folder, generator = tmp_path_factory.mktemp("drift"), torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 1, 4, 4, generator=generator) for _ in range(6)]
    text = [torch.randn(3, 32, generator=generator) for _ in range(7)]
    return encoded_clips(folder, latents, text)


def adapted(model: Path, size: float) -> WanTransformer3DModel:
    found = find_model(ModelPaths(str(model)), "tiny")
    transformer = load_transformer(found, "low", torch.float32, "cpu")
    attach(transformer, 2, 2.0, target_modules("all"), 0.5, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(transformer):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return transformer


def plan_of(clips: EncodedClips) -> HeldoutPlan:
    return HeldoutPlan(clips, Draws(4), LAW, bins=2, draws=1, batch_size=2, seed=4)


def test_drift_is_0_for_the_base_and_grows_with_what_the_adapter_does(
    toy_model: Path, clips: EncodedClips
) -> None:
    plan = DriftPlan(plan_of(clips), [])
    transformer = adapted(toy_model, 0.2)
    transformer.train()
    whole = prior_drift(transformer, "low", TINY, plan, silent)
    assert prior_drift(transformer, "low", TINY, plan, silent) == whole  # no dropout, same noise
    assert all(module.training for module in transformer.modules())
    set_strengths(transformer, {"default": 0.5})
    half = prior_drift(transformer, "low", TINY, plan, silent)
    set_strengths(transformer, {"default": 0.0})
    assert prior_drift(transformer, "low", TINY, plan, silent) == 0
    assert 0 < half < whole


def test_drift_is_asked_with_the_prompts_that_are_given(
    toy_model: Path, clips: EncodedClips
) -> None:
    transformer, plan = adapted(toy_model, 0.2), plan_of(clips)
    own, other, again = (
        prior_drift(transformer, "low", TINY, DriftPlan(plan, texts), silent)
        for texts in ([], [torch.zeros(1, 32)], [torch.zeros(1, 32), torch.zeros(2, 32)])
    )
    assert own != other
    assert again == other  # zeros are what prompts are padded with


def test_the_base_is_asked_once(toy_model: Path, clips: EncodedClips) -> None:
    transformer, plan = adapted(toy_model, 0.2), DriftPlan(plan_of(clips), [])
    forwards: list[int] = []
    transformer.register_forward_pre_hook(lambda _, inputs: forwards.append(len(inputs)))
    counts, drifts = [], []
    for strength in (1.0, 0.5, 1.0):
        set_strengths(transformer, {"default": strength})
        drifts.append(prior_drift(transformer, "low", TINY, plan, silent))
        counts.append(len(forwards))
    assert counts == [2 * counts[0] // 2, 3 * counts[0] // 2, 4 * counts[0] // 2]
    assert drifts[0] == drifts[2]
    afresh = prior_drift(transformer, "low", TINY, DriftPlan(plan_of(clips), []), silent)
    assert afresh == drifts[0]
    assert prior_drift(transformer, "high", TINY, plan, silent) != drifts[0]  # an expert's own


def test_drift_is_over_the_velocity_of_the_base(toy_model: Path, clips: EncodedClips) -> None:
    transformer, plan = adapted(toy_model, 0.2), DriftPlan(plan_of(clips), [])
    drift = prior_drift(transformer, "low", TINY, plan, silent)
    plan.base.clear()  # it will be another
    with torch.no_grad():
        transformer.proj_out.weight.mul_(8)  # adapters are inside of blocks: both are scaled
        transformer.proj_out.bias.mul_(8)
    assert prior_drift(transformer, "low", TINY, plan, silent) == pytest.approx(drift, rel=1e-4)


def test_drift_is_a_length_over_a_length_and_each_expert_has_a_base(
    toy_model: Path, clips: EncodedClips
) -> None:
    transformer, plan = adapted(toy_model, 0.2), DriftPlan(plan_of(clips), [])
    set_strengths(transformer, {"default": 0.0})
    for expert in EXPERTS:
        prior_drift(transformer, expert, TINY, plan, silent)
    assert plan.base.keys() == {(expert, clip) for expert in EXPERTS for clip in range(6)}
    for said in plan.base.values():  # as if the base had said three times as much
        said[:] = [3 * velocity for velocity in said]
    drift = prior_drift(transformer, "low", TINY, plan, silent)
    assert drift == pytest.approx(2 / 3, rel=1e-6)


def test_a_choice_is_one_of_names_and_of_as_many(clips: EncodedClips) -> None:
    plan = plan_of(clips)
    chosen = fixed_choice(plan, clips, range(6), 3)
    names = [clip.name for clip in chosen.clips.clips]
    assert len(set(names)) == 3
    backwards = replace(clips, clips=clips.clips[::-1])
    again = fixed_choice(plan, backwards, range(6), 3)
    assert [clip.name for clip in again.clips.clips] == names
    others = [fixed_choice(replace(plan, seed=s), clips, range(6), 3) for s in range(9)]
    assert len({str([c.name for c in other.clips.clips]) for other in others}) > 1
    assert len(fixed_choice(plan, clips, [4, 5], 3).clips) == 2


@pytest.mark.parametrize("trigger", ["Zorbi", None])
@pytest.mark.parametrize("world", [True, False])
def test_the_prior_is_asked_about_what_is_not_the_concept(
    toy_model: Path, tmp_path: Path, trigger: str | None, world: bool
) -> None:
    for seed in range(4):
        make_image(tmp_path / "data" / f"{seed}.png", seed, "a zorbi")
    for seed in range(4, 6):
        make_image(tmp_path / "world" / f"{seed}.png", seed, "a ball")
    mix = f"+data.mix.world={{path: {tmp_path / 'world'}, regularisation: true}}"
    config = toy_runs.config_of(
        tmp_path / "data", toy_model, "data.frames=1", *([mix] if world else [])
    )
    prompts = ["a zorbi runs", "a red ball"]
    dataset = toy_runs.encoded(config, ["", *prompts])
    found: list[Clip] = toy_runs.planned(config).train
    checks = plan_checks(config, TINY, dataset.heldout)
    plan = plan_drift(checks, dataset, found, prompts, trigger)
    names = {clip.name for clip in plan.samples.clips.clips}
    compared = plan_train_checks(replace(checks, clips=dataset.train), dataset.train, found)
    own = {clip.name for clip in dataset.train.clips} - {"4.png", "5.png"}
    assert {clip.name for clip in compared.clips.clips} == own  # as many as are held out, of these
    assert len(plan_train_checks(checks, dataset.train, found).clips) == len(dataset.heldout)
    if world:
        assert names == {"4.png", "5.png"}
        assert plan.texts == []
    else:
        assert names == {clip.name for clip in dataset.heldout.clips}
        (text,) = plan.texts
        assert torch.equal(text, dataset.prompts["a red ball" if trigger else ""])


def test_the_running_loss_is_that_of_the_law_whatever_was_drawn() -> None:
    """A loss that is the bin's number: few draws, in which bins are not alike, have its mean."""
    edges = torch.linspace(0, 1, 9, dtype=torch.float64)
    running = RunningLoss.of(8)
    for step in range(11):  # 33 draws: one bin has more than others
        bins = bin_of(uniforms(5, 3 * step, 3, low_discrepancy=True), edges).tolist()
        running.add([float(place) for place in bins], bins)
    assert running.figures("train/low")["train/low/running_loss"] == pytest.approx(3.5)


def test_the_running_loss_forgets_and_tells_only_what_it_has_seen() -> None:
    running = RunningLoss.of(2)
    running.add([4.0], [1])
    assert running.figures("x") == {"x/running_bin_1": pytest.approx(4.0)}
    for _ in range(2000):
        running.add([1.0, 3.0], [0, 1])
    figures = running.figures("x")
    assert figures["x/running_bin_1"] == pytest.approx(3.0)
    assert figures["x/running_loss"] == pytest.approx(2.0)
