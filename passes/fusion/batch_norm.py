"""Batch normalization moves into the weights of the layers around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import onnx_ir as ir

from optkit.graph import graphs
from optkit.passes.base import Context, GraphPass
from optkit.passes.fusion.affine import affine_of, fold_before, fold_behind
from optkit.rewrite import Change, Names


class FoldBatchNorm(GraphPass):
    """Fold BatchNormalization, at inference, into a Conv, ConvTranspose, Gemm, MatMul or norm before it or behind it.

    Before: ``Conv -> BatchNormalization``. After: ``Conv`` with weights ``w * g / sqrt(v + eps)`` and the bias to match.
    One that no neighbour can take in whole stays as it is: it is one node, and a scale and a shift would be two.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Fold each normalization that a neighbour can take in."""
        names, changes = Names(model), list[Change]()
        while found := [change for graph in graphs(model) for change in _fold(graph, names)]:
            changes += found
        return changes


def _fold(graph: ir.Graph, names: Names) -> Iterator[Change]:
    for node in tuple(graph):
        found = affine_of(node) if node.op_type == "BatchNormalization" else None
        if found is not None and (change := fold_before([found], names) or fold_behind([found], names)):
            yield Change(rule="fold-batch-norm", node=change.node, detail=change.detail)
