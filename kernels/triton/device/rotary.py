"""Rotary embedding of heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotary(
    x, cos, sin, y, rows, sequence, heads, DEPTH: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr
):
    """``ROWS`` positions of heads a program: each pair of elements half a head apart is turned, in float32."""
    HALF: tl.constexpr = DEPTH // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    place = row % sequence
    if BATCH:
        place += row // (sequence * heads) * sequence
    half = tl.arange(0, HALF)
    at = row.to(tl.int64)[:, None] * DEPTH + half[None, :]
    turn = place.to(tl.int64)[:, None] * DEPTH + half[None, :]
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    first = low * tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    first -= high * tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    second = high * tl.load(cos + turn + HALF, mask=inside, other=0.0).to(tl.float32)
    second += low * tl.load(sin + turn + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, first.to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + HALF, second.to(y.dtype.element_ty), mask=inside)
