"""Sampling: the official solver, and the loop of diffusers' pipeline on the official grid."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

from wan.checkpoints import find_model, load_transformer
from wan.flow import sampling_grid, sampling_timesteps, steps_of_experts
from wan.sampler import SampleSettings, official_solver, sample_latents
from wan.variants import EXPERTS, Expert, Guidance, variant

FIXTURES = Path(__file__).parent / "fixtures"
TINY = variant("tiny")
SETTINGS = SampleSettings(
    steps=8, shift=12.0, guidance=Guidance(low=3.0, high=5.0), frames=5, height=48, width=32
)
Transformers = dict[Expert, WanTransformer3DModel]


@pytest.fixture(scope="module")
def transformers(toy_model: Path) -> Transformers:
    folder = find_model(str(toy_model), "tiny")
    return {expert: load_transformer(folder, expert, torch.float32, "cpu") for expert in EXPERTS}


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Embeddings of two prompts and of the negative one: (3, text_len, D)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, TINY.text_len, 32, generator=generator)


class Calls:
    """What the experts were given, in order of the calls."""

    def __init__(self, transformers: Transformers) -> None:
        self.experts: list[Expert] = []
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.text: list[Tensor] = []
        self.hooks = [
            transformer.register_forward_pre_hook(partial(self._record, expert))
            for expert, transformer in transformers.items()
        ]

    def _record(self, expert: Expert, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.experts.append(expert)
        self.latents.append(inputs[0])
        self.timesteps.append(inputs[1])
        self.text.append(inputs[2])


@pytest.fixture
def calls(transformers: Transformers) -> Iterator[Calls]:
    calls = Calls(transformers)
    yield calls
    for hook in calls.hooks:
        hook.remove()


def test_solver_equals_the_official_one() -> None:
    recorded = load_file(FIXTURES / "solver_toy_40_shift12.safetensors")
    solver = official_solver(40, 12.0)
    x = recorded["x_init"]
    for timestep, sigma in zip(solver.timesteps, solver.sigmas, strict=False):
        # golden.json, "toy": a velocity in closed form
        a, s = 1 - sigma, sigma
        x0 = torch.tanh(x * a / (a**2 + s**2 + 1e-3)) + 0.1 * recorded["mu"]
        x = solver.step((x - x0) / s.clamp(min=1e-3), timestep, x, return_dict=False)[0]
    assert _relative(x, recorded["x_final_unipc"]) < 1e-6


def test_loop_equals_the_pipeline_of_diffusers(
    toy_model: Path, transformers: Transformers, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = WanPipeline.from_pretrained(toy_model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, flow_shift=SETTINGS.shift
    )
    pipeline.scheduler = scheduler
    on_default_grid = scheduler.set_timesteps

    def on_official_grid(steps: int, device: torch.device) -> None:
        on_default_grid(sigmas=sampling_grid(steps), device=device)

    monkeypatch.setattr(scheduler, "set_timesteps", on_official_grid)
    expected = pipeline(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[2:],
        num_inference_steps=SETTINGS.steps,
        guidance_scale=SETTINGS.guidance.high,
        guidance_scale_2=SETTINGS.guidance.low,
        num_frames=SETTINGS.frames,
        height=SETTINGS.height,
        width=SETTINGS.width,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
    )[0]
    found = sample_latents(transformers, SETTINGS, TINY, text[:1], text[2:], seeds=[7])
    assert found.shape == (1, 16, 2, 6, 4)
    assert found.dtype == torch.float32
    assert _relative(found, expected) < 1e-5
    # The comparison can tell: each guidance, and which is whose, shows in the result.
    swapped = Guidance(low=SETTINGS.guidance.high, high=SETTINGS.guidance.low)
    other = replace(SETTINGS, guidance=swapped)
    found = sample_latents(transformers, other, TINY, text[:1], text[2:], seeds=[7])
    assert _relative(found, expected) > 1e-3


def test_experts_change_once_at_the_boundary(
    transformers: Transformers, text: Tensor, calls: Calls
) -> None:
    progress: list[tuple[int, int]] = []
    sample_latents(
        transformers, SETTINGS, TINY, text[:1], text[2:], [0], lambda *done: progress.append(done)
    )
    counts = steps_of_experts(SETTINGS.steps, SETTINGS.shift, TINY.boundary)
    assert calls.experts == ["high"] * counts["high"] + ["low"] * counts["low"]
    assert min(counts.values()) > 0
    timesteps = sampling_timesteps(SETTINGS.steps, SETTINGS.shift)
    assert [t.unique().tolist() for t in calls.timesteps] == [[t] for t in timesteps]
    assert progress == [(done, SETTINGS.steps) for done in range(1, SETTINGS.steps + 1)]


@pytest.mark.parametrize("unguided", EXPERTS)
def test_guidance_of_1_skips_the_negative_prompt_for_that_expert(
    transformers: Transformers, text: Tensor, calls: Calls, unguided: Expert
) -> None:
    guidance = Guidance(low=3.0, high=1.0) if unguided == "high" else Guidance(low=1.0, high=3.0)
    settings = replace(SETTINGS, guidance=guidance)
    sample_latents(transformers, settings, TINY, text[:2], text[2:], seeds=[0, 1])
    for expert, given in zip(calls.experts, calls.text, strict=True):
        rows = text[:2] if expert == unguided else text[[0, 1, 2, 2]]
        assert torch.equal(given, rows)


def test_a_video_does_not_depend_on_its_batch(transformers: Transformers, text: Tensor) -> None:
    both = sample_latents(transformers, SETTINGS, TINY, text[:2], text[2:], seeds=[3, 4])
    for i, seed in enumerate([3, 4]):
        alone = sample_latents(
            transformers, SETTINGS, TINY, text[i : i + 1], text[2:], seeds=[seed]
        )
        assert _relative(both[i], alone[0]) < 1e-5
    assert _relative(both[0], both[1]) > 0.1


def test_a_bf16_model_gets_fp32_timesteps_and_the_solver_stays_in_fp32(
    toy_model: Path, transformers: Transformers, text: Tensor
) -> None:
    folder = find_model(str(toy_model), "tiny")
    halves: Transformers = {
        expert: load_transformer(folder, expert, torch.bfloat16, "cpu") for expert in EXPERTS
    }
    calls = Calls(halves)
    found = sample_latents(halves, SETTINGS, TINY, text[:1], text[2:], seeds=[0])
    assert {given.dtype for given in calls.timesteps} == {torch.float32}
    assert {given.dtype for given in calls.latents} == {torch.bfloat16}
    assert found.dtype == torch.float32
    expected = sample_latents(transformers, SETTINGS, TINY, text[:1], text[2:], seeds=[0])
    assert _relative(found, expected) < 0.05


def test_frames_that_do_not_fit_are_refused(transformers: Transformers, text: Tensor) -> None:
    with pytest.raises(ValueError, match="a video of 8 frames"):
        sample_latents(
            transformers, replace(SETTINGS, frames=8), TINY, text[:1], text[2:], seeds=[0]
        )


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
