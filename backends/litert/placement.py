"""Where LiteRT wants Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Mapping

from optkit.placement import Placement, Row, rows

# What integer kernels apply before they store. Others need float, and a pair behind them.
_ABSORBED = frozenset({"Relu", "Clip"})
_WHY = (
    "LiteRT, '8-bit quantization specification': int8 activations per tensor with zero point, int8 weights per output channel without, "
    "biases in 32 bits on the grid of the products; an integer kernel stores integers"
)

# Integers from layer to layer; what only copies integers keeps their grid.
DEFAULT = Placement(
    name="default",
    activation="u8",
    weight="s8",
    rows=rows(
        Row(op="Conv", absorbs=_ABSORBED),
        Row(op="Gemm", absorbs=_ABSORBED),
        Row(op="MatMul", max_rank=2),
        Row(op="Add", role="between", absorbs=_ABSORBED),
        Row(op="GlobalAveragePool", role="between"),
        *(
            Row(op=op, role="between", unify=True)
            for op in (
                "MaxPool",
                "AveragePool",
                "Concat",
                "Reshape",
                "Flatten",
                "Squeeze",
                "Unsqueeze",
                "Transpose",
            )
        ),
    ),
    source=_WHY,
)

PLACEMENTS: Mapping[str, Placement] = {p.name: p for p in (DEFAULT,)}
