"""What a sample is made with: plans, recipes and workflows name it without loading a model.

Source: `spec/wan22.md` sections 6.1 and 6.2.
"""

from dataclasses import dataclass, replace
from typing import Literal

from wan.variants import Guidance

SolverName = Literal["unipc", "dpm++", "euler"]
Cfg = Literal["batched", "sequential"]


@dataclass(frozen=True)
class SampleSettings:
    """What a sample is made with, besides its prompt and its seed; the size is in pixels.

    `cfg` "batched" is one call of the model with both prompts, "sequential" two calls with half
    the memory.
    """

    steps: int
    shift: float
    guidance: Guidance
    frames: int
    height: int
    width: int
    solver: SolverName = "unipc"
    cfg: Cfg = "batched"


def distilled(settings: SampleSettings) -> SampleSettings:
    """The settings as 4-step distilled adapters (Lightning) need them, at the same size.

    Noise levels 1, 0.9375, 0.8333 and 0.625 by Euler, guidance 1: four calls of the model in all.
    Those for a first and a last frame want a shift of 16 instead of 5.
    """
    guidance = Guidance(low=1.0, high=1.0)
    return replace(settings, solver="euler", steps=4, shift=5.0, guidance=guidance)
