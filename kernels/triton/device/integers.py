"""Products of integers."""

from __future__ import annotations

import triton
import triton.language as tl

from optkit.kernels.triton.device.matmul import place


@triton.jit
def linear(
    x,
    w,
    scale,
    bias,
    y,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of ``[M, N]`` a program: int8 rows times int8 rows of ``w``, summed in 32 bits, scaled once."""
    down, across = place(tl.program_id(0), rows, COLUMNS, M, N, GROUP)
    row = down * M + tl.arange(0, M)
    column = across * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    sums = tl.zeros((M, N), tl.int32)
    left = x + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = w + column.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    for k in range(0, DEPTH, K):
        a = tl.load(left, mask=(row < rows)[:, None] & (depth < DEPTH - k)[None, :], other=0)
        b = tl.load(right, mask=(column < COLUMNS)[:, None] & (depth < DEPTH - k)[None, :], other=0)
        sums = tl.dot(a, tl.trans(b), sums)
        left += K
        right += K
    inside = column < COLUMNS
    factor = tl.load(scale + column, mask=inside, other=0.0)
    added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    found = sums.to(tl.float32) * factor[None, :] + added[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])
