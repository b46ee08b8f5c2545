"""Remove positions from the weights of a graph, and let every size in it follow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant
from optkit.inference import infer
from optkit.passes.pruning.dependencies import Dependencies
from optkit.passes.pruning.labels import Product
from optkit.passes.pruning.vectors import edit, scale, settle
from optkit.rewrite import Names, register

# Of a value's axes, which positions stay; axes that stay whole are left out.
Kept = Mapping[int, np.ndarray]


def kept(found: Dependencies, value: ir.Value, removed: Collection[int]) -> dict[int, np.ndarray]:
    """Which positions of the axes of ``value`` stay when the units ``removed`` go."""
    result: dict[int, np.ndarray] = {}
    gone = np.fromiter(removed, np.int64, len(removed))
    for axis, labels in enumerate(found.axes.get(value, ())):
        if not isinstance(labels, np.ndarray):
            continue
        stay = np.isin(found.labels.roots(labels), gone, invert=True)
        if not stay.all():
            result[axis] = np.flatnonzero(stay)
    return result


def _merged(found: Dependencies, value: ir.Value, removed: Collection[int]) -> dict[int, tuple[int, int]]:
    """Of axes that several were merged into, how many positions those of known size had together, and have now."""
    result: dict[int, tuple[int, int]] = {}
    gone = np.fromiter(removed, np.int64, len(removed))
    for axis, labels in enumerate(found.axes.get(value, ())):
        if isinstance(labels, Product):
            known = [found.labels.roots(a) for a in labels.axes if isinstance(a, np.ndarray)]
            old = math.prod(map(len, known))
            new = math.prod(int(np.isin(roots, gone, invert=True).sum()) for roots in known)
            if new != old:
                result[axis] = old, new
    return result


def remove(model: ir.Model, found: Dependencies, removed: Collection[int]) -> list[str]:
    """Cut the units out of the graph; gives the names of the weights that became smaller.

    Args:
        found: The labels of this very graph.
        removed: Units, as ``Group.units`` has them.
    """
    graph, names = model.graph, Names(model)
    _follow(graph, found, removed, names)
    cut: list[str] = []
    for value in found.weights:
        stay = kept(found, value, removed)
        if not stay:
            continue
        assert value.const_value is not None
        array = value.const_value.numpy()
        for axis, positions in stay.items():
            array = np.take(array, positions, axis)
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        value.shape = ir.Shape(array.shape)
        cut.append(str(value.name))
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    infer(model)
    return cut


def remove_from_copy(model: ir.Model, found: Dependencies, removed: Collection[int]) -> ir.Model:
    """A copy of the graph without the units."""
    other = model.clone()
    twins = dict(zip(_values(model.graph), _values(other.graph), strict=True))
    moved = Dependencies(
        labels=found.labels,
        axes={twins[v]: a for v, a in found.axes.items() if v in twins},
        weights=[twins[w] for w in found.weights],
    )
    remove(other, moved, removed)
    return other


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)]


def _follow(graph: ir.Graph, found: Dependencies, removed: Collection[int], names: Names) -> None:
    """Attributes and constants that name sizes; the shapes are those from before."""
    for node in tuple(graph):
        if node.domain != "":
            continue
        if node.op_type == "Conv":
            groups, weight = attribute(node, "group", 1), node.inputs[1]
            stay = kept(found, node.inputs[0], removed).get(1) if node.inputs[0] is not None else None
            channels = found.axes[node.inputs[0]][1] if node.inputs[0] in found.axes else None
            if (
                stay is not None
                and isinstance(channels, np.ndarray)
                and groups == len(channels) > 1
                and weight is not None
            ):
                node.attributes["group"] = ir.AttrInt64("group", len(stay))
        elif node.op_type in ("Reshape", "Expand"):
            stay_out = kept(found, node.outputs[0], removed)
            sizes = {axis: len(positions) for axis, positions in stay_out.items()}
            if node.op_type == "Expand":
                given = constant(node.inputs[1])
                rank = len(found.axes[node.outputs[0]])
                missing = rank - (given.size if given is not None else rank)
                sizes = {axis - missing: n for axis, n in sizes.items() if axis >= missing}
            elif (shape := node.outputs[0].shape) is not None:
                known = {axis: d for axis, d in enumerate(shape) if isinstance(d, int)}
                settle(node, 1, known | sizes, sizes, lambda x: bool(kept(found, x, removed)), names)
            if sizes:
                edit(node, 1, sizes, names)
            if node.op_type == "Reshape":
                for axis, (old, new) in _merged(found, node.outputs[0], removed).items():
                    scale(node, 1, axis, old, new, lambda x: bool(_merged(found, x, removed)), names)
        elif node.op_type == "Split":
            _split(graph, node, found, removed, names)
        elif node.op_type == "Slice":
            _slice(node, found, removed, names)
        elif node.op_type == "Resize" and len(node.inputs) > 3 and node.inputs[3] is not None:
            stay_out = kept(found, node.outputs[0], removed)
            edit(node, 3, {axis: len(p) for axis, p in stay_out.items()}, names)


def _split(
    graph: ir.Graph, node: ir.Node, found: Dependencies, removed: Collection[int], names: Names
) -> None:
    x = node.inputs[0]
    assert x is not None
    axis = node.attributes.get_int("axis", 0) % len(found.axes[x])
    if axis not in kept(found, x, removed):
        return
    sizes = []
    for output in node.outputs:
        labels = found.axes[output][axis]
        assert isinstance(labels, np.ndarray)
        stay = kept(found, output, removed).get(axis)
        sizes.append(len(labels) if stay is None else len(stay))
    vector = register(graph, names.new(f"{node.name}/sizes"), np.asarray(sizes, np.int64))
    node.attributes.pop("num_outputs", None)
    node.resize_inputs(2)
    node.replace_input_with(1, vector)


def _slice(node: ir.Node, found: Dependencies, removed: Collection[int], names: Names) -> None:
    x = node.inputs[0]
    assert x is not None
    stay, given = kept(found, x, removed), [constant(v) if v is not None else None for v in node.inputs[1:4]]
    starts, ends = given[0], given[1]
    if not stay or starts is None or ends is None:
        return
    axes = given[2] if len(given) > 2 and given[2] is not None else np.arange(len(starts))
    new_starts, new_ends = starts.copy(), ends.copy()
    for i, axis in enumerate(axes.tolist()):
        labels = found.axes[x][axis]
        positions = stay.get(axis % len(found.axes[x]))
        if not isinstance(labels, np.ndarray) or positions is None:
            continue
        first, last, _ = slice(int(starts[i]), int(ends[i])).indices(len(labels))
        new_starts[i] = int(np.searchsorted(positions, first))
        new_ends[i] = int(np.searchsorted(positions, last))
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(1, register(graph, names.new(f"{node.name}/starts"), new_starts))
    node.replace_input_with(2, register(graph, names.new(f"{node.name}/ends"), new_ends))
