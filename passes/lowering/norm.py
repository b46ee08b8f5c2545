"""Norms over channels where channels come second, which is how the Neural Engine has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, graphs, rank, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, substitute

# Channels second, and last again, by the number of axes.
_SECOND, _LAST = {3: [0, 2, 1], 4: [0, 3, 1, 2]}, {3: [0, 2, 1], 4: [0, 2, 3, 1]}


class NormOverChannels(GraphPass):
    """Compute a norm over the last axis over the second, where that takes away the moves around it.

    Before: ``Transpose(LayerNormalization(x))`` with ``x [B, S, C]`` or ``[B, H, W, C]``, and channels second behind it.
    After: ``x`` as ``[B, C, 1, S]`` or ``[B, C, H, W]``; there ``d = x - mean(x)``, ``d / sqrt(mean(d * d) + e) * g + b`` with means
    over the second axis; and back. RMSNormalization is the same without the mean. ``cancel-layout`` takes away the moves.
    Only where the target computes best in that layout: Apple, ml-ane-transformers, ``layer_norm.py`` (``LayerNormANE``); coremltools
    makes one operation of it again ("Detect BC1S LayerNorm pattern as in ml-ane-transformers"). Means of all channels are
    then as long as the sequence instead of one element wide, of which 64 bytes would be stored for each ("neural_engine_rules").
    """

    name: ClassVar[str] = "norm-over-channels"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every suitable norm, where the target wants it."""
        if not context.target.convolves:
            return []
        changes, names = [], Names(model)
        for graph in graphs(model):
            for node in tuple(graph):
                if node.op_type in ("LayerNormalization", "RMSNormalization") and _suits(node):
                    _replace(node, names)
                    changes.append(Change(rule=self.name, node=str(node.name)))
        return changes


def _suits(node: ir.Node) -> bool:
    x, y, axes = node.inputs[0], node.outputs[0], rank(node.inputs[0])
    if node.domain != "" or x is None or axes not in _SECOND or x.dtype != ir.DataType.FLOAT:
        return False
    if attribute(node, "axis", -1) not in (-1, axes - 1) or any(v.uses() for v in node.outputs[1:]):
        return False
    if any(v is not None and (constant(v) is None or rank(v) != 1) for v in node.inputs[1:]):
        return False
    readers = users(y)
    return bool(readers) and not y.is_graph_output() and all(_moves(r, _SECOND[axes]) for r in readers)


def _moves(node: ir.Node, order: list[int]) -> bool:
    return (
        node.op_type == "Transpose"
        and node.domain == ""
        and list(node.attributes.get_ints("perm", ()) or ()) == order
    )


def _replace(node: ir.Node, names: Names) -> None:
    x, axes = node.inputs[0], rank(node.inputs[0])
    assert x is not None and axes is not None
    op, row, second = Builder(node, names), np.array([2], np.int64), np.array([1], np.int64)
    moved = op.Transpose(x, perm=_SECOND[axes])
    wide = moved if axes == 4 else op.Unsqueeze(moved, row)
    apart = (
        wide if node.op_type == "RMSNormalization" else op.Sub(wide, op.ReduceMean(wide, second, keepdims=1))
    )
    power = op.ReduceMean(op.Mul(apart, apart), second, keepdims=1)
    epsilon = np.asarray(attribute(node, "epsilon", 1e-5), np.float32)
    y = op.Mul(apart, op.Reciprocal(op.Sqrt(op.Add(power, epsilon))))
    for held, combine in zip(node.inputs[1:], (op.Mul, op.Add), strict=False):
        if held is not None:
            array = constant(held)
            assert array is not None
            y = combine(y, np.ascontiguousarray(array.reshape(-1, 1, 1)))
    y = op.Transpose(y if axes == 4 else op.Squeeze(y, row), perm=_LAST[axes])
    substitute(node.outputs[0], y)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
