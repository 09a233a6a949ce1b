"""The learning rate by hand, and every wrong optimizer told with the key that names it."""

import pytest
import torch
from torch import nn

from train.config import OptimConfig
from train.optim import learning_rate_at, make_optimizer, optimizer_class, set_learning_rate
from train.rules import ConfigError


def settings(schedule: str = "constant", warmup: int = 4) -> OptimConfig:
    return OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)


def named(parameter: nn.Parameter) -> dict[str, nn.Parameter]:
    return {"lora_A.weight": parameter}


def rates(optim: OptimConfig, steps: int, peak: float) -> list[float]:
    return [learning_rate_at(step, steps, optim, peak) for step in range(steps)]


def test_constant_rises_and_stays() -> None:
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert rates(settings("constant"), 7, 2.0) == pytest.approx(expected)


def test_linear_falls_towards_zero() -> None:
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(settings("linear"), 8, 2.0) == pytest.approx(expected)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates(settings("cosine"), 8, 2.0)
    # 1 + cos of 0, 45, 90 and 135 degrees
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warmup_the_first_step_has_the_full_rate(schedule: str) -> None:
    assert learning_rate_at(0, 5, settings(schedule, warmup=0), 3.0) == 3.0
    assert all(rate > 0 for rate in rates(settings(schedule, warmup=0), 5, 3.0))


def test_the_rate_counts_from_the_next_step_for_all_parameters() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    first.grad = second.grad = torch.ones(1)
    optimizer.step()
    assert first.item() == second.item() == -0.25


def test_the_optimizer_is_the_configured_one_with_its_arguments() -> None:
    optim = OptimConfig(name="torch.optim.SGD", args={"momentum": 0.5})
    optimizer = make_optimizer(named(nn.Parameter(torch.zeros(2))), optim, 0.125)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 0.125
    assert optimizer.defaults["momentum"] == 0.5


def test_the_default_is_adamw_that_moves_against_the_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer(named(parameter), OptimConfig(), 0.1)
    assert type(optimizer) is torch.optim.AdamW
    parameter.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.tensor([-0.1, 0.1, 0.0]))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch.optim.AdamWW", "AdamWW"),
        ("no_such_package.Lion", "no_such_package"),
        ("torch.nn.Linear", "no optimizer"),
        ("torch.optim.lr_scheduler.LambdaLR", "no optimizer"),
    ],
)
def test_a_wrong_name_is_told_with_its_key(name: str, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.name is {name}.*{found}"):
        optimizer_class(name)


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"momentun": 0.9}, "momentun"),  # no argument of it
        ({"weight_decay": -1.0}, "weight_decay"),  # no value for it
        ({"betas": [0.9, 2.0]}, "beta"),
        ({"betas": [0.9]}, ""),  # what PyTorch says to it does not name them
        ({"betas": 0.9}, ""),
    ],
)
def test_wrong_arguments_are_told_with_their_key(args: dict[str, object], found: str) -> None:
    optim = OptimConfig(args=args)
    with pytest.raises(ConfigError, match=rf"(?s)optim\.args.*torch\.optim\.AdamW.*{found}"):
        make_optimizer(named(nn.Parameter(torch.zeros(2))), optim, 1e-3)
