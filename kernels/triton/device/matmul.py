"""Products of rows with a matrix, with bias and activation."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(
    tile,
    rows,
    COLUMNS: tl.constexpr,
    ROWS_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Row and column of a tile: ``GROUP`` rows of tiles are walked together, so that they share columns in L2."""
    down = tl.cdiv(rows, ROWS_TILE)
    across: tl.constexpr = (COLUMNS + COLUMNS_TILE - 1) // COLUMNS_TILE
    group = tile // (GROUP * across)
    high = min(down - group * GROUP, GROUP)
    within = tile % (GROUP * across)
    return group * GROUP + within % high, within // high


@triton.jit
def finish(sums, bias, column, COLUMNS: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr):
    """Bias and activation, in float32."""
    if BIAS:
        sums += tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    if KIND == "relu":
        sums = tl.maximum(sums, 0.0)
    if KIND == "gelu":
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    return sums


@triton.jit
def matmul(
    x,
    w,
    bias,
    y,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
):
    """One tile of ``[M, N]`` a program, through pointers."""
    down, across = place(tl.program_id(0), rows, COLUMNS, M, N, GROUP)
    row = down * M + tl.arange(0, M)
    column = across * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    left = x + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = w + depth.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    for k in range(0, DEPTH, K):
        a = tl.load(left, mask=(row < rows)[:, None] & (depth < DEPTH - k)[None, :], other=0.0)
        b = tl.load(right, mask=(depth < DEPTH - k)[:, None] & (column < COLUMNS)[None, :], other=0.0)
        sums = tl.dot(a, b, sums)
        left += K
        right += K * COLUMNS
    sums = finish(sums, bias, column, COLUMNS, BIAS, KIND)
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def matmul_descriptors(
    x,
    w,
    bias,
    y,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Programs stay and walk over tiles; tensors are moved by the TMA, with descriptors that the program makes itself."""
    left = tl.make_tensor_descriptor(x, shape=[rows, DEPTH], strides=[DEPTH, 1], block_shape=[M, K])
    right = tl.make_tensor_descriptor(w, shape=[DEPTH, COLUMNS], strides=[COLUMNS, 1], block_shape=[K, N])
    out = tl.make_tensor_descriptor(y, shape=[rows, COLUMNS], strides=[COLUMNS, 1], block_shape=[M, N])
    tiles = tl.cdiv(rows, M) * tl.cdiv(COLUMNS, N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        down, across = place(tile, rows, COLUMNS, M, N, GROUP)
        sums = tl.zeros((M, N), tl.float32)
        for k in range(0, DEPTH, K):
            a = left.load([down * M, k])
            b = right.load([k, across * N])
            sums = tl.dot(a, b, sums)
        sums = finish(sums, bias, across * N + tl.arange(0, N), COLUMNS, BIAS, KIND)
        out.store([down * M, across * N], sums.to(y.dtype.element_ty))
