"""The optimizer by its dotted name, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

import torch
from torch import nn

from train.config import OptimConfig
from train.rules import ConfigError


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class that `optim.name` means; `ConfigError` if it cannot be imported or is none."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"optim.name is {name}, which cannot be imported ({error}). Install its package, or "
            "use torch.optim.AdamW."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optim.name is {name}, which is no optimizer of PyTorch's kind.")
    return found


def make_optimizer(
    parameters: Sequence[nn.Parameter], optim: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """The configured optimizer over an adapter's parameters; `ConfigError` for wrong arguments."""
    make = cast("Callable[..., torch.optim.Optimizer]", optimizer_class(optim.name))
    try:
        return make(parameters, lr=learning_rate, **optim.args)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"optim.args does not fit {optim.name}: {error}. Change optim.args.KEY=…, or take a "
            "key away with ~optim.args.KEY."
        ) from error


def check_optimizer(optim: OptimConfig) -> None:
    """Make the optimizer of one number, so that wrong settings are told before training."""
    make_optimizer([nn.Parameter(torch.zeros(1))], optim, optim.learning_rate)


def learning_rate_at(step: int, steps: int, optim: OptimConfig, peak: float) -> float:
    """Learning rate of step 0..steps-1: linear warm-up, then constant, cosine or linear to zero."""
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if optim.schedule == "linear" else peak


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
