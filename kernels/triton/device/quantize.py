"""Floats onto a grid of integers, or of floats of 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_grid(value, kind: tl.constexpr):
    """float32 as the nearest number of ``kind``, ties to even; what is too large becomes the largest."""
    if kind == tl.int8:
        value = tl.minimum(tl.maximum(value, -128.0), 127.0)
        # Where one step of float32 is 1, a sum is rounded to whole numbers.
        value = (value + 12582912.0) - 12582912.0
    elif kind == tl.float8e4nv:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    return value.to(kind)


@triton.jit
def quantize(x, y, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """``x / SCALE`` on the grid of ``y``; one block of elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) / SCALE
    tl.store(y + at, to_grid(value, y.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(x, y, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """``x * SCALE`` in the format of ``y``; one block of elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * SCALE
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
