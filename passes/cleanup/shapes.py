"""Arithmetic on shapes is done once, where the sizes are known, and once each where they are not."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import constant, graphs, rank, subgraphs
from optkit.inference import infer
from optkit.passes.base import Context, GraphPass
from optkit.passes.cleanup.constants import FoldConstants, become_constant
from optkit.passes.cleanup.dead import remove_nodes
from optkit.propagation import Known, shape
from optkit.rewrite import Builder, Change, Names, label, register, remove_unused, replaceable, substitute

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


class FoldShapes(GraphPass):
    """Fold Shape, Gather, Slice, Concat and arithmetic on sizes, as far as the sizes are known.

    * What is a number becomes a constant, and so does what follows from it, conditions of If included.
    * The computed target of a Reshape becomes a constant with 0 for axes that stay and at most one -1.
    * Two vectors that hold the same sizes, known or named, become one.
    * ``Unsqueeze(Gather(Shape(x), i))`` becomes ``Shape(x)`` from ``i`` to ``i + 1``.

    Axes with equal names are taken for equal, as ONNX has it. Types and shapes of all values are filled in on the way.
    """

    name: ClassVar[str] = "fold-shapes"

    max_bytes: int = 1 << 20
    """As for ``fold-constants``, which runs on what the sizes made constant."""

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Fold until the sizes tell nothing new."""
        changes: list[Change] = []
        names = Names(model)
        while True:
            known = infer(model)
            found = [change for graph in graphs(model) for change in _fold(graph, known, names)]
            _share(model.graph, {}, known, found)
            found += [change for graph in graphs(model) for change in _shorten(graph, names)]
            found += remove_nodes(model.graph)
            found += FoldConstants(max_bytes=self.max_bytes).run(model, context)
            if not found:
                return changes
            changes += found


def _fold(graph: ir.Graph, known: Mapping[ir.Value, Known], names: Names) -> Iterator[Change]:
    for node in tuple(graph):
        if node.domain != "" or node.op_type == "Constant" or node.graph is not graph:
            continue
        if node.op_type == "Reshape":
            change = _fix_target(node, known, names)
            if change is not None:
                yield change
        if len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        elements = known.get(output)
        if (
            elements is None
            or output.dtype not in _INTEGERS
            or not all(isinstance(e, int) for e in elements.flat)
        ):
            continue
        if not (output.uses() or output.is_graph_output()):
            continue
        yield Change(rule="fold-shape", node=label(node), detail=node.op_type)
        become_constant(output, ir.tensor(elements.astype(output.dtype.numpy())))


def constant_target(x: Sequence[Dim | None] | None, y: Sequence[Dim | None] | None) -> list[int] | None:
    """The target that makes a Reshape of ``x`` give ``y``: numbers, 0 for axes that stay, at most one -1; else None."""
    if y is None:
        return None
    target, missing = [], 0
    for index, dim in enumerate(y):
        if isinstance(dim, int):
            target.append(dim)
        elif dim is not None and x is not None and index < len(x) and x[index] == dim:
            target.append(0)
        else:
            target.append(-1)
            missing += 1
    # A size that is 0 would stand for "as before".
    return target if missing <= 1 and 0 not in (d for d in y if isinstance(d, int)) else None


def _fix_target(node: ir.Node, known: Mapping[ir.Value, Known], names: Names) -> Change | None:
    """Make the target of a Reshape constant."""
    if node.inputs[1] is None or constant(node.inputs[1]) is not None:
        return None
    # An output of the graph keeps the shape that it was declared with, which need not be the one that it has.
    declared = node.outputs[0].is_graph_output()
    y = shape(node, known.get) if declared else shape_of(node.outputs[0])  # type: ignore[arg-type]
    target = constant_target(shape_of(node.inputs[0]), y)
    if target is None:
        return None
    node.attributes.pop("allowzero", None)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(1, register(graph, names.new(f"{label(node)}/shape"), np.array(target, np.int64)))
    return Change(rule="fix-target", node=label(node), detail=str(target))


def _share(
    graph: ir.Graph,
    outer: Mapping[Hashable, ir.Value],
    known: Mapping[ir.Value, Known],
    changes: list[Change],
) -> None:
    """Let the first vector or scalar with the same contents stand for the later ones."""
    seen = dict(outer)
    for node in tuple(graph):
        for body in subgraphs(node):
            _share(body, seen, known, changes)
        if len(node.outputs) != 1 or node.op_type == "Constant" or not node.outputs[0].uses():
            continue
        value = node.outputs[0]
        elements = known.get(value)
        if elements is None or any(e is None for e in elements.flat):
            continue
        first = seen.setdefault((value.dtype, elements.ndim, tuple(elements.flat)), value)
        if first is not value and replaceable(value, first):
            changes.append(Change(rule="share-shape", node=label(node), detail=str(first.name)))
            substitute(value, first)
            remove_unused([node])


def _shorten(graph: ir.Graph, names: Names) -> Iterator[Change]:
    """Write a vector of consecutive sizes of one value as one Shape."""
    for node in tuple(graph):
        if node.domain != "" or node.graph is not graph or node.outputs[0].is_graph_output():
            continue
        found: tuple[ir.Value, int, int] | None = None
        if node.op_type == "Unsqueeze":
            found = _one_size(node)
        elif node.op_type == "Concat" and len(node.inputs) > 1:
            found = _adjacent(node)
        if found is None:
            continue
        x, start, end = found
        yield Change(rule="shorten-shape", node=label(node), detail=f"{x.name}[{start}:{end}]")
        new = Builder(node, names).Shape(x, start=start, end=end)
        substitute(node.outputs[0], new)
        remove_unused([node])


def _one_size(node: ir.Node) -> tuple[ir.Value, int, int] | None:
    """``Unsqueeze(Gather(Shape(x), i))`` with a scalar ``i``."""
    gather = node.inputs[0].producer() if node.inputs[0] is not None else None
    if gather is None or gather.op_type != "Gather" or gather.domain != "" or gather.inputs[0] is None:
        return None
    index = constant(gather.inputs[1])
    part = _part(gather.inputs[0])
    if part is None or index is None or index.ndim != 0:
        return None
    x, start, end = part
    at = start + int(index) if index >= 0 else end + int(index)
    return (x, at, at + 1) if start <= at < end else None


def _adjacent(node: ir.Node) -> tuple[ir.Value, int, int] | None:
    """``Concat(Shape(x)[i:j], Shape(x)[j:k])``."""
    parts = [_part(value) for value in node.inputs]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    fits = all(a[0] is b[0] and a[2] == b[1] for a, b in itertools.pairwise(known))
    return (known[0][0], known[0][1], known[-1][2]) if fits else None


def _part(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """Whose sizes, from where to where, a Shape gives."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Shape" or node.domain != "":
        return None
    x = node.inputs[0]
    axes = rank(x)
    if x is None or axes is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", axes)
    first, last, _ = slice(start, end).indices(axes)
    return (x, first, max(first, last))
