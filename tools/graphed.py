"""A training step replayed as a CUDA graph: launches, not arithmetic, bound small models."""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

WARMUP_STEPS = 3  # cuDNN and the optimizer must have chosen and allocated before the capture


class Trainable:
    """What one optimizer moves: parameters, their running average, a rate that a graph can read."""

    def __init__(self, modules: list[nn.Module], learning_rate: float, average: float) -> None:
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.base_rate = learning_rate
        self.rate = torch.tensor(learning_rate, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, weight_decay=1e-3, betas=(0.9, 0.99), capturable=on_gpu
        )
        self.average_decay = average
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        """Clip, step and average; for use after `backward`."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, 1 - self.average_decay)

    def set_progress(self, done: float) -> None:
        """Learning rate at `done` in 0..1 of the stage: short warm-up, then half a cosine."""
        warm = min(1.0, done / 0.02 + 0.01)
        self.rate.fill_(
            self.base_rate * warm * (0.5 + 0.5 * float(torch.cos(torch.tensor(done * 3.14159))))
        )

    def use_average(self) -> None:
        """Replace the parameters by their running average: the end of a stage."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)


def graphed_step(
    loss_of: Callable[..., Tensor], inputs: list[Tensor], trainable: Trainable
) -> Callable[..., Tensor]:
    """A function that copies new inputs over `inputs`, makes one training step, returns the loss.

    On the CPU it is the plain step. On a GPU the step is captured once and replayed.
    """
    static = [tensor.clone() for tensor in inputs]

    def step() -> Tensor:
        trainable.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            static[0].device.type, torch.bfloat16, enabled=static[0].is_cuda, cache_enabled=False
        ):
            loss = loss_of(*static)
        loss.backward()
        trainable.update()
        return loss.detach()

    replay = _captured(step, trainable) if static[0].is_cuda else step

    def run(*new: Tensor) -> Tensor:
        for target, source in zip(static, new, strict=True):
            target.copy_(source)
        return replay()

    return run


def _captured(step: Callable[[], Tensor], trainable: Trainable) -> Callable[[], Tensor]:
    """The step as one CUDA graph; its loss is overwritten by the next replay."""
    started = time.monotonic()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    trainable.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    log.warning("  captured after %.1f s", time.monotonic() - started)

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay
