"""Normalizations and softmax."""

from __future__ import annotations

from optkit.ops.spec import OpSpec

ROWS = tuple(
    OpSpec(name=name, family="norm")
    for name in (
        "BatchNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization",
        "LpNormalization", "MeanVarianceNormalization", "LRN", "Softmax", "LogSoftmax", "Hardmax",
    )
)  # fmt: skip
