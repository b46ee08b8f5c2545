"""Floats onto a grid of integers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize(x, y, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """``clamp(round(x / SCALE))`` to -128 to 127, ties to even; one block of elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) / SCALE
    value = tl.minimum(tl.maximum(value, -128.0), 127.0)
    # Where one step of float32 is 1, a sum is rounded to whole numbers.
    value = (value + 12582912.0) - 12582912.0
    tl.store(y + at, value.to(tl.int8), mask=inside)
