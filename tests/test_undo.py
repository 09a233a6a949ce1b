"""What an update has changed is to the bit as before it, if memory was full on its way."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.config import OptimConfig
from train.ema import follow_adapter, start_average
from train.optim import make_optimizer
from train.undo import takes_no_memory, undone_if_memory_is_full

CHOICES = [
    OptimConfig(name="torch.optim.AdamW", b_ratio=4),
    OptimConfig(name="torch.optim.AdamW", args={"foreach": True}),
    OptimConfig(name="pytorch_optimizer.Prodigy"),
    OptimConfig(name="schedulefree.AdamWScheduleFree"),
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.name} {choice.args}")
def test_parameters_memory_and_groups_are_as_they_were(choice: OptimConfig, steps: int) -> None:
    numbers = {f"{name}.weight": nn.Parameter(torch.ones(2, 3)) for name in ("lora_A", "lora_B")}
    optimizer, average = make_optimizer(numbers, choice, 0.1), torch.zeros(2)

    def step(gradient: float) -> None:
        for number in numbers.values():
            number.grad = torch.full((2, 3), gradient)
        optimizer.step()

    def update() -> None:
        with undone_if_memory_is_full(optimizer, [average]):
            step(7.0)
            average.add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    for done in range(steps):
        step(0.5 + done)
    before = deepcopy((optimizer.state_dict(), numbers, average))
    with pytest.raises(torch.OutOfMemoryError):
        update()
    now = optimizer.state_dict(), {name: n.detach() for name, n in numbers.items()}, average
    torch.testing.assert_close(now, before, rtol=0, atol=0)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.name} {choice.args}")
def test_an_update_with_room_is_the_update(choice: OptimConfig) -> None:
    ends = []
    for watched in (True, False):
        numbers = {f"{n}.weight": nn.Parameter(torch.ones(2, 3)) for n in ("lora_A", "lora_B")}
        optimizer = make_optimizer(numbers, choice, 0.1)
        for gradient in (0.5, -2.0):
            for number in numbers.values():
                number.grad = torch.full((2, 3), gradient)
            if watched:
                with undone_if_memory_is_full(optimizer, []):
                    optimizer.step()
            else:
                optimizer.step()
        ends.append((optimizer.state_dict(), [n.detach() for n in numbers.values()]))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


class NothingNew(TorchDispatchMode):
    """Within it no operation may take memory: what it returns lies where an input lies."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        assert places(result) <= places((args, kwargs)), function
        return result


def places(values: object) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in tree_leaves(values) if isinstance(v, Tensor)}


def test_a_fused_optimizer_makes_nothing_new_after_its_first_step() -> None:
    """This is why nothing is copied for it; the average after it is moved in place as well."""
    numbers = {f"{n}.weight": nn.Parameter(torch.ones(2, 3)) for n in ("lora_A", "lora_B")}
    choice = OptimConfig(name="torch.optim.AdamW", args={"fused": True})
    optimizer, average = make_optimizer(numbers, choice, 0.1), start_average(numbers, 0.9)
    for number in numbers.values():
        number.grad = torch.ones(2, 3)
    assert not takes_no_memory(optimizer)
    optimizer.step()
    assert takes_no_memory(optimizer)
    with NothingNew():
        optimizer.step()
        follow_adapter(average, 1)
