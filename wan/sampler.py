"""Official sampling of the three variants: solver, experts, guidance and what a model is given.

Source: `spec/wan22.md` sections 4, 6.1, 6.2 and 9.1.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan.conditioning import Condition, check_condition
from wan.flow import expert_for
from wan.sample_settings import Cfg, SampleSettings
from wan.solvers import make_solver
from wan.transformer import predict_velocity
from wan.variants import Expert, Variant

UNCONDITIONED = Condition()


def sample_latents(
    transformers: Mapping[Expert, WanTransformer3DModel],
    settings: SampleSettings,
    variant: Variant,
    text: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    condition: Condition = UNCONDITIONED,
) -> Tensor:
    """Normalised latents (B, C, F, h, w) in fp32, one video for each row of `text` and its seed.

    `text` (B, text_len, D) and `negative` (1, text_len, D) are padded embeddings, on the device
    where to sample. A video depends on its own prompt, seed and condition, not on the others of
    the batch. `transformers` is asked for an expert at each step, so it may move one in when its
    turn comes. `ValueError` if the size or the condition does not fit the variant.
    """
    steps = sample_steps(transformers, settings, variant, text, negative, seeds, condition)
    return deque(steps, maxlen=1).pop()  # only the last step's are kept


@torch.no_grad()
def sample_steps(
    transformers: Mapping[Expert, WanTransformer3DModel],
    settings: SampleSettings,
    variant: Variant,
    text: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    condition: Condition = UNCONDITIONED,
) -> Iterator[Tensor]:
    """`sample_latents` step by step: the latents after each of `settings.steps` steps."""
    shape = variant.geometry.latent_shape(settings.frames, settings.height, settings.width)
    check_condition(condition, variant, len(text), shape)
    solver = make_solver(settings.solver, settings.steps, settings.shift)
    x = hold_first_frame(initial_noise(shape, seeds).to(text.device), condition)  # (B, C, F, h, w)
    for timestep in solver.timesteps.tolist():
        expert = expert_for(timestep, variant.boundary)
        velocity = partial(_velocity, transformers[expert], x, timestep, condition)
        guidance = settings.guidance.of(expert)
        v = guided_velocity(velocity, text, negative, guidance, settings.cfg)
        x = hold_first_frame(solver.step(v, timestep, x, return_dict=False)[0], condition)
        yield x


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(B, *shape) fp32, each row from its own seed on the CPU, so that the device has no say."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def hold_first_frame(x: Tensor, condition: Condition) -> Tensor:
    """x (B, C, F, h, w) with the given first frame, if there is one, in place of its own."""
    if condition.first_frame is None:
        return x
    return torch.cat([condition.first_frame.expand_as(x[:, :, :1]), x[:, :, 1:]], dim=2)


def guided_velocity(
    velocity: Callable[[Tensor], Tensor], text: Tensor, negative: Tensor, guidance: float, cfg: Cfg
) -> Tensor:
    """v_u + guidance (v_c - v_u); 1 skips the v_u half.

    `velocity` maps text (B, text_len, D), or (2B, text_len, D) for all samples twice over, to as
    many rows of velocities.
    """
    if guidance == 1:
        return velocity(text)
    negative = negative.expand_as(text)
    if cfg == "batched":
        conditional, unconditional = velocity(torch.cat([text, negative])).chunk(2)
    else:
        conditional, unconditional = velocity(text), velocity(negative)
    return unconditional + guidance * (conditional - unconditional)


def _velocity(
    transformer: WanTransformer3DModel,
    x: Tensor,
    timestep: float,
    condition: Condition,
    text: Tensor,
) -> Tensor:
    """The model's velocity at x (B, C, F, h, w) for each row of text, which may be B or 2B rows."""
    if condition.channels is not None:
        channels = condition.channels.expand(len(x), -1, -1, -1, -1)
        x = torch.cat([x, channels], dim=1)  # (B, C + 4 + C, F, h, w)
    x = x.repeat(len(text) // len(x), 1, 1, 1, 1)
    timesteps = torch.full((len(x),), timestep, dtype=torch.float32, device=x.device)
    has_first_frame = condition.first_frame is not None
    given = torch.ones_like(timesteps, dtype=torch.bool) if has_first_frame else None
    return predict_velocity(transformer, x, timesteps, text, given)
