"""Convolution of each channel with its own window."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def depthwise(
    x,
    w,
    bias,
    y,
    n,
    channels,
    height,
    width,
    down,
    across,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    """``BLOCK`` of the ``n`` outputs a program, over all samples and channels, ``down`` times ``across`` of each; in float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    plane = at // (down * across)
    channel = plane % channels
    rest = at % (down * across)
    row = rest // across * STRIDE_Y - TOP
    column = rest % across * STRIDE_X - LEFT
    corner = x + plane.to(tl.int64) * height * width
    sums = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(KERNEL_Y):
        for j in tl.static_range(KERNEL_X):
            there = inside & (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
            value = tl.load(corner + (row + i) * width + column + j, mask=there, other=0.0).to(tl.float32)
            factor = tl.load(w + channel * (KERNEL_Y * KERNEL_X) + i * KERNEL_X + j, mask=inside, other=0.0)
            sums += value * factor.to(tl.float32)
    if KIND == "relu":
        sums = tl.maximum(sums, 0.0)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside)
