"""An activated gate times a value, element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from optkit.kernels.triton.device.quantize import onto


@triton.jit
def gated(
    gate,
    up,
    step,
    zero,
    y,
    n,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    GRID: tl.constexpr,
):
    """``activation(gate) * up`` in float32; one block of elements a program.

    ``PAIRED``: whether there is something to be multiplied with. ``GRID``: whether the result is put onto the grid of ``y``, after
    it was rounded to the format of ``gate``.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    a = g / (1.0 + tl.exp(-g)) if KIND == "silu" else 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if PAIRED:
        a *= tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    rounded = a.to(gate.dtype.element_ty)
    if GRID:
        tl.store(y + at, onto(rounded.to(tl.float32), step, zero, y.dtype.element_ty), mask=inside)
    else:
        tl.store(y + at, rounded, mask=inside)
