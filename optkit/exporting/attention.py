"""A query that may look at nothing gets zeros, as torch gives it.

The exporter writes attention with a mask of truth values as a softmax over the lowest number and takes NaN for a sign that all
of a row was masked; but a softmax over such a row makes equal shares. Here the mask itself is asked.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import scalar, users

# What the exporter takes for minus infinity.
_LOWEST = float(np.finfo(np.float32).min)


def zero_masked_rows(model: ir.Model) -> None:
    """Replace the test for NaN behind every softmax over a masked row by a choice behind the product with the values."""
    seen: dict[ir.Value, ir.Value] = {}
    for node in tuple(model.graph):
        if node.op_type == "IsNaN" and (found := _guarded(node)) is not None:
            mask, weights, guard, product = found
            _replace(guard.outputs[0], weights)
            model.graph.remove(guard, safe=True)
            if not users(node.outputs[0]):
                model.graph.remove(node, safe=True)
            if mask not in seen:
                seen[mask] = _any(mask, product)
            y = product.outputs[0]
            zero = _node("Constant", [], product, "zero", value=ir.tensor(np.zeros((), np.float32)))
            chosen = _node("Where", [seen[mask], y, zero], product, "unmasked")
            chosen.type, chosen.shape = y.type, y.shape
            own = chosen.producer()
            for use in tuple(y.uses()):
                if use.node is not own:
                    use.node.replace_input_with(use.idx, chosen)
            for index, output in enumerate(model.graph.outputs):
                if output is y:
                    model.graph.outputs[index] = chosen


def _guarded(test: ir.Node) -> tuple[ir.Value, ir.Value, ir.Node, ir.Node] | None:
    """The mask, the softmax, the guard and the product of masked attention in float32; None where it is another thing."""
    weights = test.inputs[0]
    softmax = None if weights is None else weights.producer()
    total = None if softmax is None or softmax.op_type != "Softmax" else softmax.inputs[0]
    add = None if total is None else total.producer()
    guards = [n for n in users(test.outputs[0]) if n.op_type == "Where" and n.inputs[2] is weights]
    if weights is None or add is None or add.op_type != "Add" or len(guards) != 1:
        return None
    products = users(guards[0].outputs[0])
    if len(products) != 1 or products[0].op_type != "MatMul" or scalar(guards[0].inputs[1]) != 0:
        return None
    if products[0].outputs[0].dtype != ir.DataType.FLOAT:
        return None
    for value in add.inputs:
        choice = None if value is None else value.producer()
        if choice is None or choice.op_type != "Where" or choice.inputs[0] is None:
            continue
        low = scalar(choice.inputs[2])
        if scalar(choice.inputs[1]) == 0 and low is not None and low <= _LOWEST:
            return choice.inputs[0], weights, guards[0], products[0]
    return None


def _any(mask: ir.Value, before: ir.Node) -> ir.Value:
    """Whether a row of ``mask`` holds anything that is true, ``[..., queries, 1]``."""
    numbers = _node("Cast", [mask], before, "mask", to=ir.DataType.INT32.value)
    last = _node("Constant", [], before, "last", value=ir.tensor(np.array([-1], np.int64)))
    most = _node("ReduceMax", [numbers, last], before, "most", keepdims=1)
    return _node("Cast", [most], before, "any", to=ir.DataType.BOOL.value)


def _node(
    op_type: str, inputs: list[ir.Value | None], at: ir.Node, name: str, **attributes: object
) -> ir.Value:
    """A node named after ``at``, from the same line, right before it or, where it reads ``at``, behind it."""
    node = ir.node(op_type, inputs, attributes=attributes, name=f"{at.name}/{name}")  # type: ignore[arg-type]
    node.metadata_props.update(at.metadata_props)
    node.outputs[0].name = f"{at.outputs[0].name}/{name}"
    if at.outputs[0] in inputs:
        at.append(node)
    else:
        at.prepend(node)
    return node.outputs[0]


def _replace(old: ir.Value, new: ir.Value) -> None:
    for use in tuple(old.uses()):
        use.node.replace_input_with(use.idx, new)
