"""A kernel that adds a narrow product to a wide one where that lies, at the speed of its memory.

The library's takes 1.7 times as long (`docs/performance.md`). Imported on a GPU alone, where
PyTorch brings Triton.
"""

import torch
import triton  # pyright: ignore[reportMissingImports] (on a CPU)
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

WIDEST = 64  # ranks beyond are for the library's product
LEAST = 16  # of a product's inner side, for the tensor cores
ROWS, COLUMNS = 64, 128  # of a tile


def add_narrow(y: Tensor, inner: Tensor, wide: Tensor) -> Tensor:
    """y (L, N) + inner (L, rank) wide (rank, N), all in bf16, where y lies, its rows together."""
    assert y.stride(1) == 1, "rows of y lie together"
    (rows, columns), rank = y.shape, inner.shape[1]
    tiles = (triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))
    with torch.cuda.device(y.device):
        _add_narrow[tiles](  # pyright: ignore[reportIndexIssue] (made so by Triton)
            y,
            inner,
            wide,
            rows,
            columns,
            rank,
            y.stride(0),
            *inner.stride(),
            *wide.stride(),
            RANK=max(LEAST, triton.next_power_of_2(rank)),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
        )
    return y


@triton.jit
def _add_narrow(  # noqa: PLR0913, ANN202 (a kernel takes sizes and strides one by one)
    y,  # noqa: ANN001
    inner,  # noqa: ANN001
    wide,  # noqa: ANN001
    rows,  # noqa: ANN001
    columns,  # noqa: ANN001
    rank,  # noqa: ANN001
    y_row,  # noqa: ANN001
    inner_row,  # noqa: ANN001
    inner_rank,  # noqa: ANN001
    wide_rank,  # noqa: ANN001
    wide_column,  # noqa: ANN001
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    r = tl.arange(0, RANK)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    left = tl.load(
        inner + row[:, None] * inner_row + r[None, :] * inner_rank,
        mask=(row < rows)[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    right = tl.load(
        wide + r[:, None] * wide_rank + column[None, :] * wide_column,
        mask=(r < rank)[:, None] & (column < columns)[None, :],
        other=0.0,
    )
    place = y + row[:, None] * y_row + column[None, :]
    before = tl.load(place, mask=there, other=0.0).to(tl.float32)
    after = tl.dot(left, right, before)
    tl.store(place, after.to(tl.bfloat16), mask=there)
