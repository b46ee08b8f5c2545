"""Products of groups of rows, each with a matrix of its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped(
    x,
    w,
    order,
    ends,
    y,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    KEPT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One tile of ``[M, N]`` a program, of one group: tiles are counted out to the groups by how many rows each has.

    ``ends``: where the rows of each of ``EXPERTS`` groups end. ``KEPT``: the power of 2 above. ``order``: rows of ``x``.
    """
    across: tl.constexpr = (COLUMNS + N - 1) // N
    tile = tl.program_id(0) // across
    expert = tl.arange(0, KEPT)
    end = tl.load(ends + expert, mask=expert < EXPERTS, other=0)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < EXPERTS), other=0)
    tiles = tl.where(expert < EXPERTS, (end - begin + M - 1) // M, 0)
    behind = tl.cumsum(tiles, axis=0)
    mine = tl.sum((behind <= tile).to(tl.int32), axis=0)
    # There are programs for as many tiles as there can be.
    if mine < EXPERTS:
        chosen = expert == mine
        first = tl.sum(tl.where(chosen, begin + (tile - behind + tiles) * M, 0), axis=0)
        last = tl.sum(tl.where(chosen, end, 0), axis=0)
        row = first + tl.arange(0, M)
        column = (tl.program_id(0) % across) * N + tl.arange(0, N)
        depth = tl.arange(0, K)
        source = tl.load(order + row, mask=row < last, other=0).to(tl.int64)
        left = x + source[:, None] * DEPTH + depth[None, :]
        right = w + mine.to(tl.int64) * DEPTH * COLUMNS + depth[:, None] * COLUMNS + column[None, :]
        sums = tl.zeros((M, N), tl.float32)
        for k in range(0, DEPTH, K):
            a = tl.load(left, mask=(row < last)[:, None] & (depth < DEPTH - k)[None, :], other=0.0)
            b = tl.load(right, mask=(depth < DEPTH - k)[:, None] & (column < COLUMNS)[None, :], other=0.0)
            sums = tl.dot(a, b, sums)
            left += K
            right += K * COLUMNS
        at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(
            y + at, sums.to(y.dtype.element_ty), mask=(row < last)[:, None] & (column < COLUMNS)[None, :]
        )
