"""The optimizer by its dotted name, and the learning rate as a function of the step.

Two kinds differ from the rest, and are known by what they keep in their parameter groups. Prodigy
finds the rate by itself: `d`, of which the configured rate is a factor. Schedule-free AdamW takes
its gradients beside the running average that is to be used: `train_mode` says which of the two the
parameters are, and `averaged` shows the average. Nothing here waits for a GPU; of the optimizers of
`conf/optim`, Prodigy alone does so in its step, to read its `d`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from train.compose import trained_experts
from train.config import Config, OptimConfig
from train.rules import ConfigError

if TYPE_CHECKING:
    from schedulefree import AdamWScheduleFree

LEAST_FACTOR = 0.1  # below it, a factor of a rate that finds itself was meant as a rate


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that `optim.name` means; `ConfigError` if it cannot be imported or is none."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"optim.name is {name}, which cannot be imported ({error}). Install its package "
            "(bitsandbytes: .venv/bin/pip install -e '.[gpu]' -c constraints.txt), or use "
            "torch.optim.AdamW."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optim.name is {name}, which is no optimizer of PyTorch's kind.")
    return found


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], optim: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """The configured optimizer over an adapter's parameters, by their names in the model.

    B has `optim.b_ratio` times the rate of all else (LoRA+, arXiv 2402.12354). PyTorch's own are
    fused on a GPU; on a CPU that would round otherwise. `ConfigError` for what does not fit.
    """
    found = optimizer_class(optim.name)
    takes = inspect.signature(found).parameters
    args = dict(optim.args)
    on_gpu = all(parameter.is_cuda for parameter in parameters.values())
    if on_gpu and "fused" in takes and not {"fused", "foreach"} & set(args):
        args["fused"] = True
    groups = _groups(parameters, optim.b_ratio, learning_rate)
    make = cast("Callable[..., torch.optim.Optimizer]", found)
    with _blamed_on_args(optim):
        if unknown := [name for name in args if name not in takes]:  # **kwargs would swallow it
            raise TypeError(f"it takes no {unknown[0]}")
        optimizer = make(groups, lr=learning_rate, **args)
        if _is_schedule_free(optimizer):
            cast("AdamWScheduleFree", optimizer).train()
    return optimizer


@contextmanager
def _blamed_on_args(optim: OptimConfig) -> Iterator[None]:
    """What an optimizer's class complains about, as an error of `optim.args`."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"optim.args does not fit {optim.name}: {error}. Change optim.args.KEY=…, or take a "
            "key away with ~optim.args.KEY."
        ) from error


def _groups(
    parameters: Mapping[str, nn.Parameter], b_ratio: float, learning_rate: float
) -> list[dict[str, object]]:
    """One group, or two if B has a rate of its own; `rate_ratio` stays beside it, also saved."""
    if b_ratio == 1:
        return [{"params": list(parameters.values())}]
    b = [parameter for name, parameter in parameters.items() if "lora_B" in name]
    others = [parameter for name, parameter in parameters.items() if "lora_B" not in name]
    if not b or not others:
        raise ConfigError(
            f"optim.b_ratio is {b_ratio:g}, which has no effect on an adapter without factors A "
            "and B. Set optim.b_ratio=1."
        )
    return [
        {"params": others, "lr": learning_rate, "rate_ratio": 1.0},
        {"params": b, "lr": learning_rate * b_ratio, "rate_ratio": b_ratio},
    ]


def check_optimizer(config: Config) -> None:
    """Let it make a step with two numbers, so that what cannot work is told before training."""
    optim = config.optim
    numbers = {f"{name}.weight": nn.Parameter(torch.zeros(1, 1)) for name in ("lora_A", "lora_B")}
    optimizer = make_optimizer(numbers, optim, optim.learning_rate)
    for number in numbers.values():
        number.grad = torch.ones(1, 1)
    with suppress(RuntimeError), _blamed_on_args(optim):  # one for GPUs alone cannot do it here
        optimizer.step()
    if _is_schedule_free(optimizer) and optim.schedule != "constant":
        raise ConfigError(
            f"optim.schedule is {optim.schedule}, but optim.name is {optim.name}, whose average "
            "takes the place of a schedule. Set optim.schedule=constant."
        )
    if _finds_its_rate(optimizer):
        _check_factor(config)


def _check_factor(config: Config) -> None:
    optim = config.optim
    if optim.b_ratio != 1:
        raise ConfigError(
            f"optim.b_ratio is {optim.b_ratio:g}, but optim.name is {optim.name}, which finds one "
            "rate for all. Set optim.b_ratio=1, or use optim=adamw."
        )
    for expert in trained_experts(config):
        factor = attrgetter(f"{expert}.learning_rate")(config)
        if factor < LEAST_FACTOR:
            raise ConfigError(
                f"{expert}.learning_rate is {factor:g}, but optim.name is {optim.name}, which "
                "finds the rate by itself and takes this as a factor of it. Set "
                "optim.learning_rate=1."
            )


def learning_rate_at(step: int, steps: int, optim: OptimConfig, peak: float) -> float:
    """Learning rate of step 0..steps-1: linear warm-up, then constant, cosine or linear to zero."""
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if optim.schedule == "linear" else peak


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate from the next step on; B keeps its ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_ratio", 1.0)


def effective_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of A, as a step takes it: with Prodigy what it has found, times the one that is set.

    Both are numbers of the host.
    """
    group = optimizer.param_groups[0]
    return group["lr"] * group.get("d", 1.0)


@contextmanager
def averaged(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Within the block the adapters are as they are to be used: where they are read, not trained.

    With a schedule-free optimizer that is their average; with others, and in a block within such a
    block, nothing changes. Afterwards they are to the bit what they were, so that how often one
    looks changes no training.
    """
    free = [
        cast("AdamWScheduleFree", optimizer)
        for optimizer in optimizers
        if _is_schedule_free(optimizer) and optimizer.param_groups[0]["train_mode"]
    ]
    parameters = [
        p for optimizer in free for group in optimizer.param_groups for p in group["params"]
    ]
    trained = [parameter.detach().clone() for parameter in parameters]
    try:
        for optimizer in free:
            optimizer.eval()
        yield
    finally:
        for optimizer in free:
            optimizer.train()
        with torch.no_grad():
            for parameter, values in zip(parameters, trained, strict=True):
                parameter.copy_(values)


def _is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]


def _finds_its_rate(optimizer: torch.optim.Optimizer) -> bool:
    return "d" in optimizer.param_groups[0]
