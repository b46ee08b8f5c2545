"""Bring a graph to the form that dependencies are read from: sizes as constants, weights under their own names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, users
from optkit.inference import infer
from optkit.passes.base import Context
from optkit.passes.cleanup.constants import FoldConstants, LiftConstants
from optkit.passes.cleanup.dead import RemoveDead
from optkit.passes.cleanup.noops import RemoveNoops
from optkit.passes.cleanup.shapes import FoldShapes
from optkit.rewrite import Names, register, substitute


def prepare(model: ir.Model, context: Context) -> None:
    """Fold what computes sizes, but nothing into weights, whose names and axes stay; in place."""
    LiftConstants().run(model, context)
    _sequences_to_splits(model)
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


def _sequences_to_splits(model: ir.Model) -> None:
    """``SplitToSequence`` whose pieces are taken by number, as torch writes ``chunk``, becomes ``Split``."""
    names = Names(model)
    for node in tuple(model.graph):
        if node.op_type != "SplitToSequence" or node.domain != "":
            continue
        x, readers = node.inputs[0], users(node.outputs[0])
        axis = int(attribute(node, "axis", 0))  # type: ignore[call-overload]
        size = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        length = None if x is None or x.shape is None else x.shape[axis]
        places = [constant(r.inputs[1]) if r.op_type == "SequenceAt" else None for r in readers]
        if size is None or not isinstance(length, int) or any(p is None for p in places):
            continue
        if not attribute(node, "keepdims", 1) and size.ndim == 0:
            continue
        whole = int(size) if size.ndim == 0 else 0
        sizes = size if size.ndim else [min(whole, length - s) for s in range(0, length, whole)]
        vector = register(model.graph, names.new(f"{node.name}/sizes"), np.asarray(sizes, np.int64))
        split = ir.node(
            "Split",
            [x, vector],
            attributes={"axis": axis},
            num_outputs=len(sizes),
            name=names.new(f"{node.name}/split"),
        )
        for k, output in enumerate(split.outputs):
            output.name, output.type = (
                names.new(f"{node.name}/piece_{k}"),
                ir.TensorType(ir.DataType.FLOAT if x is None or x.dtype is None else x.dtype),
            )
        node.append(split)
        for reader, place in zip(readers, places, strict=True):
            assert place is not None
            substitute(reader.outputs[0], split.outputs[int(place)])
            model.graph.remove(reader)
        model.graph.remove(node)
    infer(model)
