"""Slices that divide a value among them become one Split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import constant, graphs, read_once, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove_unused, substitute

# A slice along one axis: the axis, where it starts, where it ends.
_Cut = tuple[int, int, int]


class SlicesToSplit(GraphPass):
    """Replace Slices with step 1 that cover an axis of known size, each part once, by one Split.

    Before: ``x[:, :16]`` and ``x[:, 16:]`` of 32 channels, as exporters write ``chunk`` and indexing.
    After: ``Split(x, [16, 16], axis=1)``; what moves integers needs one grid for all parts then. Parts that are all sliced
    further along another axis stay: ``cancel-layout`` cuts each out at once.
    """

    name: ClassVar[str] = "slices-to-split"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every group."""
        names = Names(model)
        return [change for graph in graphs(model) for change in _join(graph, names)]


def _join(graph: ir.Graph, names: Names) -> Iterator[Change]:
    for value in dict.fromkeys(n.inputs[0] for n in graph if n.op_type == "Slice" and n.domain == ""):
        if value is None:
            continue
        readers = [n for n in users(value) if n.graph is graph]
        cuts = {n: cut for n in readers if (cut := _cut(n)) is not None}
        for axis in sorted({axis for axis, _, _ in cuts.values()}):
            parts = sorted((n for n, cut in cuts.items() if cut[0] == axis), key=cuts.__getitem__)
            if (change := _split(value, axis, parts, [cuts[n] for n in parts], names)) is not None:
                yield change


def _split(value: ir.Value, axis: int, nodes: list[ir.Node], cuts: list[_Cut], names: Names) -> Change | None:
    """One Split in place of ``nodes``, where they divide all of the axis."""
    shape = shape_of(value)
    assert shape is not None
    edges = [0, *(end for _, _, end in cuts)]
    if len(cuts) < 2 or [start for _, start, _ in cuts] != edges[:-1] or edges[-1] != shape[axis]:
        return None
    if all(_is_cut_again(node, axis) for node in nodes):
        return None
    graph = nodes[0].graph
    assert graph is not None
    first = next(n for n in graph if n in nodes)
    sizes = np.diff(edges).astype(np.int64)
    parts = Builder(first, names).node("Split", [value, sizes], {"axis": axis}, outputs=len(nodes))
    for node, part in zip(nodes, parts, strict=True):
        substitute(node.outputs[0], part)
    remove_unused(nodes)
    return Change(rule="slices-to-split", node=label(first), detail=f"{len(nodes)} parts of axis {axis}")


def _is_cut_again(node: ir.Node, axis: int) -> bool:
    """Whether one Slice along another axis is all that reads it."""
    output = node.outputs[0]
    reader = next(iter(users(output)), None)
    cut = _cut(reader) if reader is not None and read_once(output) else None
    return cut is not None and reader is not None and reader.graph is node.graph and cut[0] != axis


def _cut(node: ir.Node) -> _Cut | None:
    """The part that a Slice takes of one axis of known size, with step 1; None for other Slices."""
    if node.op_type != "Slice" or node.domain != "":
        return None
    shape = shape_of(node.inputs[0])
    given = [constant(node.inputs[i]) if i < len(node.inputs) else None for i in range(1, 5)]
    if shape is None or given[0] is None or given[1] is None or given[0].size != 1:
        return None
    if any(i < len(node.inputs) and node.inputs[i] is not None and given[i - 1] is None for i in (3, 4)):
        return None
    start, end, axis, step = (
        int(g.reshape(-1)[0]) if g is not None else d for g, d in zip(given, (0, 0, 0, 1), strict=True)
    )
    axis %= len(shape)
    size = shape[axis]
    if step != 1 or not isinstance(size, int):
        return None
    start, end, _ = slice(start, end).indices(size)
    return (axis, start, end) if start < end else None
