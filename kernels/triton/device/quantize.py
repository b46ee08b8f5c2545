"""Floats onto a grid of integers, or of floats of 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_grid(value, zero, kind: tl.constexpr):
    """float32 as the nearest number of ``kind``, ties to even, plus ``zero``; what is too large becomes the largest."""
    if kind == tl.int8:
        value = tl.minimum(tl.maximum(value, -128.0 - zero), 127.0 - zero)
        # Where one step of float32 is 1, a sum is rounded to whole numbers.
        value = (value + 12582912.0) - 12582912.0 + zero
    elif kind == tl.float8e4nv:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    return value.to(kind)


@triton.jit
def onto(value, step, zero, kind: tl.constexpr):
    """float32 on the grid of ``kind`` whose step and zero point lie in memory; floats of 8 bits have no zero point."""
    offset = 0.0
    if zero is not None:
        offset = tl.load(zero).to(tl.float32)
    return to_grid(value / tl.load(step), offset, kind)


@triton.jit
def quantize(x, step, zero, y, n, BLOCK: tl.constexpr):
    """``x`` on the grid of ``y``; one block of elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, onto(value, step, zero, y.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(x, step, zero, y, n, BLOCK: tl.constexpr):
    """What ``x`` stands for, in the format of ``y``; one block of elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if zero is not None:
        value -= tl.load(zero).to(tl.float32)
    tl.store(y + at, (value * tl.load(step)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def quantize_blocks(
    x, q, steps, blocks, MOST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """``ROWS`` blocks of ``COLUMNS`` numbers that follow each other a program, each on its own grid up to ``MOST``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < blocks)[:, None] & (column < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value), axis=1) / MOST, 1e-30)
    tl.store(steps + row, step, mask=row < blocks)
    tl.store(q + at, to_grid(value / step[:, None], 0.0, q.dtype.element_ty), mask=inside)
