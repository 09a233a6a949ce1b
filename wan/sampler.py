"""Official sampling with two experts: UniPC on the official grid, one guidance for each expert.

Source: `spec/wan22.md` sections 6.1 and 6.2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from wan.flow import expert_for, sampling_grid
from wan.variants import TRAIN_TIMESTEPS, Expert, Guidance, Variant


@dataclass(frozen=True)
class SampleSettings:
    """What a sample is made with, besides its prompt and its seed; the size is in pixels."""

    steps: int
    shift: float
    guidance: Guidance
    frames: int
    height: int
    width: int


@torch.no_grad()
def sample_latents(
    transformers: Mapping[Expert, WanTransformer3DModel],
    settings: SampleSettings,
    variant: Variant,
    text: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Normalised latents (B, C, F, h, w) in fp32, one video for each row of `text` and its seed.

    `text` (B, text_len, D) and `negative` (1, text_len, D) are padded embeddings, on the device
    where to sample. A video depends on its own prompt and seed, not on the others of the batch.
    `transformers` is asked for an expert at each step, so it may move one in when its turn comes.
    `progress(done, steps)` is called after each step.
    """
    solver = official_solver(settings.steps, settings.shift)
    shape = variant.geometry.latent_shape(settings.frames, settings.height, settings.width)
    x = initial_noise(shape, seeds).to(text.device)  # (B, C, F, h, w)
    for done, timestep in enumerate(solver.timesteps.tolist(), start=1):
        expert = expert_for(timestep, variant.boundary)
        guidance = settings.guidance.high if expert == "high" else settings.guidance.low
        v = guided_velocity(transformers[expert], x, timestep, text, negative, guidance)
        x = solver.step(v, timestep, x, return_dict=False)[0]
        if progress is not None:
            progress(done, settings.steps)
    return x


def official_solver(steps: int, shift: float) -> UniPCMultistepScheduler:
    """UniPC as the official code runs it: diffusers' algebra on the official noise levels."""
    solver = UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2,
        solver_type="bh2",
    )
    grid = sampling_grid(steps)  # an array: annotated as a list, but lists fail in it
    solver.set_timesteps(sigmas=grid)  # pyright: ignore[reportArgumentType]
    # Without it the solver looks its place up by timestep, and integer timesteps may repeat.
    solver.set_begin_index(0)
    return solver


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(B, *shape) fp32, each row from its own seed on the CPU, so that the device has no say."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def guided_velocity(
    transformer: WanTransformer3DModel,
    x: Tensor,
    timestep: float,
    text: Tensor,
    negative: Tensor,
    guidance: float,
) -> Tensor:
    """The velocity v_u + guidance (v_c - v_u) at x (B, C, F, h, w), fp32; 1 skips the v_u half."""
    if guidance == 1:
        return _velocity(transformer, x, timestep, text)
    both = torch.cat([text, negative.expand(len(x), -1, -1)])  # (2B, text_len, D)
    conditional, unconditional = _velocity(transformer, torch.cat([x, x]), timestep, both).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _velocity(
    transformer: WanTransformer3DModel, x: Tensor, timestep: float, text: Tensor
) -> Tensor:
    """The model in its own dtype, as diffusers' pipeline calls it, but timesteps stay in fp32."""
    timesteps = torch.full((len(x),), timestep, dtype=torch.float32, device=x.device)
    dtype = transformer.dtype
    return transformer(x.to(dtype), timesteps, text.to(dtype), return_dict=False)[0].float()
