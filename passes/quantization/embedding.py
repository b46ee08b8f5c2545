"""Tables that are looked up row by row, in int8: a quarter of the size, for one product a row that is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.formats import FORMATS
from optkit.graph import attribute, constant, drop_unused_initializers, graphs, rank
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.plan import selects
from optkit.qdq import quantized_tensor, scale_zero, weight_range
from optkit.rewrite import Builder, Change, Names, register, substitute

_FORMAT = FORMATS["s8"]


class QuantizeEmbedding(GraphPass):
    """Store embedding tables in int8 with a scale a row.

    Before: ``Gather(table, i)`` with ``table [rows, width]``. After: ``Cast(Gather(q, i)) * Gather(scale, i)`` with
    ``q [rows, width]`` in int8, symmetric, and ``scale [rows, 1]``. Only rows that are looked up are turned into floats.
    Tables that other operators read as well stay as they are: the floats would have to be kept beside the integers.

    Attributes:
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        smallest: Tables with fewer elements stay in float: there is little to save.
    """

    name: ClassVar[str] = "quantize-embedding"
    exact: ClassVar[bool] = False

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 1 << 16

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every suitable Gather."""
        changes: list[Change] = []
        names = Names(model)
        stored: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for graph in graphs(model):
            for node in tuple(graph):
                if self._suits(node):
                    _replace(node, stored, names)
                    changes.append(Change(rule=self.name, node=str(node.name), detail="Gather to s8 rows"))
        if changes:
            drop_unused_initializers(model)
        return changes

    def _suits(self, node: ir.Node) -> bool:
        if node.op_type != "Gather" or node.domain != "" or attribute(node, "axis", 0) != 0:
            return False
        table = node.inputs[0]
        if (
            table is None
            or not table.is_initializer()
            or rank(table) != 2
            or table.dtype != ir.DataType.FLOAT
        ):
            return False
        # A scale a row costs four bytes: rows shorter than that save nothing, and scales are themselves such a table.
        if table.shape is None or table.shape.numpy()[1] < 4:
            return False
        if table.is_graph_output() or constant(table) is None or table.const_value is None:
            return False
        if (
            table.const_value.size < self.smallest
            or not np.isfinite(weight_range(table.const_value.numpy(), 0)).all()
        ):
            return False
        return all(
            u.node.op_type == "Gather"
            and u.idx == 0
            and selects(self.targets, u.node)
            and not selects(self.ignore, u.node)
            for u in table.uses()
        )


def _replace(node: ir.Node, stored: dict[ir.Value, tuple[ir.Value, ir.Value]], names: Names) -> None:
    table, indices = node.inputs
    assert table is not None
    assert table.const_value is not None
    if table not in stored:
        top = weight_range(table.const_value.numpy(), 0)
        scale, zero = scale_zero(-top, top, _FORMAT)
        integers = quantized_tensor(table.const_value, scale, zero, _FORMAT, 0, f"{table.name}/q")
        graph = table.graph
        assert isinstance(graph, ir.Graph)
        stored[table] = (
            register(graph, names.new(f"{table.name}/q"), integers),
            register(graph, names.new(f"{table.name}/scale"), scale[:, None]),
        )
    q, s = stored[table]
    op = Builder(node, names)
    row = op.Cast(op.Gather(q, indices), to=int(ir.DataType.FLOAT))
    substitute(node.outputs[0], op.Mul(row, op.Gather(s, indices)))
    assert node.graph is not None
    node.graph.remove(node, safe=True)
