"""Softmax of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax(x, y, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """``ROWS`` rows of ``COLUMNS`` a program, from registers, in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    value = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, axis=1)[:, None])
    value = value / tl.sum(value, axis=1)[:, None]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
