"""Where TensorRT wants Q/DQ pairs."""

from __future__ import annotations

from optkit.placement import Placement, Row, rows

_WHY = (
    "TensorRT developer guide, explicit quantization: zero points are 0, weights per output channel, activations per tensor, "
    "biases stay float; what TensorRT-RTX 1.7.1 really fuses was read from its plans"
)

# Pairs in front of products alone. What follows a product (bias, activation, residual sum, norm) is float: it is fused behind
# the integer product, or into the quantization in front of the next one.
DEFAULT = Placement(
    name="default",
    activation="s8",
    weight="s8",
    bias=False,
    rows=rows(
        Row(op="Conv", output=False), Row(op="Gemm", output=False), Row(op="MatMul", output=False, max_rank=2)
    ),
    source=_WHY,
)

# Linear layers alone: convolutional nets whose first layers suffer from int8 keep them in half precision.
LINEAR = Placement(
    name="linear",
    activation="s8",
    weight="s8",
    bias=False,
    rows=rows(Row(op="Gemm", output=False), Row(op="MatMul", output=False, max_rank=2)),
    source=_WHY,
)

# The same in floats of 8 bits.
FP8 = Placement(
    name="fp8", activation="e4m3", weight="e4m3", bias=False, rows=DEFAULT.rows,
    source=_WHY + "; fp8 Q/DQ has no zero point other than 0",
)  # fmt: skip

PLACEMENTS = {p.name: p for p in (DEFAULT, LINEAR, FP8)}
