"""Where our kernels want Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Mapping

from optkit.placement import Placement, Row, rows

# In front of products with constant matrices: the kernel takes integers in and gives floats out.
DEFAULT = Placement(
    name="default",
    activation="s8-asym",
    weight="s8",
    bias=False,
    rows=rows(Row(op="MatMul", output=False, max_rank=2)),
    source="optkit.LinearInt8: weights per output channel around 0; activations per tensor, whose zero point costs nothing",
)

# The same in floats of 8 bits, from sm_89 on.
FP8 = Placement(
    name="fp8",
    activation="e4m3",
    weight="e4m3",
    bias=False,
    rows=DEFAULT.rows,
    source="optkit.LinearFp8: weights per output channel, activations per tensor",
)

PLACEMENTS: Mapping[str, Placement] = {p.name: p for p in (DEFAULT, FP8)}
