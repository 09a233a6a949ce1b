"""One expert in training: its adapter, its optimizer, its range of noise, and one step of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.batches import BatchOrder, Draws, load_batch
from train import optim
from train.config import Config, ExpertConfig
from train.encode import EncodedDataset
from train.step import draw_noise, velocity_error
from wan import flow, lora
from wan.experts import Experts
from wan.variants import Expert, Variant


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to do."""


@dataclass
class Learner:
    """All that belongs to the training of one expert, apart from its weights."""

    expert: Expert
    settings: ExpertConfig
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    law: flow.TimestepLaw
    sigma_range: flow.SigmaRange
    edges: Tensor  # (bins + 1,) of sigma: the bins in which losses are told
    order: BatchOrder
    seed: int
    draws: Draws
    steps_done: int = 0


@dataclass(frozen=True)
class StepFigures:
    """What one optimizer step says about itself, over all samples of all processes."""

    loss: float
    losses: Tensor  # (samples,)
    sigmas: Tensor  # (samples,)
    grad_norm: float  # before clipping
    learning_rate: float


def make_learner(
    expert: Expert,
    config: Config,
    facts: Variant,
    experts: Experts,
    dataset: EncodedDataset,
) -> Learner:
    """Attach a fresh adapter to an expert and make its optimizer. Only the adapter will move."""
    settings: ExpertConfig = attrgetter(expert)(config)
    seed = flow.mix_seed(config.seed, expert)
    transformer = experts[expert]
    targets = lora.target_modules(config.lora.targets)
    lora.attach(transformer, settings.rank, settings.alpha, targets, config.lora.dropout, seed)
    if config.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    parameters = lora.adapter_parameters(transformer)
    law, sigma_range = timestep_law(config), flow.expert_range(facts.boundary, expert)
    return Learner(
        expert=expert,
        settings=settings,
        parameters=parameters,
        optimizer=optim.make_optimizer(parameters, config.optim, settings.learning_rate),
        law=law,
        sigma_range=sigma_range,
        edges=flow.bin_edges(law, sigma_range, config.eval.bins),
        order=BatchOrder(
            [clip.bucket for clip in dataset.train.clips],
            [clip.visits for clip in dataset.train.clips],
            config.batch_size,
            seed,
            dataset.fingerprint(),
        ),
        seed=seed,
        draws=sample_draws(config, facts, seed),
    )


def sample_draws(config: Config, facts: Variant, seed: int) -> Draws:
    """What the samples of a run are given, beside what the model always needs."""
    first = config.condition.first_frame
    return Draws(
        seed=seed,
        caption_dropout=config.data.caption_dropout,
        first_frame=(0.5 if first is None else first) if facts.conditioning == "first_frame" else 0,
        last_frame=config.condition.last_frame or 0.0,
    )


def timestep_law(config: Config) -> flow.TimestepLaw:
    """The configured law of noise levels, over both experts."""
    settings = config.timesteps
    return flow.TimestepLaw(settings.base, settings.shift, settings.scale)  # pyright: ignore[reportArgumentType] (checked by the schema)


def train_step(
    learner: Learner,
    step: int,
    config: Config,
    facts: Variant,
    experts: Experts,
    dataset: EncodedDataset,
    accelerator: Accelerator,
) -> StepFigures:
    """One optimizer step of one expert: its batches, their gradients, the update.

    Order, dropout, noise and noise level are functions of the place in the run, so N processes
    train what one process does with N times the accumulation.
    """
    transformer = experts[learner.expert]
    losses, sigmas = [], []
    for micro in range(config.accumulate):
        place = (step * config.accumulate + micro) * accelerator.num_processes
        place += accelerator.process_index
        batch = load_batch(dataset.train, learner.order.indices(place), learner.draws, place)
        draw = draw_noise(
            learner.law,
            learner.sigma_range,
            batch.latents.shape,
            learner.seed,
            place * config.batch_size,
            config.timesteps.low_discrepancy,
        )
        torch.manual_seed(flow.mix_seed(learner.seed, "dropout", place))  # for the adapter's own
        loss = velocity_error(transformer, batch, draw, facts)
        weighted = loss * batch.loss_weight.to(loss.device)
        (weighted.mean() / config.accumulate).backward()
        losses.append(loss.detach())
        sigmas.append(draw.sigma)
    all_losses, all_sigmas = (_gathered(rows, accelerator) for rows in (losses, sigmas))
    average_gradients(learner.parameters, accelerator)
    grad_norm = nn.utils.clip_grad_norm_(learner.parameters, config.optim.max_grad_norm).item()
    rate = optim.learning_rate_at(
        step, learner.settings.steps, config.optim, learner.settings.learning_rate
    )
    figures = StepFigures(all_losses.mean().item(), all_losses, all_sigmas, grad_norm, rate)
    if not math.isfinite(all_losses.sum().item() + grad_norm):
        clips = _clips_of(learner, step, config.accumulate, accelerator.num_processes)
        raise _not_finite(
            learner, step, figures, [dataset.train.clips[clip].name for clip in clips]
        )
    optim.set_learning_rate(learner.optimizer, rate)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.steps_done = step + 1
    return figures


def _gathered(batches: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """The values (B,) of all batches of all processes, process by process."""
    values = accelerator.gather(torch.cat(list(batches)).to(accelerator.device))
    assert isinstance(values, Tensor)
    return values.cpu()


def _clips_of(learner: Learner, step: int, accumulate: int, processes: int) -> list[int]:
    """The clips of a step on all processes, in the order of its gathered losses."""
    first = step * accumulate * processes
    places = [first + m * processes + p for p in range(processes) for m in range(accumulate)]
    return [clip for place in places for clip in learner.order.indices(place)]


def _not_finite(
    learner: Learner, step: int, figures: StepFigures, clips: Sequence[str]
) -> TrainingStopped:
    return TrainingStopped(
        f"{learner.expert} expert, step {step + 1}: loss {figures.loss} and gradient norm "
        f"{figures.grad_norm} are not finite (clips {', '.join(clips)}; sigma "
        f"{figures.sigmas.tolist()}). Nothing was updated. Lower {learner.expert}.learning_rate, "
        "or look at these clips."
    )


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Make the gradients those of all processes' samples, in one reduction."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    assert isinstance(flat, Tensor)
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)
