"""Solvers: noise levels, timesteps and whole trajectories of the official code."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file
from torch import Tensor

from wan.sample_settings import SolverName
from wan.solvers import Solver, make_solver

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "golden.json").read_text())
MODELS = ["t2v_A14B", "i2v_A14B", "i2v_A14B_480p", "ti2v_5B"]
SOLVERS: list[SolverName] = ["unipc", "dpm++", "euler"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "golden"), [("unipc", "unipc"), ("dpm++", "dpmpp")])
def test_noise_levels_and_timesteps_are_the_official_ones(
    model: str, name: SolverName, golden: str
) -> None:
    official = GOLDEN[model]
    solver = make_solver(name, official["steps"], official["shift"])
    assert solver.timesteps.tolist() == official[f"{golden}_timesteps"]
    sigmas = torch.tensor(official[f"{golden}_sigmas"])
    assert len(solver.sigmas) == len(sigmas)
    assert (solver.sigmas - sigmas).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "golden"), [("unipc", "unipc"), ("dpm++", "dpmpp")])
def test_a_trajectory_is_the_official_one(name: SolverName, golden: str) -> None:
    recorded = load_file(FIXTURES / "solver_toy_40_shift12.safetensors")
    x = _solve_toy(make_solver(name, 40, 12.0), recorded["x_init"], recorded["mu"])
    assert _relative(x, recorded[f"x_final_{golden}"]) < 1e-6


def test_the_second_order_solvers_are_nearer_to_the_exact_solution_than_euler() -> None:
    errors = {name: _error_on_a_gaussian(make_solver(name, 40, 5.0)) for name in SOLVERS}
    assert max(errors["unipc"], errors["dpm++"]) < 0.02
    assert 0.08 < errors["euler"] < 0.2


@pytest.mark.parametrize(("name", "bound"), [("unipc", 1e-3), ("dpm++", 2e-3), ("euler", 2e-2)])
def test_many_steps_lead_to_the_exact_solution(name: SolverName, bound: float) -> None:
    solver = make_solver(name, 400, 5.0)
    if name != "euler":  # integers repeat, so a place cannot be looked up by timestep
        assert len(solver.timesteps.unique()) < 400
    assert _error_on_a_gaussian(solver) < bound


def test_euler_with_4_steps_is_the_schedule_of_distilled_models() -> None:
    solver = make_solver("euler", 4, 5.0)
    assert solver.sigmas.tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-7)
    assert solver.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-4)
    library = FlowMatchEulerDiscreteScheduler(shift=5.0)
    library.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    assert (library.sigmas - solver.sigmas).abs().max() < 1e-6


def test_euler_goes_straight_along_a_constant_velocity() -> None:
    solver, x = make_solver("euler", 7, 3.0), torch.full((2,), 5.0)
    for timestep in solver.timesteps.tolist():
        x = solver.step(torch.tensor([2.0, -1.0]), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(x, torch.tensor([3.0, 6.0]))


def _solve_toy(solver: Solver, x: Tensor, mu: Tensor) -> Tensor:
    """The velocity of golden.json, "toy", in closed form, solved from `x` to the end."""
    for timestep, sigma in zip(solver.timesteps.tolist(), solver.sigmas, strict=False):
        a, s = 1 - sigma, sigma
        x0 = torch.tanh(x * a / (a**2 + s**2 + 1e-3)) + 0.1 * mu
        x = solver.step((x - x0) / s.clamp(min=1e-3), timestep, x, return_dict=False)[0]
    return x


def _error_on_a_gaussian(solver: Solver) -> float:
    """Relative error of the end, for data N(0, 1/4): the exact path scales with its deviation."""
    x = torch.ones(1, 1, 1, 1, 1)
    for timestep, s in zip(solver.timesteps.tolist(), solver.sigmas, strict=False):
        variance, half_its_slope = (1 - s) ** 2 / 4 + s**2, s - (1 - s) / 4
        x = solver.step(half_its_slope / variance * x, timestep, x, return_dict=False)[0]
    return abs(x.item() - 0.5) / 0.5


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
