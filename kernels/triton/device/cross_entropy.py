"""Cross-entropy of rows of scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy(x, labels, y, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program, ``BLOCK`` columns at a time, in float32: the shares are corrected as larger scores come."""
    row = tl.program_id(0)
    start = x + row.to(tl.int64) * COLUMNS
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, COLUMNS, BLOCK):
        value = tl.load(start + k + column, mask=column < COLUMNS - k, other=float("-inf")).to(tl.float32)
        now = tl.maximum(highest, value)
        # Where all so far is minus infinity, any finite number is as good.
        safe = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(highest - safe) + tl.exp(value - safe)
        highest = now
    most = tl.max(highest, axis=0)
    whole = tl.sum(total * tl.exp(highest - most), axis=0)
    asked = tl.load(start + tl.load(labels + row)).to(tl.float32)
    tl.store(y + row, (most + tl.log(whole) - asked).to(y.dtype.element_ty))
