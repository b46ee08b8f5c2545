"""Products of numbers of 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from optkit.kernels.triton.device.matmul import place


@triton.jit
def linear(
    x,
    w,
    scale,
    shift,
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
    """One tile of ``[M, N]`` a program: rows times rows of ``w``, summed in 32 bits, integers moved by ``shift``, scaled once.

    Matrix units add floats of 8 bits with fewer than 24 bits: after ``K`` of them the sum is added in float32.
    """
    down, across = place(tl.program_id(0), rows, COLUMNS, M, N, GROUP)
    row = down * M + tl.arange(0, M)
    column = across * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    INTEGERS: tl.constexpr = x.dtype.element_ty == tl.int8
    sums = tl.zeros((M, N), tl.int32 if INTEGERS else tl.float32)
    left = x + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = w + column.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    for k in range(0, DEPTH, K):
        a = tl.load(left, mask=(row < rows)[:, None] & (depth < DEPTH - k)[None, :], other=0.0)
        b = tl.load(right, mask=(column < COLUMNS)[:, None] & (depth < DEPTH - k)[None, :], other=0.0)
        if INTEGERS:
            sums = tl.dot(a, tl.trans(b), sums)
        else:
            sums += tl.dot(a, tl.trans(b))
        left += K
        right += K
    inside = column < COLUMNS
    if INTEGERS:
        sums += tl.load(shift + column, mask=inside, other=0)[None, :]
    factor = tl.load(scale + column, mask=inside, other=0.0)
    added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    found = sums.to(tl.float32) * factor[None, :] + added[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def linear_blocks(
    x,
    w,
    x_scale,
    w_scale,
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
    """As ``linear``, with a scale for each ``K`` numbers of a row and of a row of ``w``; the sum of such a block is scaled.

    ``x_scale``: ``[rows, DEPTH / K]``. ``w_scale``: ``[DEPTH / K, COLUMNS]``.
    """
    BLOCKS: tl.constexpr = DEPTH // K
    down, across = place(tl.program_id(0), rows, COLUMNS, M, N, GROUP)
    row = down * M + tl.arange(0, M)
    column = across * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    left = x + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = w + column.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    by_row = x_scale + row.to(tl.int64) * BLOCKS
    by_column = w_scale + column
    inside = column < COLUMNS
    for _ in range(0, BLOCKS):
        a = tl.load(left, mask=(row < rows)[:, None], other=0.0)
        b = tl.load(right, mask=inside[:, None], other=0.0)
        part = tl.dot(a, tl.trans(b)) * tl.load(by_row, mask=row < rows, other=0.0)[:, None]
        sums += part * tl.load(by_column, mask=inside, other=0.0)[None, :]
        left += K
        right += K
        by_row += 1
        by_column += COLUMNS
    sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])
