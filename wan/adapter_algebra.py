"""Sums, smaller ranks, norms and angles of adapters, from their factors; and factors of a change.

What an adapter adds, scale * B @ A, is an (out, in) matrix of low rank. It is never formed here:
a sum is its factors side by side, norms and angles come from (rank, rank) products, and the best
adapter of a smaller rank from the QR of both factors (Eckart and Young). Only what is no adapter
yet, the difference of two models, comes as a whole matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.adapter_values import Factors
from wan.headers import ModelError

EXACT_BELOW = 1024  # rows or columns: up to here a whole SVD takes less than a second
FIRST_WIDTH = 64  # singular values looked for at first, where an energy is asked for
SPARE_WIDTH = 8  # more directions than wanted: the last ones of an iteration are the least exact
MOST_ROUNDS = 12  # of the iteration: it ends before, as soon as it gains nothing
LEAST_GAIN = 1e-6  # of a change's energy
PIECE = 1 << 22  # values of a tensor that are in fp64 at a time


@dataclass(frozen=True)
class Kept:
    """How much of a change an adapter keeps; with both, the smaller rank of the two."""

    rank: int | None = None  # at most
    energy: float | None = None  # at least this share of the square of the Frobenius norm

    def __post_init__(self) -> None:
        """`ModelError` for what no adapter can keep."""
        if self.rank is not None and self.rank < 1:
            raise ModelError(f"--rank is {self.rank}; expected a whole number from 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ModelError(f"--energy is {self.energy:g}; expected a share above 0, up to 1")

    @property
    def is_all(self) -> bool:
        """Whether nothing is to be left out."""
        return self.rank is None and self.energy is None


def weighted_sum(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The sum of strength * scale * B @ A as one adapter of scale 1, in fp32.

    Its rank is the sum of theirs; strengths may be negative.
    """
    a = torch.cat([factors.a.float() for factors, _ in parts])
    b = [factors.b.float() * (factors.scale * strength) for factors, strength in parts]
    return Factors(a, torch.cat(b, dim=1), 1.0)


def rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    """The same with scale 1 and values that `dtype` holds, still in fp32."""
    b = factors.b.float() * factors.scale
    return Factors(factors.a.to(dtype).float(), b.to(dtype).float(), 1.0)


def inner_product(x: Factors, y: Factors) -> float:
    """<X, Y> = trace(X^T Y) of what two adapters add to one linear; <X, X> is the squared norm.

    trace((B A)^T B' A') = sum(B^T B' * A A'^T), two (rank, rank') products, in fp64.
    """
    products = (x.b.double().T @ y.b.double()) * (x.a.double() @ y.a.double().T)
    return x.scale * y.scale * float(products.sum())


def squared_distance(x: Factors, y: Factors) -> float:
    """||X - Y||^2; 0 up to 1e-15 of ||X||^2."""
    distance = inner_product(x, x) - 2 * inner_product(x, y) + inner_product(y, y)
    return max(distance, 0.0)  # rounding may take it below


def squared_norm(tensor: Tensor) -> float:
    """||T||^2 in fp64, without a copy of the whole tensor in it."""
    pieces = tensor.reshape(-1).split(PIECE)
    return sum(float(piece.double().square().sum()) for piece in pieces)


def resized(factors: Factors, kept: Kept) -> Factors:
    """The nearest adapter of the rank that `kept` asks for; itself if that is no smaller.

    B A = Q_B (R_B R_A^T) Q_A^T, and the SVD of the small matrix between is that of B A.
    """
    if kept.energy is None and (kept.rank is None or kept.rank >= factors.rank):
        return factors
    q_b, r_b = torch.linalg.qr(factors.b.double() * factors.scale)  # (out, rank), (rank, rank)
    q_a, r_a = torch.linalg.qr(factors.a.double().T)  # (in, rank), (rank, rank)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = _rank(values, kept, float(values.square().sum()))
    return _balanced(q_b @ u[:, :rank], values[:rank], vh[:rank] @ q_a.T)


def low_rank(change: Tensor, kept: Kept) -> Factors:
    """The adapter of the rank that `kept` asks for that is nearest to a change (out, in).

    Exact for small matrices; for large ones within 1e-5 of the energy of the best, the same in
    each run.
    """
    total = squared_norm(change)
    limit = min(change.shape)
    most = min(kept.rank or limit, limit)
    width = most if kept.energy is None else min(FIRST_WIDTH, most)
    while True:
        u, values, vh = _leading(change, width)
        if len(values) == limit:  # it was cheaper to find them all
            width = most
        found = float(values[:width].square().sum())
        if kept.energy is None or width == most or found >= kept.energy * total:
            break
        width = min(2 * width, most)
    rank = _rank(values[:width], kept, total)
    return _balanced(u[:, :rank], values[:rank], vh[:rank])


def _rank(values: Tensor, kept: Kept, total: float) -> int:
    """How many of the singular values, the largest first, are kept; at least one."""
    rank = len(values) if kept.rank is None else min(kept.rank, len(values))
    if kept.energy is None:
        return rank
    energies = values.square().cumsum(0)
    # As much as there is: rounding, or values nobody looked for, may leave the sum below `total`.
    wanted = min(kept.energy * total, float(energies[-1]))
    return max(1, min(rank, int((energies < wanted).sum()) + 1))


def _balanced(u: Tensor, values: Tensor, vh: Tensor) -> Factors:
    """A and B of equal size, so that neither leaves the range of a small dtype."""
    root = values.sqrt()
    return Factors((root[:, None] * vh).float(), (u * root).float(), 1.0)


def _leading(change: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and V^T of the largest `width` (or a few more) directions, in fp64.

    Subspace iteration from fixed random directions: two products with the matrix a round, where
    the SVD of one linear of A14B would take minutes.
    """
    limit = min(change.shape)
    if limit <= EXACT_BELOW or 2 * width >= limit:
        return torch.linalg.svd(change.double(), full_matrices=False)
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(change.shape[1], width + SPARE_WIDTH, generator=start).to(change)
    before = 0.0
    for _ in range(MOST_ROUNDS):
        basis = torch.linalg.qr(change @ basis).Q  # (out, width + SPARE_WIDTH)
        seen = change.T @ basis  # (in, width + SPARE_WIDTH)
        energy = squared_norm(seen)
        if math.isclose(energy, before, rel_tol=LEAST_GAIN):
            break
        basis, before = seen, energy
    else:
        basis = torch.linalg.qr(change @ basis).Q
        seen = change.T @ basis
    u, values, vh = torch.linalg.svd(seen.T.double(), full_matrices=False)
    return basis.double() @ u, values, vh
