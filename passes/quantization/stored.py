"""Weights that are stored small and computed with in float: which those are, and how they are put into the graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, describe, graphs, rank
from optkit.passes.quantization.plan import selects

logger = logging.getLogger(__name__)

_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A constant that weights alone are read from.

    Attributes:
        graph: Where it is an initializer.
        value: The constant, float32, finite.
        node: The first of its readers.
        outputs: Axis of output channels, or of the rows of a table.
        inputs: Axis that is summed over, or along which a row lies.
    """

    graph: ir.Graph
    value: ir.Value
    node: ir.Node
    outputs: int
    inputs: int

    @property
    def array(self) -> np.ndarray:
        """The weights."""
        assert self.value.const_value is not None
        return self.value.const_value.numpy()

    def insert(self, node: ir.Node, name: str) -> None:
        """Put ``node``, which gives floats of the weights' shape, before all others."""
        out = node.outputs[0]
        out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), self.value.shape
        producers = [v.producer() for v in node.inputs if v is not None]
        last = next((p for p in producers if p is not None), None)
        if last is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(last, node)

    def replace(self, node: ir.Node, name: str) -> None:
        """Let all readers read the output of ``node``, which gives the same floats again."""
        self.insert(node, name)
        self.value.replace_all_uses_with(node.outputs[0])


def sites(model: ir.Model, targets: Sequence[str], ignore: Sequence[str], smallest: int) -> Iterator[Site]:
    """All weights of products and convolutions, and tables that are looked up, as far as every reader is selected."""
    for graph in graphs(model):
        for value in tuple(graph.initializers.values()):
            readers = tuple(value.uses())
            if (
                value.const_value is None
                or value.dtype != ir.DataType.FLOAT
                or value.const_value.size < smallest
                or value.is_graph_output()
                or value.is_graph_input()
                or not readers
            ):
                continue
            found = [_axes(u.node, u.idx) for u in readers]
            chosen = all(selects(targets, u.node) and not selects(ignore, u.node) for u in readers)
            first = found[0]
            if first is None or None in found or not chosen:
                continue
            node = readers[0].node
            if not np.isfinite(value.const_value.numpy()).all():
                logger.warning("%s keeps its weights: they are infinite or NaN", describe(node))
                continue
            yield Site(graph=graph, value=value, node=node, outputs=first[0], inputs=first[1])


def _axes(node: ir.Node, index: int) -> tuple[int, int] | None:
    """Axes of outputs and of inputs of the weights, where input ``index`` is those."""
    value = node.inputs[index]
    if node.domain != "" or value is None or index != (0 if node.op_type == "Gather" else 1):
        return None
    if node.op_type in _CONVOLUTIONS and (rank(value) or 0) >= 3:
        return (0, 1) if node.op_type == "Conv" else (1, 0)
    if rank(value) != 2:
        return None
    if node.op_type == "Gather":
        return (0, 1) if attribute(node, "axis", 0) == 0 else None
    if node.op_type == "Gemm":
        return (0, 1) if attribute(node, "transB", 0) else (1, 0)
    return (1, 0) if node.op_type == "MatMul" else None
