"""Products with weights in 4 bits, which become floats on their way to the matrix unit."""

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
    zero,
    y,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of ``[M, N]`` a program, a block of weights that share a scale at a time; the sum of a block is scaled.

    A byte of ``w`` holds two neighbouring columns, each 8 more than its value, the first in the low half; with ``zero`` each is as
    much more as that says for its block.
    """
    down, across = place(tl.program_id(0), rows, COLUMNS, M, N, GROUP)
    row = down * M + tl.arange(0, M)
    column = across * N + tl.arange(0, N)
    pair = across * (N // 2) + tl.arange(0, N // 2)
    depth = tl.arange(0, BLOCK)
    sums = tl.zeros((M, N), tl.float32)
    left = x + row.to(tl.int64)[:, None] * DEPTH + depth[None, :]
    right = w + depth.to(tl.int64)[:, None] * (COLUMNS // 2) + pair[None, :]
    inside = column < COLUMNS
    for k in range(0, DEPTH, BLOCK):
        a = tl.load(left, mask=(row < rows)[:, None], other=0.0)
        both = tl.load(right, mask=(pair < COLUMNS // 2)[None, :], other=0)
        if zero is None:
            low = ((both & 15) - 8).to(tl.float32).to(a.dtype)
            high = (((both >> 4) & 15) - 8).to(tl.float32).to(a.dtype)
            q = tl.interleave(low, high)
        else:
            middle = tl.load(zero + (k // BLOCK) * COLUMNS + column, mask=inside, other=0)
            q = tl.interleave(both & 15, (both >> 4) & 15) - middle[None, :]
            q = q.to(tl.float32).to(a.dtype)
        factor = tl.load(scale + (k // BLOCK) * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        sums += tl.dot(a, q) * factor[None, :]
        left += BLOCK
        right += BLOCK * (COLUMNS // 2)
    sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def decode(
    x,
    w,
    scale,
    bias,
    zero,
    y,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``N`` columns of all rows, ``M`` at most, a program; a byte of ``w`` holds two neighbours along the depth.

    ``zero`` as of ``linear``.
    """
    row = tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    pair = tl.arange(0, K // 2)
    block = tl.arange(0, K // BLOCK)
    inside = column < COLUMNS
    left = x + row[:, None] * DEPTH + depth[None, :]
    right = w + column.to(tl.int64)[:, None] * (DEPTH // 2) + pair[None, :]
    factors = scale + column[:, None] * (DEPTH // BLOCK) + block[None, :]
    sums = tl.zeros((M, N), tl.float32)
    for k in range(0, DEPTH, K):
        a = tl.load(left, mask=(row < rows)[:, None] & (depth < DEPTH - k)[None, :], other=0.0)
        both = tl.load(right, mask=inside[:, None] & (pair < (DEPTH - k) // 2)[None, :], other=0)
        some = inside[:, None] & (block < (DEPTH - k) // BLOCK)[None, :]
        factor = tl.load(factors, mask=some, other=0.0).to(tl.float32)
        if zero is None:
            q = tl.interleave((both & 15) - 8, ((both >> 4) & 15) - 8).to(tl.float32)
            blocks = tl.reshape(q, (N, K // BLOCK, BLOCK))
        else:
            middle = tl.load(
                zero + column[:, None] * (DEPTH // BLOCK) + k // BLOCK + block[None, :], mask=some, other=0
            )
            q = tl.reshape(tl.interleave(both & 15, (both >> 4) & 15), (N, K // BLOCK, BLOCK))
            blocks = (q - middle[:, :, None]).to(tl.float32)
        weights = blocks * factor[:, :, None]
        sums = tl.dot(a, tl.trans(tl.reshape(weights, (N, K)).to(a.dtype)), sums)
        left += K
        right += K // 2
        factors += K // BLOCK
    sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * COLUMNS + column[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])
