"""Products with a matrix as convolutions, which the Neural Engine is built for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, graphs, rank, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, substitute


class LinearToConvolution(GraphPass):
    """Replace a product with a constant matrix, and the Add of a vector behind it, by a convolution of one element.

    Before: ``Add(MatMul(x, w), b)`` with ``x [B, S, K]`` or ``[B, H, W, K]``, ``w [K, N]``, ``b [N]``.
    After: ``x`` as ``[B, K, 1, S]`` or ``[B, K, H, W]``, ``Conv`` with ``w`` as ``[N, K, 1, 1]`` and ``b``, and back.
    Only where the target computes best in that layout: "Deploying Transformers on the Apple Neural Engine" (Apple Machine
    Learning Research, June 2022), principle 1: channels first and the sequence last, with ``nn.Linear`` as ``nn.Conv2d``. ``cancel-layout`` takes away the moves between two of them.
    """

    name: ClassVar[str] = "linear-to-convolution"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every suitable product, where the target wants it."""
        if not context.target.convolves:
            return []
        changes, names = [], Names(model)
        for graph in graphs(model):
            for node in tuple(graph):
                if node.op_type == "MatMul" and node.domain == "" and _suits(node):
                    _replace(node, names)
                    changes.append(Change(rule=self.name, node=str(node.name)))
        return changes


def _suits(node: ir.Node) -> bool:
    x, weight = node.inputs
    if x is None or weight is None or rank(weight) != 2 or constant(weight) is None:
        return False
    return rank(x) in (3, 4) and x.dtype == weight.dtype == ir.DataType.FLOAT


def _bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add behind ``node`` and its vector, where nothing else reads the product."""
    product, weight = node.outputs[0], node.inputs[1]
    readers = users(product)
    if len(readers) != 1 or product.is_graph_output() or readers[0].op_type != "Add":
        return None
    add = readers[0]
    other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    assert weight is not None and weight.shape is not None
    fits = other is not None and other is not product and rank(other) == 1 and constant(other) is not None
    if not fits or add.graph is not node.graph:
        return None
    assert other is not None and other.shape is not None
    return (add, other) if other.shape[0] == weight.shape[1] else None


def _replace(node: ir.Node, names: Names) -> None:
    x, weight = node.inputs
    matrix = constant(weight)
    assert x is not None and matrix is not None
    found = _bias(node)
    last = node if found is None else found[0]
    op = Builder(node if found is None else last, names)
    kernel = op.constant(np.ascontiguousarray(matrix.T)[:, :, None, None], "weight")
    bias = () if found is None else (found[1],)
    if rank(x) == 4:
        y = op.Conv(op.Transpose(x, perm=[0, 3, 1, 2]), kernel, *bias)
        y = op.Transpose(y, perm=[0, 2, 3, 1])
    else:
        row = np.array([2], np.int64)
        y = op.Conv(op.Unsqueeze(op.Transpose(x, perm=[0, 2, 1]), row), kernel, *bias)
        y = op.Transpose(op.Squeeze(y, row), perm=[0, 2, 1])
    substitute(last.outputs[0], y)
    for old in dict.fromkeys((last, node)):
        assert old.graph is not None
        old.graph.remove(old, safe=True)
