"""One training step's mathematics: noise level, noise, prediction, loss.

Sigma and noise are functions of (seed, sample): any sample of a run can be made again alone, on any
number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from data.batches import Batch
from wan import flow
from wan.conditioning import channels_condition
from wan.text import pad_text
from wan.transformer import device_of, predict_velocity
from wan.variants import Variant


@dataclass(frozen=True)
class NoiseDraw:
    """How noisy each sample of a batch is, and with what."""

    sigma: Tensor  # (B,) fp32
    noise: Tensor  # (B, C, F, h, w) fp32


def draw_noise(
    law: flow.TimestepLaw,
    sigma_range: flow.SigmaRange,
    shape: Sequence[int],
    seed: int,
    first: int,
    low_discrepancy: bool,
) -> NoiseDraw:
    """Noise for samples `first` to `first + B - 1` of a run, `shape` being (B, C, F, h, w)."""
    batch, *latent_shape = shape
    u = flow.uniforms(seed, first, batch, low_discrepancy)
    noise = [flow.noise_like(latent_shape, seed, first + slot) for slot in range(batch)]
    return NoiseDraw(sigma=law.draw(u, sigma_range), noise=torch.stack(noise))


class StepInputs(NamedTuple):
    """What the model is given and what it is to say, all on its device."""

    x: Tensor  # (B, C_in, F, h, w), between clip and noise, with its condition
    timestep: Tensor  # (B,)
    text: Tensor  # (B, text_len, D), padded
    first_frame_given: Tensor | None  # (B,) bool
    velocity: Tensor  # (B, C, F, h, w)
    weight: Tensor  # (B, F, h, w): how much each place counts


def velocity_error(
    transformer: WanTransformer3DModel, batch: Batch, draw: NoiseDraw, facts: Variant
) -> Tensor:
    """Mean squared error (B,) in fp32 of the predicted velocity, for each sample.

    Places count as their mask says, and a first frame that TI2V-5B is given does not count at all.
    """
    return error_of(transformer, step_inputs(batch, draw, facts, device_of(transformer)))


def error_of(transformer: WanTransformer3DModel, inputs: StepInputs) -> Tensor:
    """`velocity_error` on inputs that are ready: nothing here waits for the host or for a copy."""
    error = (predicted_velocity(transformer, inputs) - inputs.velocity).square().mean(dim=1)
    # A mask may leave nothing but the frame that is given: no error then, not 0 / 0.
    weight, places = inputs.weight, (1, 2, 3)
    return (weight * error).sum(dim=places) / weight.sum(dim=places).clamp_min(1e-6)


def predicted_velocity(transformer: WanTransformer3DModel, inputs: StepInputs) -> Tensor:
    """The model's velocity (B, C, F, h, w) in fp32; it runs in its own dtype, as in sampling."""
    x, timestep, text, given = inputs[:4]
    return predict_velocity(transformer, x, timestep, text, given)


def step_inputs(batch: Batch, draw: NoiseDraw, facts: Variant, device: torch.device) -> StepInputs:
    """A batch with its noise on the device. Path and target are in fp32 (wan22.md, 3.1 and 4)."""
    x0, noise, sigma = (on_device(t, device) for t in (batch.latents, draw.noise, draw.sigma))
    x0 = x0.float()
    x_sigma = flow.add_noise(x0, noise, sigma)  # (B, C, F, h, w)
    weight = x0.new_ones(x0.shape[0], *x0.shape[2:])  # (B, F, h, w)
    if batch.mask is not None:
        weight = on_device(batch.mask, device)

    given = None
    if facts.conditioning == "first_frame" and batch.first_given.any():
        given = on_device(
            batch.first_given & (x0.shape[2] > 1), device
        )  # (B,): an image has no more
        hold = given.view(-1, 1, 1, 1, 1)
        x_sigma = torch.cat([torch.where(hold, x0, x_sigma)[:, :, :1], x_sigma[:, :, 1:]], dim=2)
        weight = weight.clone()
        weight[:, 0] *= ~given[:, None, None]
    if batch.condition is not None:
        seen = [
            channels_condition(condition[None], last)[0]
            for condition, last in zip(batch.condition, batch.last_given.tolist(), strict=True)
        ]
        seen = on_device(torch.stack(seen).float(), device)
        x_sigma = torch.cat([x_sigma, seen], dim=1)  # (B, 36, F, h, w)

    text = on_device(pad_text(batch.text, facts.text_len), device)  # (B, text_len, D)
    velocity = flow.velocity(x0, noise)
    return StepInputs(x_sigma, flow.timestep_of(sigma), text, given, velocity, weight)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on the device; the host does not wait for the copy, nor for what runs before it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
