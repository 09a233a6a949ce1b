"""Many adapters of one frozen transformer, trained and used side by side in one batch.

A small model leaves a GPU idle: a step of one run is bound by launches. Here the samples of all
runs are one batch, run by run (run 0's samples first), the base sees them as such, and each run's
LoRA its own. No run sees another: the sum of their losses has the gradient of each. A lower rank is
padded with zeros in A and B, whose gradients are zero too, so it stays that rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from wan.adapter_choices import split_module
from wan.flow import mix_seed

BETAS, WEIGHT_DECAY, EPSILON = (0.9, 0.99), 0.01, 1e-8  # of conf/optim/adamw.yaml
MAX_GRAD_NORM = 1.0


class StackedLinear(nn.Module):
    """A frozen linear with a LoRA of scale 1 (alpha = rank) for each run."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        empty = base.weight.new_zeros(0)
        self.a, self.b = empty, empty  # (S, rank, in), (S, out, rank): see `set_adapters`

    def forward(self, x: Tensor) -> Tensor:
        """(S * n, ..., in) to (S * n, ..., out)."""
        out = self.base(x)
        if not len(self.a):
            return out
        rows = x.reshape(len(self.a), -1, x.shape[-1])  # (S, n * L, in)
        narrow = torch.bmm(rows, self.a.mT)
        flat = out.reshape(len(self.a), -1, out.shape[-1])
        return torch.baddbmm(flat, narrow, self.b.mT).view(out.shape)


@dataclass(frozen=True)
class Adapters:
    """One LoRA for each of S runs: A (S, rank, in) and B (S, out, rank) of each linear by name."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.a.values(), *self.b.values()]

    def rows(self, chosen: Sequence[int | None]) -> "Adapters":
        """The adapters of some runs, in this order; None = one that changes nothing."""
        device = next(iter(self.a.values())).device
        index = torch.tensor([row or 0 for row in chosen], device=device)
        used = torch.tensor([row is not None for row in chosen], device=device).view(-1, 1, 1)
        return Adapters(
            {name: tensor[index] for name, tensor in self.a.items()},
            {name: tensor[index] * used for name, tensor in self.b.items()},
        )


def make_stackable(transformer: WanTransformer3DModel) -> dict[str, StackedLinear]:
    """Let every linear of the blocks take stacked adapters; by full name, in model order."""
    transformer.requires_grad_(False)
    linears = {n: m for n, m in transformer.named_modules() if split_module(n) is not None}
    stacked: dict[str, StackedLinear] = {}
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        stacked[name] = StackedLinear(linear)
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, stacked[name])
    return stacked


def set_adapters(linears: dict[str, StackedLinear], adapters: Adapters | None) -> None:
    """Let the linears compute with these; None = the base."""
    for name, linear in linears.items():
        empty = linear.base.weight.new_zeros(0)
        linear.a, linear.b = (adapters.a[name], adapters.b[name]) if adapters else (empty, empty)


def fresh_adapters(
    linears: dict[str, StackedLinear], ranks: Sequence[int], seeds: Sequence[int]
) -> Adapters:
    """What `wan.lora.attach` starts from with these ranks and seeds: B is zero."""
    widest, a, b = max(ranks), {}, {}
    for name, linear in linears.items():
        weight = linear.base.weight
        first = torch.zeros(len(ranks), widest, linear.base.in_features)
        for row, (rank, seed) in enumerate(zip(ranks, seeds, strict=True)):
            generator = torch.Generator().manual_seed(mix_seed(seed, name))
            drawn = torch.empty(rank, linear.base.in_features)
            first[row, :rank] = nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        a[name] = first.to(weight.device).requires_grad_()
        b[name] = weight.new_zeros(len(ranks), linear.base.out_features, widest).requires_grad_()
    return Adapters(a, b)


@dataclass
class StackedAdamW:
    """AdamW on stacked parameters (S, ...), with a clip and a learning rate for each run."""

    parameters: list[Tensor]
    steps_done: int = 0
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """One step with the learning rates (S,), from the gradients, which it takes away."""
        self.steps_done += 1
        clip = (MAX_GRAD_NORM / (grad_norms(self.parameters) + 1e-6)).clamp(max=1)  # (S,)
        clip, rates = clip.view(-1, 1, 1), rates.view(-1, 1, 1)
        first, second = (1 - beta**self.steps_done for beta in BETAS)
        for parameter, (mean, square) in zip(self.parameters, self.moments, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad * clip
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square_(), 1 - BETAS[1])
            update = (mean / first) / ((square / second).sqrt_() + EPSILON)
            parameter.sub_(rates * (update + WEIGHT_DECAY * parameter))
            parameter.grad = None


def grad_norms(parameters: Sequence[Tensor]) -> Tensor:
    """Norm (S,) of each run's gradient."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
