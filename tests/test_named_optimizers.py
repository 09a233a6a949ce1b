"""Every optimizer of conf/optim: it learns, continues to the bit, and keeps LoRA+'s ratio."""

import io
import itertools

import pytest
import torch
from torch import Tensor, nn

from train.compose import compose
from train.config import Config
from train.optim import (
    averaged,
    check_optimizer,
    effective_learning_rate,
    make_optimizer,
    set_learning_rate,
)
from train.rules import ConfigError

WITH_A_RATE = ["adamw", "adamw8bit", "lion", "muon", "schedulefree"]
NAMES = [*WITH_A_RATE, "prodigy"]
RATES = {"lion": 2e-3, "prodigy": 1.0}  # of the problem below; of the others 1e-2


def config_of(name: str, *overrides: str) -> Config:
    """A run with a file of conf/optim; without bitsandbytes, an extra, its test is left out."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="the extra [gpu] is not installed")
    return compose(["name=x", "model.path=x", "data.path=x", f"optim={name}", *overrides])


class Regression:
    """An adapter B A (96, 64) of rank 8 that learns a matrix of rank 4."""

    def __init__(self, name: str, *overrides: str, device: str = "cpu") -> None:
        draw = torch.Generator().manual_seed(0)
        self.target = torch.randn(96, 4, generator=draw) @ torch.randn(4, 64, generator=draw) / 8
        self.target = self.target.to(device)
        self.a = nn.Parameter((torch.randn(8, 64, generator=draw) / 8).to(device))
        self.b = nn.Parameter(torch.zeros(96, 8, device=device))
        named = {"q.lora_A.default.weight": self.a, "q.lora_B.default.weight": self.b}
        optim = config_of(name, *overrides).optim
        self.optimizer = make_optimizer(named, optim, RATES.get(name, 1e-2))

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def loss(self) -> Tensor:
        return (self.b @ self.a - self.target).square().mean()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([self.a.detach(), self.b.detach(), self.optimizer.state_dict()], file)
        file.seek(0)
        return file

    @torch.no_grad()
    def load(self, file: io.BytesIO) -> None:
        a, b, state = torch.load(file, weights_only=True)
        self.a.copy_(a)
        self.b.copy_(b)
        self.optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    problem = Regression(name)
    before = problem.loss().item()
    for _ in range(120):
        problem.step()
    with averaged([problem.optimizer]):
        assert problem.loss().item() < 0.5 * before


@pytest.mark.parametrize(
    ("name", "ratio"), [("prodigy", 1), *itertools.product(WITH_A_RATE, (1, 16))]
)
def test_what_is_saved_goes_on_to_the_bit(name: str, ratio: int) -> None:
    whole, resumed = (Regression(name, f"optim.b_ratio={ratio}") for _ in range(2))
    for _ in range(7):
        whole.step()
    resumed.load(whole.saved())
    forgetful = Regression(name, f"optim.b_ratio={ratio}")
    with torch.no_grad():
        forgetful.a.copy_(whole.a)
        forgetful.b.copy_(whole.b)
    for step in range(5):
        for problem in (whole, resumed, forgetful):
            set_learning_rate(problem.optimizer, RATES.get(name, 1e-2) * (1 - step / 9))
        assert whole.step() == resumed.step()
        forgetful.step()
    assert torch.equal(whole.a, resumed.a)
    assert torch.equal(whole.b, resumed.b)
    assert not torch.equal(whole.b, forgetful.b)  # there was something to save


@pytest.mark.parametrize("name", WITH_A_RATE)
def test_b_moves_by_its_ratio_whatever_the_schedule_says(name: str) -> None:
    a, b = (nn.Parameter(torch.zeros(6, 6)) for _ in range(2))
    optim = config_of(name, "optim.b_ratio=16").optim
    optimizer = make_optimizer({"x.lora_A.weight": a, "x.lora_B.weight": b}, optim, 1e-3)
    assert effective_learning_rate(optimizer) == 1e-3
    for rate in (None, 5e-4):  # as it was made, then as it is set
        before = torch.stack([a, b]).detach()
        if rate is not None:
            set_learning_rate(optimizer, rate)
            assert effective_learning_rate(optimizer) == rate
        a.grad, b.grad = torch.eye(6), torch.eye(6)
        optimizer.step()
        moved_a, moved_b = (torch.stack([a, b]).detach() - before).norm(dim=(1, 2)).tolist()
        assert moved_a > 0
        assert moved_b / moved_a == pytest.approx(16, rel=2e-3)  # but for the second step's decay


def test_prodigy_shows_the_rate_that_it_has_found() -> None:
    problem = Regression("prodigy")
    rates = [effective_learning_rate(problem.optimizer)]
    for _ in range(60):
        problem.step()
        rates.append(effective_learning_rate(problem.optimizer))
    assert rates[0] == 1e-6
    assert 1e-3 < rates[-1] < 1
    set_learning_rate(problem.optimizer, 0.5)
    assert effective_learning_rate(problem.optimizer) == 0.5 * rates[-1]


def test_the_schedule_free_average_is_that_of_its_descent() -> None:
    """With a constant rate: the mean of all points z, where no gradient is taken."""
    problem = Regression("schedulefree")
    points = []
    for _ in range(9):
        problem.step()
        points.append(problem.optimizer.state[problem.b]["z"].clone())
    trained = problem.b.detach().clone()
    with averaged([problem.optimizer]):
        torch.testing.assert_close(problem.b.detach(), torch.stack(points).mean(0))
    assert not torch.allclose(trained, torch.stack(points).mean(0))


def test_to_look_at_the_average_changes_no_training() -> None:
    seen, unseen = Regression("schedulefree"), Regression("schedulefree")
    for _ in range(6):
        assert seen.step() == unseen.step()
        with averaged([seen.optimizer]):
            average = seen.b.detach().clone()
            for _ in range(2):
                with averaged([seen.optimizer]):
                    assert torch.equal(seen.b, average)
                assert torch.equal(seen.b, average)
        assert torch.equal(seen.b, unseen.b)


def test_an_error_in_the_block_leaves_the_trained_adapter() -> None:
    problem = Regression("schedulefree")
    problem.step()
    problem.step()
    trained = problem.b.detach().clone()
    with pytest.raises(ZeroDivisionError), averaged([problem.optimizer]):
        _ = 1 / torch.equal(problem.b, trained)  # they differ
    assert torch.equal(problem.b, trained)
    problem.step()  # is in training again


@pytest.mark.parametrize("name", [name for name in NAMES if name != "schedulefree"])
def test_other_optimizers_have_no_average(name: str) -> None:
    problem = Regression(name)
    problem.step()
    trained = problem.b.detach().clone()
    with averaged([problem.optimizer]):
        assert torch.equal(problem.b, trained)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_accepted_as_it_is(name: str) -> None:
    check_optimizer(config_of(name))


@pytest.mark.parametrize(
    ("name", "setting", "told"),
    [
        ("prodigy", "optim.learning_rate=1e-4", "high.learning_rate is 0.0001, but optim.name is "),
        ("prodigy", "low.learning_rate=0.01", "low.learning_rate is 0.01, but optim.name is "),
        ("prodigy", "optim.b_ratio=16", "optim.b_ratio is 16, but optim.name is "),
        ("schedulefree", "optim.schedule=cosine", "optim.schedule is cosine, but optim.name is "),
        ("schedulefree", "optim.schedule=linear", "optim.schedule is linear, but optim.name is "),
        ("muon", "lora.kind=dora", "torch.optim.Muon, which takes matrices alone, but lora.kind="),
        ("lion", "+optim.args.momentum=0.9", "optim.args does not fit pytorch_optimizer.Lion: it"),
        ("prodigy", "+optim.args.d=1", "optim.args does not fit pytorch_optimizer.Prodigy: it"),
        ("muon", "+optim.args.betas=[0.9,0.99]", "optim.args does not fit torch.optim.Muon: it"),
        ("schedulefree", "optim.args.betas=[0.9]", "optim.args does not fit schedulefree."),
        ("schedulefree", "optim.args.weight_decay=much", "optim.args does not fit schedulefree."),
    ],
)
def test_a_contradiction_is_told_with_both_keys(name: str, setting: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config_of(name, setting))
    assert told in str(caught.value)


def test_a_rate_that_no_trained_expert_takes_contradicts_nothing() -> None:
    check_optimizer(config_of("prodigy", "low.learning_rate=0.01", "experts=[high]"))


def test_a_ratio_needs_factors() -> None:
    config = config_of("adamw", "optim.b_ratio=16")
    with pytest.raises(ConfigError, match=r"optim\.b_ratio is 16.* without factors A and B"):
        make_optimizer({"x.lokr_w1": nn.Parameter(torch.zeros(2, 2))}, config.optim, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", WITH_A_RATE)
def test_a_step_on_the_gpu_does_not_wait_for_it(name: str) -> None:
    problem = Regression(name, device="cuda")
    for step in itertools.count():
        problem.loss().backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first makes the state
        try:
            set_learning_rate(problem.optimizer, 1e-3)
            problem.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step == 3:
            break
    assert problem.optimizer.param_groups[0].get("fused", True)
