"""Normalization of rows, with the residual that is added before it."""

from __future__ import annotations

import triton
import triton.language as tl

from optkit.kernels.triton.device.quantize import onto


@triton.jit
def norm(
    x,
    residual,
    scale,
    bias,
    y,
    total,
    step,
    zero,
    q,
    rows,
    EPSILON: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    NORMAL: tl.constexpr,
    TOTAL: tl.constexpr,
    GRID: tl.constexpr,
):
    """Normalize ``ROWS`` rows of ``COLUMNS``; mean and variance in float32, in two passes over registers.

    ``NORMAL``, ``TOTAL``, ``GRID``: whether the result, the sum, and the result on the grid of ``q`` are stored.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = column < COLUMNS
    inside = (row < rows)[:, None] & there[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        # The sum that leaves is rounded, and so is what is normalized: both readers see the same numbers.
        rounded = value.to(x.dtype.element_ty)
        if TOTAL:
            tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(value, axis=1) / COLUMNS
        value = tl.where(there[None, :], value - mean[:, None], 0.0)
    variance = tl.sum(value * value, axis=1) / COLUMNS
    value = value * tl.rsqrt(variance + EPSILON)[:, None]
    factor = tl.load(scale + column, mask=there, other=0.0).to(tl.float32)
    value = value * factor[None, :]
    if BIAS:
        value += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    rounded = value.to(x.dtype.element_ty)
    if NORMAL:
        tl.store(y + at, rounded, mask=inside)
    if GRID:
        tl.store(q + at, onto(rounded.to(tl.float32), step, zero, q.dtype.element_ty), mask=inside)
