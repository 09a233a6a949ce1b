"""The solvers of sampling: the library's algebra on the noise levels of the official code.

The library's own grids differ from the official ones, and so do its samples (wan22.md, traps 4 and
5): here every solver is told its noise levels. Source: `spec/wan22.md` sections 6.2 and 9.1.
"""

from typing import Literal, Protocol, cast

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from wan.flow import sampling_grid, shift_sigma
from wan.sample_settings import SolverName
from wan.variants import TRAIN_TIMESTEPS


class Solver(Protocol):
    """A scheduler of the library, as sampling uses it."""

    timesteps: Tensor  # (steps,): what the model is given, in order
    sigmas: Tensor  # (steps + 1,): the noise level at which each step starts, and 0

    def step(
        self, model_output: Tensor, timestep: float, sample: Tensor, *, return_dict: Literal[False]
    ) -> tuple[Tensor, ...]:
        """The sample after the step, first of the tuple; steps must be taken in order."""
        ...


def make_solver(name: SolverName, steps: int, shift: float) -> Solver:
    """A solver at its first step.

    The timesteps of UniPC and DPM++ are integers, truncated as in the official code; Euler's are
    floats.
    """
    if name == "unipc":
        solver = _unipc(steps, shift)
    elif name == "dpm++":
        solver = _dpm(steps, shift)
    else:
        solver = _euler(steps, shift)
    # Without it a solver looks its place up by timestep, and integer timesteps may repeat.
    solver.set_begin_index(0)
    return cast(Solver, solver)  # their annotations differ, what they do is this


def _unipc(steps: int, shift: float) -> UniPCMultistepScheduler:
    """Official UniPC: from sigma 0.999 before the shift."""
    solver = UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2,
        solver_type="bh2",
    )
    grid = sampling_grid(steps)  # an array: annotated as a list, but lists fail in it
    solver.set_timesteps(sigmas=grid)  # pyright: ignore[reportArgumentType]
    return solver


def _dpm(steps: int, shift: float) -> DPMSolverMultistepScheduler:
    """Official DPM-Solver++: from sigma 1, second order, midpoint, the last step of first order."""
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
    )
    solver.set_timesteps(steps)
    # It takes no noise levels, and its own grid is that of UniPC.
    sigmas = sigmas_from_1(steps, shift)
    solver.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
    solver.timesteps = torch.tensor(TRAIN_TIMESTEPS * sigmas).long()
    return solver


def _euler(steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """First-order steps from sigma 1."""
    solver = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)  # shifts nothing
    solver.set_timesteps(sigmas=sigmas_from_1(steps, shift).tolist())
    return solver


def sigmas_from_1(steps: int, shift: float) -> np.ndarray:
    """The noise level at which each step of DPM++ and Euler starts, (steps,), from 1 falling."""
    return shift_sigma(np.linspace(1, 0, steps + 1)[:-1], shift)
