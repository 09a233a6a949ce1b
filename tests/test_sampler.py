"""Sampling: the loop of diffusers' pipelines on official noise levels, and what it promises."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT_DIM, small_transformer, small_vae, toy_scheduler
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from torch import Tensor

import wan.sampler
from wan.conditioning import (
    Condition,
    channels_condition,
    first_frame_latents,
    image_condition,
)
from wan.flow import (
    SigmaRange,
    expert_for,
    expert_range,
    sampling_grid,
    sampling_timesteps,
    steps_of_experts,
)
from wan.sample_settings import SampleSettings, SolverName, distilled
from wan.sampler import sample_latents, sample_steps
from wan.solvers import make_solver
from wan.transformer import predict_velocity
from wan.variants import EXPERTS, Expert, Guidance, Variant, variant

T2V, I2V, TI2V = variant("t2v_a14b"), variant("i2v_a14b"), variant("ti2v_5b")
SETTINGS = SampleSettings(
    steps=8, shift=12.0, guidance=Guidance(low=3.0, high=5.0), frames=5, height=64, width=32
)
IMAGES = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(9))  # in [0, 1]
FIRST, LAST = 2 * IMAGES[:1] - 1, 2 * IMAGES[1:] - 1
Transformers = dict[Expert, WanTransformer3DModel]
Pipeline = WanPipeline | WanImageToVideoPipeline


@pytest.fixture(scope="module")
def pairs() -> dict[str, Transformers]:
    """Random transformers of every variant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            facts.name: {expert: small_transformer(facts).eval() for expert in facts.experts}
            for facts in (T2V, I2V, TI2V)
        }


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Embeddings of two prompts and of the negative one: (3, text_len, D)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, T2V.text_len, TEXT_DIM, generator=generator)


@dataclass
class Calls:
    """What the model was given, in order of the calls."""

    transformers: list[WanTransformer3DModel] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def recording(
        transformer: WanTransformer3DModel,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        first_frame_given: Tensor | None = None,
    ) -> Tensor:
        calls.transformers.append(transformer)
        calls.latents.append(x)
        calls.timesteps.append(timestep)
        calls.text.append(text)
        return predict_velocity(transformer, x, timestep, text, first_frame_given)

    monkeypatch.setattr(wan.sampler, "predict_velocity", recording)
    return calls


@pytest.fixture(scope="module")
def pipelines(pairs: dict[str, Transformers]) -> dict[str, Pipeline]:
    """diffusers' pipelines with the same transformers, without a text encoder."""
    made: dict[str, Pipeline] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, facts, kind in [
            ("t2v", T2V, WanPipeline),
            ("i2v", I2V, WanImageToVideoPipeline),
            ("ti2v without image", TI2V, WanPipeline),
            ("ti2v", TI2V, WanImageToVideoPipeline),
        ]:
            pair = pairs[facts.name]
            made[name] = kind(
                tokenizer=None,  # pyright: ignore[reportArgumentType]
                text_encoder=None,  # pyright: ignore[reportArgumentType]
                vae=small_vae(facts.vae).eval(),
                scheduler=toy_scheduler(),  # pyright: ignore[reportArgumentType]
                transformer=pair.get("high", pair.get("single")),
                transformer_2=pair.get("low"),
                boundary_ratio=facts.boundary,
                expand_timesteps=facts.conditioning == "first_frame",
            )
            made[name].set_progress_bar_config(disable=True)
    return made


def run_pipeline(
    pipeline: Pipeline, settings: SampleSettings, text: Tensor, images: dict[str, Tensor]
) -> Tensor:
    return pipeline(
        **images,
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[2:],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance.high,
        guidance_scale_2=settings.guidance.low if pipeline.config["boundary_ratio"] else None,
        num_frames=settings.frames,
        height=settings.height,
        width=settings.width,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
    )[0]


def use_official_grid(pipeline: Pipeline, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pipeline a scheduler of its own kind, on noise levels that it does not know."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift)
    on_default_grid = scheduler.set_timesteps

    def on_official_grid(steps: int, device: torch.device) -> None:
        on_default_grid(sigmas=sampling_grid(steps), device=device)

    monkeypatch.setattr(scheduler, "set_timesteps", on_official_grid)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)


def condition_of(name: str, pipeline: Pipeline) -> tuple[Condition, dict[str, Tensor]]:
    """Our condition, and the pipeline's arguments that mean the same."""
    vae, first, last = pipeline.vae, {"image": IMAGES[:1]}, {"last_image": IMAGES[1:]}
    if name == "i2v":
        latents = image_condition(vae, FIRST, None, SETTINGS.frames)
        return Condition(channels=channels_condition(latents, last=False)), first
    if name == "first and last":
        latents = image_condition(vae, FIRST, LAST, SETTINGS.frames)
        return Condition(channels=channels_condition(latents, last=True)), first | last
    if name == "ti2v":
        return Condition(first_frame=first_frame_latents(vae, FIRST)), first
    return Condition(), {}


@pytest.mark.parametrize(
    ("name", "pipeline_name", "facts"),
    [
        ("t2v", "t2v", T2V),
        ("i2v", "i2v", I2V),
        ("first and last", "i2v", I2V),
        ("ti2v without image", "ti2v without image", TI2V),
        ("ti2v", "ti2v", TI2V),
    ],
)
def test_samples_equal_those_of_diffusers(
    name: str,
    pipeline_name: str,
    facts: Variant,
    pairs: dict[str, Transformers],
    pipelines: dict[str, Pipeline],
    text: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = pipelines[pipeline_name]
    both = Guidance(low=5.0, high=5.0)
    settings = replace(SETTINGS, guidance=SETTINGS.guidance if facts.boundary else both)
    use_official_grid(pipeline, settings.shift, monkeypatch)
    condition, images = condition_of(name, pipeline)
    expected = run_pipeline(pipeline, settings, text, images)
    transformers = pairs[facts.name]
    found = sample_latents(transformers, settings, facts, text[:1], text[2:], [7], condition)
    assert found.shape == (1, *facts.geometry.latent_shape(5, 64, 32))
    assert found.dtype == torch.float32
    assert _relative(found, expected) < 1e-5
    # The comparison can tell: each guidance, and which is whose, shows in the result.
    swapped = Guidance(low=settings.guidance.high + 1, high=settings.guidance.low)
    other = replace(settings, guidance=swapped)
    found = sample_latents(transformers, other, facts, text[:1], text[2:], [7], condition)
    assert _relative(found, expected) > 1e-3


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_the_other_solvers_in_the_loop_of_diffusers(
    solver: SolverName,
    pairs: dict[str, Transformers],
    pipelines: dict[str, Pipeline],
    text: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(SETTINGS, solver=solver)
    scheduler = make_solver(solver, settings.steps, settings.shift)
    monkeypatch.setattr(scheduler, "set_timesteps", lambda steps, device: None)
    monkeypatch.setattr(pipelines["t2v"], "scheduler", scheduler)
    expected = run_pipeline(pipelines["t2v"], settings, text, {})
    found = sample_latents(pairs["t2v_a14b"], settings, T2V, text[:1], text[2:], [7])
    assert _relative(found, expected) < 1e-5


def test_images_show_in_the_samples(
    pairs: dict[str, Transformers], pipelines: dict[str, Pipeline], text: Tensor
) -> None:
    prompts, pair = (text[:1], text[2:], [7]), pairs["i2v_a14b"]
    first, _ = condition_of("i2v", pipelines["i2v"])
    both, _ = condition_of("first and last", pipelines["i2v"])
    one = sample_latents(pair, SETTINGS, I2V, *prompts, first)
    two = sample_latents(pair, SETTINGS, I2V, *prompts, both)
    assert _relative(one, two) > 1e-3


def test_the_first_frame_stays_as_it_was_given(
    pairs: dict[str, Transformers], pipelines: dict[str, Pipeline], text: Tensor, calls: Calls
) -> None:
    condition, _ = condition_of("ti2v", pipelines["ti2v"])
    given = condition.first_frame
    assert given is not None
    steps = sample_steps(pairs["ti2v_5b"], SETTINGS, TI2V, text[:2], text[2:], [3, 4], condition)
    for x in [*steps, *calls.latents]:
        assert torch.equal(x[:, :, :1], given.expand_as(x[:, :, :1]))
    assert calls.transformers == [pairs["ti2v_5b"]["single"]] * SETTINGS.steps


def test_a_single_transformer_is_the_expert_of_every_noise_level() -> None:
    assert {expert_for(timestep, TI2V.boundary) for timestep in (0.0, 500, 1000)} == {"single"}
    assert expert_range(TI2V.boundary, "single") == SigmaRange(0.0, 1.0)


def test_experts_change_once_at_the_boundary(
    pairs: dict[str, Transformers], text: Tensor, calls: Calls
) -> None:
    pair = pairs["t2v_a14b"]
    steps = sample_steps(pair, SETTINGS, T2V, text[:1], text[2:], [0])
    assert len([*steps]) == SETTINGS.steps
    assert T2V.boundary is not None
    counts = steps_of_experts(SETTINGS.steps, SETTINGS.shift, T2V.boundary)
    assert min(counts.values()) > 0
    assert calls.transformers == [pair["high"]] * counts["high"] + [pair["low"]] * counts["low"]
    timesteps = sampling_timesteps(SETTINGS.steps, SETTINGS.shift)
    assert [t.unique().tolist() for t in calls.timesteps] == [[t] for t in timesteps]


@pytest.mark.parametrize("unguided", EXPERTS)
def test_guidance_of_1_skips_the_negative_prompt_for_that_expert(
    pairs: dict[str, Transformers], text: Tensor, calls: Calls, unguided: Expert
) -> None:
    guidance = Guidance(low=3.0, high=1.0) if unguided == "high" else Guidance(low=1.0, high=3.0)
    settings = replace(SETTINGS, guidance=guidance)
    pair = pairs["t2v_a14b"]
    sample_latents(pair, settings, T2V, text[:2], text[2:], seeds=[0, 1])
    for transformer, given in zip(calls.transformers, calls.text, strict=True):
        rows = text[:2] if transformer is pair[unguided] else text[[0, 1, 2, 2]]
        assert torch.equal(given, rows)


@pytest.mark.parametrize(("facts", "name"), [(T2V, "t2v"), (I2V, "i2v"), (TI2V, "ti2v")])
def test_both_prompts_at_once_or_one_after_the_other_give_the_same(
    facts: Variant,
    name: str,
    pairs: dict[str, Transformers],
    pipelines: dict[str, Pipeline],
    text: Tensor,
    calls: Calls,
) -> None:
    condition, _ = condition_of(name, pipelines[name])
    made = {}
    for cfg, rows in (("batched", 4), ("sequential", 2)):
        calls.latents.clear()
        settings = replace(SETTINGS, cfg=cfg)
        made[cfg] = sample_latents(
            pairs[facts.name], settings, facts, text[:2], text[2:], [3, 4], condition
        )
        assert [len(x) for x in calls.latents] == [rows] * (SETTINGS.steps * 4 // rows)
    assert _relative(made["sequential"], made["batched"]) < 1e-5


def test_distilled_models_are_called_four_times(
    pairs: dict[str, Transformers], text: Tensor, calls: Calls
) -> None:
    settings = distilled(SETTINGS)
    assert (settings.frames, settings.height, settings.width) == (5, 64, 32)
    pair = pairs["t2v_a14b"]
    found = sample_latents(pair, settings, T2V, text[:1], text[2:], [7])
    timesteps = torch.cat(calls.timesteps).tolist()
    assert timesteps == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-4)
    assert calls.transformers == [pair["high"]] * 2 + [pair["low"]] * 2
    # x_{sigma'} = x_sigma + (sigma' - sigma) v, by hand
    x, sigmas = calls.latents[0], [1, 0.9375, 5 / 6, 0.625, 0]
    with torch.no_grad():
        for transformer, now, then in zip(calls.transformers, sigmas, sigmas[1:], strict=False):
            timestep = torch.tensor([1000.0 * now])
            x = x + (then - now) * predict_velocity(transformer, x, timestep, text[:1])
    assert _relative(found, x) < 1e-5


@pytest.mark.parametrize(("facts", "name"), [(T2V, "t2v"), (I2V, "i2v"), (TI2V, "ti2v")])
def test_a_video_does_not_depend_on_its_batch(
    facts: Variant,
    name: str,
    pairs: dict[str, Transformers],
    pipelines: dict[str, Pipeline],
    text: Tensor,
) -> None:
    pair = pairs[facts.name]
    condition, _ = condition_of(name, pipelines[name])
    both = sample_latents(pair, SETTINGS, facts, text[:2], text[2:], [3, 4], condition)
    for i, seed in enumerate([3, 4]):
        alone = sample_latents(pair, SETTINGS, facts, text[i : i + 1], text[2:], [seed], condition)
        assert _relative(both[i], alone[0]) < 1e-5
    assert _relative(both[0], both[1]) > 0.1


def test_a_bf16_model_gets_fp32_timesteps_and_the_solver_stays_in_fp32(
    pairs: dict[str, Transformers], text: Tensor, calls: Calls, tmp_path: Path
) -> None:
    expected = sample_latents(pairs["t2v_a14b"], SETTINGS, T2V, text[:1], text[2:], [0])
    halves: Transformers = {}
    for expert, transformer in pairs["t2v_a14b"].items():
        transformer.save_pretrained(tmp_path / expert)
        halves[expert] = WanTransformer3DModel.from_pretrained(
            tmp_path / expert, torch_dtype=torch.bfloat16
        )
    calls.latents.clear()
    found = sample_latents(halves, SETTINGS, T2V, text[:1], text[2:], [0])
    assert {given.dtype for given in calls.timesteps} == {torch.float32}
    assert {given.dtype for given in calls.latents} == {torch.float32}
    assert found.dtype == torch.float32
    assert 0 < _relative(found, expected) < 0.05


def test_frames_that_do_not_fit_are_refused(pairs: dict[str, Transformers], text: Tensor) -> None:
    settings = replace(SETTINGS, frames=8)
    with pytest.raises(ValueError, match="a video of 8 frames"):
        sample_latents(pairs["t2v_a14b"], settings, T2V, text[:1], text[2:], seeds=[0])


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
