"""Reductions over axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import MOVED, Context, emits, size
from optkit.graph import constant, ints, rank

_CODES = {
    "ReduceMean": "MEAN",
    "ReduceSum": "SUM",
    "ReduceMax": "REDUCE_MAX",
    "ReduceMin": "REDUCE_MIN",
    "ReduceProd": "REDUCE_PROD",
}


def _axes(node: ir.Node) -> list[int] | None:
    """Axes that are reduced, in order; None where they are not constant, or nobody knows how many there are."""
    given, n = node.inputs[1] if len(node.inputs) > 1 else None, rank(node.inputs[0])
    if n is None:
        return None
    if given is not None:
        array = constant(given)
        if array is None:
            return None
        found = [int(a) for a in array]
    else:
        found = ints(node, "axes")
    if not found and not node.attributes.get_int("noop_with_empty_axes", 0):
        return list(range(n))
    return sorted(a % n for a in found)


def _refuse(node: ir.Node) -> str | None:
    return "LiteRT: axes must be constant, and the rank known" if _axes(node) is None else None


@emits(*_CODES, refuse=_refuse)
def _reduce(c: Context, node: ir.Node) -> None:
    source, axes = node.inputs[0], _axes(node)
    assert source is not None and axes is not None
    keep = bool(node.attributes.get_int("keepdims", 1))
    layout = c.layout(source) if keep or axes == [2, 3] else "plain"
    x = c.get(source, layout)
    if not axes:
        c.put(node.outputs[0], x, layout)
        return
    placed = sorted(MOVED[a] for a in axes) if layout == "last" else axes
    shape = [1 if i in placed else n for i, n in enumerate(x.shape) if keep or i not in placed]
    made = c.op(
        _CODES[node.op_type],
        [x, c.vector(placed)],
        shape,
        settings=("ReducerOptions", {"keepDims": keep}),
        name=str(node.outputs[0].name),
    )
    # Without rows and columns, what is left are samples and channels in order.
    c.put(node.outputs[0], made, layout if keep else "plain")


@emits("ReduceL2", refuse=_refuse)
def _length(c: Context, node: ir.Node) -> None:
    source, axes = node.inputs[0], _axes(node)
    assert source is not None and axes is not None
    x, keep = c.get(source), bool(node.attributes.get_int("keepdims", 1))
    squares = c.op("MUL", [x, x], x.shape, settings=("MulOptions", {}))
    total = c.op(
        "SUM",
        [squares, c.vector(axes)],
        size(node.outputs[0]),
        settings=("ReducerOptions", {"keepDims": keep}),
    )
    c.put(node.outputs[0], c.op("SQRT", [total], total.shape))


def _refuse_arg(node: ir.Node) -> str | None:
    return (
        "LiteRT gives the first of equal elements"
        if node.attributes.get_int("select_last_index", 0)
        else None
    )


@emits("ArgMax", "ArgMin", refuse=_refuse_arg)
def _arg(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x = c.get(source)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    shape = [n for i, n in enumerate(x.shape) if i != axis]
    code, kind = ("ARG_MAX", "ArgMaxOptions") if node.op_type == "ArgMax" else ("ARG_MIN", "ArgMinOptions")
    made = c.op(code, [x, c.number(axis, np.int32)], shape, np.int64, (kind, {"outputType": 4}))
    c.put(node.outputs[0], c.reshaped(made, size(node.outputs[0])))


def _refuse_sum(node: ir.Node) -> str | None:
    return "LiteRT: along a constant axis alone" if constant(node.inputs[1]) is None else None


@emits("CumSum", refuse=_refuse_sum)
def _running(c: Context, node: ir.Node) -> None:
    source, axis = node.inputs[0], constant(node.inputs[1])
    assert source is not None and axis is not None
    x = c.get(source)
    fields = {
        "exclusive": bool(node.attributes.get_int("exclusive", 0)),
        "reverse": bool(node.attributes.get_int("reverse", 0)),
    }
    inputs = [x, c.number(int(axis.reshape(-1)[0]) % len(x.shape), np.int32)]
    c.put(node.outputs[0], c.op("CUMSUM", inputs, x.shape, settings=("CumsumOptions", fields)))
