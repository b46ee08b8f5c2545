"""Bring a graph to the form that dependencies are read from: sizes as constants, weights under their own names."""

from __future__ import annotations

import onnx_ir as ir

from optkit.inference import infer
from optkit.passes.base import Context
from optkit.passes.cleanup.constants import FoldConstants, LiftConstants
from optkit.passes.cleanup.dead import RemoveDead
from optkit.passes.cleanup.noops import RemoveNoops
from optkit.passes.cleanup.sequences import SequencesToSplit
from optkit.passes.cleanup.shapes import FoldShapes


def prepare(model: ir.Model, context: Context) -> None:
    """Fold what computes sizes, but nothing into weights, whose names and axes stay; in place."""
    LiftConstants().run(model, context)
    SequencesToSplit().run(model, context)
    inputs = model.graph.inputs
    weights = [
        v for v in model.graph.initializers.values()
        if v.dtype is not None and v.dtype.is_floating_point() and v.shape is not None and len(v.shape) and v not in inputs
    ]  # fmt: skip
    # Who could be given by the caller is no constant, and nothing is folded into it.
    inputs.extend(weights)
    try:
        for step in (
            RemoveNoops(),
            FoldConstants(),
            FoldShapes(),
            FoldConstants(),
            RemoveNoops(),
            RemoveDead(),
        ):
            step.run(model, context)
    finally:
        gone = set(weights)
        inputs[:] = [v for v in inputs if v not in gone]
    infer(model)
