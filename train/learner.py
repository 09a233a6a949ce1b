"""One expert in training: its adapter, its optimizer, its range of noise, and one step of it."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import cast

import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from data.batches import BatchOrder, Draws, load_batch
from data.buckets import Bucket
from train import optim
from train.compose import lora_ranks, trained_experts
from train.config import Config, ExpertConfig
from train.ema import Average, averaged, follow_adapter, start_average
from train.encode import EncodedDataset
from train.groups import groups, own_group
from train.speed import prepare_to_train, records_steps
from train.start import Start, begin
from train.step import StepInputs, draw_noise, error_of, on_device, step_inputs
from train.undo import takes_no_memory, undone_if_memory_is_full
from wan import flow, lora
from wan.adapter_choices import Kind
from wan.experts import Experts
from wan.speed_choices import Keep
from wan.step_graphs import StepGraphs
from wan.transformer import device_of
from wan.variants import Expert, Variant


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
    first_place: int = 0  # of step 0, had all steps been of as many batches as they are now
    bad_steps: int = 0  # skipped, as their loss or gradient was not finite
    bad_in_row: int = 0
    ema: Average | None = None
    uses_ema: bool = False  # the average is what is measured, rendered and exported
    kept: tuple[Keep, ...] = ()  # what each block keeps for its backward pass
    place: int = 0  # of the batch at work
    graphs: StepGraphs = field(default_factory=lambda: StepGraphs(False))
    updating: bool = False  # the optimizer is at work: an error now leaves an update half done


@dataclass(frozen=True)
class StepFigures:
    """What one optimizer step says about itself, over all samples of all processes."""

    loss: float
    losses: Tensor  # (samples,)
    sigmas: Tensor  # (samples,)
    grad_norm: float  # before clipping
    learning_rate: float
    problem: str | None = None  # why nothing was updated
    seconds: Mapping[str, float] = field(default_factory=dict)  # of this process, by part
    megapixel_frames: float = 0.0  # of all samples
    waiting: float = 0.0  # share of their time in which processes waited for the slowest
    imbalance: float = 0.0  # how much more than the mean the busiest process had to see


def make_learner(
    expert: Expert,
    config: Config,
    facts: Variant,
    experts: Experts,
    dataset: EncodedDataset,
    start: Start | None = None,
    processes: int = 1,
) -> Learner:
    """Attach an adapter, fresh or from a file, and make its optimizer. Only it will move."""
    settings: ExpertConfig = attrgetter(expert)(config)
    seed = flow.mix_seed(config.seed, expert)
    transformer = experts[expert]
    ranks, kind = lora_ranks(config, settings.rank), cast("Kind", config.lora.kind)
    lora.attach(transformer, settings.rank, settings.alpha, ranks, config.lora.dropout, seed, kind)
    if start is not None:
        begin(transformer, start)
    transformer = experts[expert].train()  # with the adapter beside its base
    named = lora.named_adapter_parameters(transformer)
    kept = prepare_to_train(transformer, config, facts, dataset)
    law, sigma_range = timestep_law(config), flow.expert_range(facts.boundary, expert)
    return Learner(
        expert=expert,
        settings=settings,
        parameters=list(named.values()),
        optimizer=optim.make_optimizer(named, config.optim, settings.learning_rate),
        law=law,
        sigma_range=sigma_range,
        edges=flow.bin_edges(law, sigma_range, config.eval.bins),
        order=BatchOrder(
            [clip.bucket for clip in dataset.train.clips],
            [clip.visits for clip in dataset.train.clips],
            config.batch_size,
            seed,
            dataset.fingerprint(),
            together=config.accumulate * processes,
        ),
        seed=seed,
        draws=sample_draws(config, facts, seed),
        ema=None if config.lora.ema is None else start_average(named, config.lora.ema),
        uses_ema=config.export.weights == "ema",
        kept=kept,
    )


def make_learners(
    config: Config,
    facts: Variant,
    experts: Experts,
    dataset: EncodedDataset,
    starts: Mapping[Expert, Start],
    processes: int,
) -> dict[Expert, Learner]:
    """A learner for each expert that is trained, in the order of the variant's experts."""
    learners: dict[Expert, Learner] = {
        expert: make_learner(expert, config, facts, experts, dataset, starts.get(expert), processes)
        for expert in trained_experts(config)
    }
    kept: list[Keep] = [kind for learner in learners.values() for kind in learner.kept]
    device = next(iter(learners.values())).parameters[0].device
    graphs = StepGraphs(records_steps(config, device, kept))  # one for all: it holds one's at once
    for learner in learners.values():
        learner.graphs = graphs
    return learners


@contextmanager
def as_used(learners: Mapping[Expert, Learner]) -> Iterator[None]:
    """Within the block the adapters are what a user would get now: averages, if they are used."""
    with ExitStack() as stack:
        stack.enter_context(optim.averaged(learner.optimizer for learner in learners.values()))
        for learner in learners.values():
            if learner.uses_ema:
                stack.enter_context(averaged(learner.ema))
        yield


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
    train what one process does with N times the accumulation. If a loss or the gradient is not
    finite, on any process, nothing is updated on all of them and the figures say why.
    """
    parts = groups(config, accelerator)
    places = step_places(learner, step, config.accumulate, parts)
    started = time.monotonic()
    passes = [
        _pass(learner, place, config, facts, experts[learner.expert], dataset)
        for place in places[own_group(config, accelerator) :: parts]
    ]
    took, data = time.monotonic() - started, sum(one.data_seconds for one in passes)
    waiting = _waiting(took, accelerator)
    average_gradients(learner.parameters, accelerator)
    grad_norm = nn.utils.clip_grad_norm_(learner.parameters, config.optim.max_grad_norm)
    losses, sigmas, norm = _gathered(passes, grad_norm, config, accelerator)
    computed = time.monotonic()
    peak = learner.settings.learning_rate
    rate = optim.learning_rate_at(step, learner.settings.steps, config.optim, peak)
    optim.set_learning_rate(learner.optimizer, rate)
    rate = optim.effective_learning_rate(learner.optimizer)
    clips = [dataset.train.clips[c] for c in _clips_of(learner, places, parts)]
    seen = [megapixel_frames(clip.bucket) for clip in clips]
    figures = StepFigures(
        losses.mean().item(),
        losses,
        sigmas,
        norm,
        rate,
        problem=_problem(step, losses, sigmas, norm, [clip.name for clip in clips]),
        megapixel_frames=sum(seen),
        waiting=waiting,
        imbalance=_imbalance(seen, parts),
    )
    _update(learner, step, figures)
    seconds = {"data": data, "compute": computed - started - data}
    return replace(figures, seconds={**seconds, "update": time.monotonic() - computed})


@dataclass(frozen=True)
class _Pass:
    """One batch, forward and backward: what is told of its samples."""

    losses: Tensor  # (B,)
    sigmas: Tensor  # (B,)
    data_seconds: float


def _pass(
    learner: Learner,
    place: int,
    config: Config,
    facts: Variant,
    transformer: WanTransformer3DModel,
    dataset: EncodedDataset,
) -> _Pass:
    """Add the gradients of the batch at a place, as its share of a step."""
    started, learner.place = time.monotonic(), place
    batch = load_batch(dataset.train, learner.order.indices(place), learner.draws, place)
    draw = draw_noise(
        learner.law,
        learner.sigma_range,
        batch.latents.shape,
        learner.seed,
        place * config.batch_size,
        config.timesteps.low_discrepancy,
    )
    seconds = time.monotonic() - started
    torch.manual_seed(flow.mix_seed(learner.seed, "dropout", place))  # for the adapter's own
    device = device_of(transformer)
    losses = learner.graphs.add_gradients(
        transformer,
        learner.parameters,
        lambda *inputs: error_of(transformer, StepInputs(*inputs)),
        step_inputs(batch, draw, facts, device),
        on_device(batch.loss_weight * (1 / config.accumulate / len(batch.clips)), device),
    )
    return _Pass(losses, draw.sigma, seconds)


def _waiting(seconds: float, accelerator: Accelerator) -> float:
    """The share of their time in which processes wait for the one that took longest."""
    if accelerator.num_processes == 1:
        return 0.0
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()  # what follows waits for it anyway
    took = accelerator.gather(torch.tensor([seconds], device=accelerator.device))
    assert isinstance(took, Tensor)
    return 1 - (took.mean() / took.max()).item()


def _imbalance(seen: Sequence[float], processes: int) -> float:
    """How much more the busiest process had to see than the mean; `seen` is process by process."""
    each = torch.tensor(seen).view(processes, -1).sum(dim=1)
    return (each.max() / each.mean()).item() - 1


def step_places(learner: Learner, step: int, accumulate: int, processes: int) -> range:
    """The places of a step's batches, in the order in which the processes take them in turn."""
    first = learner.first_place + step * accumulate * processes
    return range(first, first + accumulate * processes)


def _gathered(
    passes: Sequence[_Pass],
    norm: Tensor,
    config: Config,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor, float]:
    """Losses and sigmas (samples,) of all groups of processes, in order, and the gradient's norm.

    The device is waited for once: here.
    """
    both = [one.losses for one in passes], [one.sigmas for one in passes]
    own = torch.stack([torch.cat([rows.to(norm.device) for rows in s]) for s in both])
    rows = accelerator.gather(own[None])  # (processes, 2, samples of each)
    assert isinstance(rows, Tensor)
    rows = rows[:: config.speed.context]  # (groups, 2, samples of each)
    flat = torch.cat([rows.transpose(0, 1).flatten(), norm.float()[None]]).cpu()
    all_losses, all_sigmas = flat[:-1].view(2, -1)
    return all_losses, all_sigmas, flat[-1].item()


def _clips_of(learner: Learner, places: range, processes: int) -> list[int]:
    """The clips of a step on all groups of processes, in the order of its gathered losses."""
    in_order = [place for process in range(processes) for place in places[process::processes]]
    return [clip for place in in_order for clip in learner.order.indices(place)]


def _problem(
    step: int, losses: Tensor, sigmas: Tensor, norm: float, clips: Sequence[str]
) -> str | None:
    """What is not finite in a step, and whose: of the samples with such a loss, or of all."""
    if math.isfinite(losses.sum().item() + norm):
        return None
    found = losses.tolist()
    finite = math.isfinite(sum(found))
    samples = [
        f"{clip} (sigma {sigma:.4f}, loss {loss:g})"
        for clip, sigma, loss in zip(clips, sigmas.tolist(), found, strict=True)
        if finite or not math.isfinite(loss)
    ]
    what = "gradient" if finite else "loss"
    return f"step {step + 1}: the {what} is not finite, nothing was updated: {', '.join(samples)}"


def megapixel_frames(bucket: Bucket) -> float:
    """How much there is to see in a clip: width * height * frames / 10^6."""
    return bucket.width * bucket.height * bucket.frames / 1e6


def _update(learner: Learner, step: int, figures: StepFigures) -> None:
    """Let the optimizer take its step, or count one that was skipped."""
    if figures.problem is None:
        _let_it_step(learner, step)
        learner.bad_in_row = 0
    else:
        learner.bad_steps += 1
        learner.bad_in_row += 1
    learner.optimizer.zero_grad(set_to_none=True)
    learner.steps_done = step + 1


def _let_it_step(learner: Learner, step: int) -> None:
    """The optimizer's step and the average's; where memory is full, none of it has happened."""
    average = learner.ema
    values = [] if average is None else list(average.values.values())
    learner.updating = True
    try:
        with undone_if_memory_is_full(learner.optimizer, values):
            learner.optimizer.step()
            if average is not None:
                follow_adapter(average, step)
    except torch.OutOfMemoryError:
        learner.updating = takes_no_memory(learner.optimizer)
        raise
    learner.updating = False


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Make the gradients those of all processes' samples, in one reduction."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    assert isinstance(flat, Tensor)
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)
