"""Reductions, selections and cumulative operators."""

from __future__ import annotations

from optkit.ops.spec import OpSpec

ROWS = tuple(
    OpSpec(name=name, family="reduce", same_grid=name in ("ReduceMax", "ReduceMin"))
    for name in (
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
        "ReduceLogSumExp", "ArgMax", "ArgMin", "TopK", "CumSum", "NonMaxSuppression",
    )
)  # fmt: skip
