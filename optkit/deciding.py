"""Which layers decide sizes: how many frames speech has, how many boxes are kept."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import constant, walk

# What gives the shape of a value, not its numbers.
_SHAPES = frozenset({"Shape", "Size"})
# Operators whose output is as large as the numbers say, and the first of the inputs that do.
_BY_NUMBERS = {
    "Compress": 1, "ConstantOfShape": 0, "Expand": 1, "NonMaxSuppression": 0, "NonZero": 0, "OneHot": 1, "Pad": 1, "Range": 0, "Reshape": 1,
    "Resize": 2, "Slice": 1, "Tile": 1, "TopK": 1, "Unique": 0, "Upsample": 1,
}  # fmt: skip


def deciding(model: ir.Model) -> set[str]:
    """Names of the nodes whose numbers go into the size of another value.

    Rounding them does not blur the outputs, it can make them longer or shorter. Bodies of If and Loop count as one node.
    """
    nodes = list(model.graph)
    numbers = {v for v in model.graph.inputs if not v.is_initializer()}
    found: list[ir.Value] = []
    for node in nodes:
        if node.op_type in _SHAPES:
            continue
        if not any(v in numbers for v in _read(node)):
            continue
        numbers.update(node.outputs)
        first = _BY_NUMBERS.get(node.op_type)
        if first is not None:
            found += [
                v for v in node.inputs[first:] if v is not None and v in numbers and constant(v) is None
            ]
    seen: set[ir.Node] = set()
    while found:
        node = found.pop().producer()  # type: ignore[assignment]
        if node is None or node in seen or node.op_type in _SHAPES:
            continue
        seen.add(node)
        found += _read(node)
    return {str(n.name) for n in seen}


def _read(node: ir.Node) -> list[ir.Value]:
    """Inputs, and what bodies read from around them."""
    inner = [
        v for body in node.attributes.values() if body.type == ir.AttributeType.GRAPH for n in walk(body.as_graph()) for v in n.inputs
    ]  # fmt: skip
    return [v for v in (*node.inputs, *inner) if v is not None]
