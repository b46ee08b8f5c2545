"""An activated gate times a value, element by element."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, y, n, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """``activation(gate) * up`` in float32; one block of elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    a = g / (1.0 + tl.exp(-g)) if KIND == "silu" else 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    tl.store(y + at, (a * u).to(y.dtype.element_ty), mask=inside)
