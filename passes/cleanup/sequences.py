"""Sequences that are taken apart again become the values that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, graphs, scalar, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove_unused, substitute


class SequencesToSplit(GraphPass):
    """Replace a SplitToSequence whose pieces are taken by number by a Split.

    Before: ``SequenceAt(SplitToSequence(x, 16, axis=1), 0)`` ..., as torch's exporter writes ``chunk`` and ``split``.
    After: ``Split(x, [16, 16], axis=1)``, which runtimes without sequences have too.
    """

    name: ClassVar[str] = "sequences-to-split"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every one."""
        names, changes = Names(model), []
        for graph in graphs(model):
            for node in tuple(graph):
                place = label(node)
                if node.op_type == "SplitToSequence" and node.domain == "" and _split(node, names):
                    changes.append(Change(rule="sequences-to-split", node=place))
        return changes


def _split(node: ir.Node, names: Names) -> bool:
    sizes, sequence, readers = _sizes(node), node.outputs[0], users(node.outputs[0])
    count = len(sizes) if isinstance(sizes, np.ndarray) else (shape_of(sizes) or [None])[0]
    if sizes is None or not isinstance(count, int) or not readers or sequence.is_graph_output():
        return False
    places = [_place(reader, node, count) for reader in readers]
    given = [p for r, p in zip(readers, places, strict=True) if r.outputs[0].is_graph_output()]
    if None in places or len(given) > len(set(given)):
        return False
    axis = node.attributes.get_int("axis", 0)
    split = Builder(node, names).node("Split", [node.inputs[0], sizes], {"axis": axis}, outputs=count)
    for reader, place in zip(readers, places, strict=True):
        assert place is not None
        substitute(reader.outputs[0], split[place])
    remove_unused([*readers, node])
    return True


def _sizes(node: ir.Node) -> np.ndarray | ir.Value | None:
    """Of the pieces along the axis, or what computes them; None where it cannot be told how many pieces there are."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None or given.shape is None:
        return None  # Pieces of one element, without the axis unless the node says that it stays.
    if len(given.shape):
        return given if given.dtype == ir.DataType.INT64 else None
    size = constant(given)
    if size is None or not attribute(node, "keepdims", 1):
        return None  # ONNX ignores it beside sizes, ONNX Runtime drops the axis beside a single one.
    shape, most = shape_of(node.inputs[0]), int(size)
    length = None if shape is None else shape[node.attributes.get_int("axis", 0)]
    if not isinstance(length, int) or most < 1:
        return None
    return np.array([min(most, length - start) for start in range(0, length, most)], np.int64)


def _place(reader: ir.Node, node: ir.Node, count: int) -> int | None:
    """Which of the pieces a SequenceAt takes, counted from the front."""
    if reader.op_type != "SequenceAt" or reader.domain != "" or reader.graph is not node.graph:
        return None
    place = scalar(reader.inputs[1])
    return int(place) % count if place is not None and -count <= place < count else None
