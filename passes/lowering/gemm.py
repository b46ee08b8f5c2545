"""Products of activations with a weight matrix in the two-dimensional form that integer kernels want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, graphs, rank, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, substitute


class MatMulToGemm(GraphPass):
    """Replace MatMul with a constant matrix, and the Add of a vector behind it, by one Gemm.

    Before: ``Add(MatMul(x, w), b)`` with ``x [..., K]``, ``w [K, N]``, ``b [N]``.
    After: ``Reshape(Gemm(Reshape(x, [-1, K]), w, b), [..., N])``; without the Reshapes where ``x`` has two axes.
    ONNX Runtime fuses Q/DQ pairs around Gemm, bias included, into one integer kernel.
    """

    name: ClassVar[str] = "matmul-to-gemm"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every suitable MatMul."""
        changes, names = [], Names(model)
        for graph in graphs(model):
            shapes: dict[object, ir.Value] = {}
            for node in tuple(graph):
                if node.op_type == "MatMul" and node.domain == "" and _suits(node):
                    _replace(node, shapes, names)
                    changes.append(Change(rule=self.name, node=str(node.name)))
        return changes


def _suits(node: ir.Node) -> bool:
    x, weight = node.inputs
    if x is None or weight is None or rank(weight) != 2 or constant(weight) is None or (rank(x) or 0) < 2:
        return False
    return x.dtype == weight.dtype and x.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def _bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add behind ``node`` and its vector, where nothing else reads the product."""
    product = node.outputs[0]
    readers = users(product)
    if (
        len(readers) != 1
        or product.is_graph_output()
        or readers[0].op_type != "Add"
        or readers[0].graph is not node.graph
    ):
        return None
    add = readers[0]
    other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    columns = _columns(node)
    if (
        other is None
        or other is product
        or rank(other) != 1
        or constant(other) is None
        or other.shape is None
        or other.shape[0] != columns
    ):
        return None
    return add, other


def _columns(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return int(weight.shape.numpy()[1])


def _replace(node: ir.Node, shapes: dict[object, ir.Value], names: Names) -> None:
    x, weight = node.inputs
    assert x is not None and x.shape is not None and weight is not None and weight.shape is not None
    found = _bias(node)
    # New nodes stand where the last of the old ones stood, when all operands exist.
    last = node if found is None else found[0]
    op = Builder(node, names)
    rows, columns = weight.shape.numpy()
    flat = x if len(x.shape) == 2 else op.Reshape(x, np.array([-1, rows], np.int64))
    if flat is not x:
        flat.type, flat.shape = x.type, ir.Shape((None, int(rows)))
    operands = [flat, weight] if found is None else [flat, weight, found[1]]
    y = op.node("Gemm", operands)[0]
    y.type = x.type
    y.shape = ir.Shape((flat.shape[0] if flat.shape is not None else None, int(columns)))
    if flat is not x:
        y = op.Reshape(y, _target(op, x, int(columns), shapes))
    substitute(last.outputs[0], y)
    for old in dict.fromkeys((last, node)):
        assert old.graph is not None
        old.graph.remove(old, safe=True)


def _target(op: Builder, x: ir.Value, columns: int, shapes: dict[object, ir.Value]) -> ir.Value | np.ndarray:
    """The shape of the result: a constant with one -1 where at most one leading axis is symbolic, else computed."""
    assert x.shape is not None
    leading = list(x.shape)[:-1]
    if sum(not isinstance(d, int) for d in leading) <= 1 and 0 not in leading:
        return np.array([*(d if isinstance(d, int) else -1 for d in leading), columns], np.int64)
    named = all(isinstance(d, int) or d.value is not None for d in leading)
    key = (tuple(str(d) for d in leading) if named else x, columns)
    if key not in shapes:
        size = op.node("Shape", (x,), {"end": -1})[0]
        size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((len(leading),))
        target = op.node("Concat", (size, np.array([columns], np.int64)), {"axis": 0})[0]
        target.type, target.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((len(leading) + 1,))
        shapes[key] = target
    return shapes[key]
