"""Norms and softmax."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, Layout, emits, size
from optkit.backends.litert.flat import Tensor
from optkit.graph import rank


def _axis(node: ir.Node, default: int = -1) -> int:
    return node.attributes.get_int("axis", default) % max(rank(node.inputs[0]) or 1, 1)


@emits("Softmax", "LogSoftmax")
def _softmax(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x, axis = c.get(source), _axis(node)
    code, settings = (
        ("SOFTMAX", ("SoftmaxOptions", {"beta": 1.0})) if node.op_type == "Softmax" else ("LOG_SOFTMAX", None)
    )
    order = [i for i in range(len(x.shape)) if i != axis] + [axis]
    y = c.transposed(x, order)
    y = c.op(code, [y], y.shape, settings=settings, name=str(node.outputs[0].name))
    c.put(node.outputs[0], c.transposed(y, np.argsort(order).tolist()))


def _centred(c: Context, x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    """Mean 0 and variance 1 over ``axes``."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    keep = ("ReducerOptions", {"keepDims": True})
    mean = c.op("MEAN", [x, c.vector(axes)], kept, settings=keep)
    squares = c.op("SQUARED_DIFFERENCE", [x, mean], x.shape, settings=("SquaredDifferenceOptions", {}))
    variance = c.op("MEAN", [squares, c.vector(axes)], kept, settings=keep)
    centred = c.op("SUB", [x, mean], x.shape, settings=("SubOptions", {}))
    return _over_root(c, centred, variance, epsilon)


def _over_root(c: Context, x: Tensor, square: Tensor, epsilon: float) -> Tensor:
    safe = c.op("ADD", [square, c.number(epsilon)], square.shape, settings=("AddOptions", {}))
    root = c.op("RSQRT", [safe], square.shape)
    return c.op("MUL", [x, root], x.shape, settings=("MulOptions", {}))


def _scaled(c: Context, node: ir.Node, x: Tensor, first: int) -> Tensor:
    for index, code, kind in ((first, "MUL", "MulOptions"), (first + 1, "ADD", "AddOptions")):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None:
            x = c.op(code, [x, c.get(value)], x.shape, settings=(kind, {}))
    return x


def _refuse_more(node: ir.Node) -> str | None:
    more = [o for o in node.outputs[1:] if o.uses() or o.is_graph_output()]
    return "LiteRT gives no mean and variance" if more else None


@emits("LayerNormalization", refuse=_refuse_more)
def _layer_norm(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x = c.get(source)
    axes = list(range(_axis(node), len(x.shape)))
    c.put(
        node.outputs[0], _scaled(c, node, _centred(c, x, axes, node.attributes.get_float("epsilon", 1e-5)), 1)
    )


@emits("RMSNormalization")
def _rms_norm(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x = c.get(source)
    axes = list(range(_axis(node), len(x.shape)))
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    squares = c.op("MUL", [x, x], x.shape, settings=("MulOptions", {}))
    mean = c.op("MEAN", [squares, c.vector(axes)], kept, settings=("ReducerOptions", {"keepDims": True}))
    c.put(
        node.outputs[0],
        _scaled(c, node, _over_root(c, x, mean, node.attributes.get_float("epsilon", 1e-5)), 1),
    )


@emits("InstanceNormalization")
def _instance_norm(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    shape = size(source)
    layout: Layout = "last" if len(shape) == 4 else "plain"
    x, epsilon = c.get(source, layout), node.attributes.get_float("epsilon", 1e-5)
    if layout == "last":
        c.put(node.outputs[0], _scaled(c, node, _centred(c, x, [1, 2], epsilon), 1), layout)
        return
    # All there is of a channel in a row, and channels last for their factors.
    rows = c.reshaped(x, (shape[0], shape[1], int(np.prod(shape[2:]))))
    y = c.transposed(_centred(c, rows, [2], epsilon), (0, 2, 1))
    c.put(node.outputs[0], c.reshaped(c.transposed(_scaled(c, node, y, 1), (0, 2, 1)), shape))


def _refuse_batch_norm(node: ir.Node) -> str | None:
    if node.attributes.get_int("training_mode", 0):
        return "LiteRT takes no statistics of a batch: training_mode must be 0"
    return None if rank(node.inputs[0]) in (2, 4) else "LiteRT: of two or four axes alone"


@emits("BatchNormalization", refuse=_refuse_batch_norm)
def _batch_norm(c: Context, node: ir.Node) -> None:
    source, *rest = node.inputs
    assert source is not None
    layout: Layout = "last" if len(size(source)) == 4 else "plain"
    x = c.get(source, layout)
    scale, shift, mean, variance = (c.get(v) for v in rest if v is not None)
    centred = c.op("SUB", [x, mean], x.shape, settings=("SubOptions", {}))
    y = _over_root(c, centred, variance, node.attributes.get_float("epsilon", 1e-5))
    y = c.op("MUL", [y, scale], x.shape, settings=("MulOptions", {}))
    c.put(node.outputs[0], c.op("ADD", [y, shift], x.shape, settings=("AddOptions", {})), layout)
