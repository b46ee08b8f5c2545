"""Rotary embedding of heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def both(x, row, inside, DEPTH: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """What is turned against each other in rows of ``DEPTH`` numbers: neighbours, or the halves; in float32."""
    HALF: tl.constexpr = DEPTH // 2
    if PAIRS:
        at = row.to(tl.int64)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
        first, second = tl.split(tl.reshape(tl.load(x + at, mask=inside, other=0.0), (ROWS, HALF, 2)))
    else:
        at = row.to(tl.int64)[:, None] * DEPTH + tl.arange(0, HALF)[None, :]
        first = tl.load(x + at, mask=inside, other=0.0)
        second = tl.load(x + at + HALF, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def rotary(
    x,
    cos,
    sin,
    y,
    rows,
    sequence,
    heads,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    INNER: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """``ROWS`` positions of heads a program: each pair of elements is turned, in float32.

    ``BATCH``: whether samples have angles of their own. ``INNER``: whether the heads of a position follow each other. ``PAIRS``:
    whether neighbours are a pair, else elements half a head apart.
    """
    HALF: tl.constexpr = DEPTH // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    if INNER:
        place = row // heads
        if not BATCH:
            place = place % sequence
    else:
        place = row % sequence
        if BATCH:
            place += row // (sequence * heads) * sequence
    low, high = both(x, row, inside, DEPTH, ROWS, PAIRS)
    low_cos, high_cos = both(cos, place, inside, DEPTH, ROWS, PAIRS)
    low_sin, high_sin = both(sin, place, inside, DEPTH, ROWS, PAIRS)
    first = (low * low_cos - high * low_sin).to(y.dtype.element_ty)
    second = (high * high_cos + low * high_sin).to(y.dtype.element_ty)
    start = row.to(tl.int64)[:, None] * DEPTH
    if PAIRS:
        turned = tl.reshape(tl.join(first, second), (ROWS, DEPTH))
        tl.store(y + start + tl.arange(0, DEPTH)[None, :], turned, mask=inside)
    else:
        half = tl.arange(0, HALF)[None, :]
        tl.store(y + start + half, first, mask=inside)
        tl.store(y + start + half + HALF, second, mask=inside)
