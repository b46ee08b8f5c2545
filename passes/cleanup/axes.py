"""Transposes of many axes become transposes of few."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, graphs, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove_unused, substitute

# What every runtime moves, and Core ML takes.
_MOST = 5

_Dims = Sequence[int | str | None]
# Axes in their order, those of a group next to each other, and where each group goes.
_Step = tuple[list[list[int]], list[int]]


class MergeAxes(GraphPass):
    """Merge axes that a Transpose of more than five axes keeps together, where Reshapes surround it.

    Before: ``[N, 2, 4, 2, 4, C]`` to ``[N, 2, 2, 4, 4, C]``, as window attention and patches are cut out and put together.
    After: ``[2 N, 4, 2, 4 C]`` to ``[2 N, 2, 4, 4 C]``, or several such where too many axes part. The same elements in the
    same order, so exact. A Transpose that is written as an Einsum becomes one first.
    """

    name: ClassVar[str] = "merge-axes"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Merge around every Transpose."""
        names, changes = Names(model), []
        for graph in graphs(model):
            for node in tuple(graph):
                place = label(node)
                if node.domain == "" and node.graph is graph and _merge(node, names):
                    changes.append(Change(rule="merge-axes", node=place))
        return changes


def _merge(node: ir.Node, names: Names) -> bool:
    order = _order(node)
    x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
    dims, before = shape_of(x), x.producer() if x is not None else None
    if order is None or x is None or dims is None or before is None or len(dims) <= _MOST:
        return False
    if before.op_type != "Reshape" or len(users(x)) > 1 or x.is_graph_output() or y.is_graph_output():
        return False
    if 0 in dims or sum(not isinstance(d, int) for d in dims) > 1:
        return False
    readers = users(y)
    shapes = [_target(reader, y, [dims[i] for i in order]) for reader in readers]
    if not shapes or any(shape is None for shape in shapes):
        return False
    op = Builder(node, names)
    value = before.inputs[0]
    for groups, way in _steps(order):
        sizes = np.array([_size([dims[i] for i in group]) for group in groups], np.int64)
        value = op.Transpose(op.Reshape(value, sizes), perm=way)
    for reader, shape in zip(readers, shapes, strict=True):
        substitute(reader.outputs[0], Builder(reader, names).Reshape(value, shape))
    remove_unused([*readers, node, before])
    return True


def _order(node: ir.Node) -> list[int] | None:
    """Where each axis of the output of a Transpose, or of an Einsum that is one, comes from."""
    if node.op_type == "Transpose":
        order = attribute(node, "perm", None)
        return None if order is None else [int(i) for i in order]  # type: ignore[attr-defined]
    if node.op_type != "Einsum" or len(node.inputs) != 1:
        return None
    source, arrow, target = str(attribute(node, "equation", "")).replace(" ", "").partition("->")
    if (
        not arrow
        or not source.isalpha()
        or len(set(source)) < len(source)
        or sorted(source) != sorted(target)
    ):
        return None
    return [source.index(letter) for letter in target]


def _steps(order: Sequence[int]) -> Iterator[_Step]:
    """One step where few enough groups stay together; else one for each group that moves in front of others."""
    groups: list[list[int]] = []
    for axis in order:
        if groups and groups[-1][-1] + 1 == axis:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    if len(groups) <= _MOST:
        here = sorted(groups)
        yield here, [here.index(group) for group in groups]
        return
    now = sorted(groups)
    for place, group in enumerate(groups):
        at = now.index(group)
        if at == place:
            continue
        parts = [now[:place], now[place:at], [group], now[at + 1 :]]
        flat = [[axis for g in part for axis in g] for part in parts]
        kept = [i for i in range(4) if flat[i]]
        way = [i for i in (0, 2, 1, 3) if i in kept]
        yield [flat[i] for i in kept], [kept.index(i) for i in way]
        now = [g for part in (parts[0], parts[2], parts[1], parts[3]) for g in part]


def _size(dims: _Dims) -> int:
    known = [d for d in dims if isinstance(d, int)]
    return math.prod(known) if len(known) == len(dims) else -1


def _target(reader: ir.Node, value: ir.Value, dims: _Dims) -> np.ndarray | None:
    """The shape that a Reshape of ``value`` gives, in which no size is copied from an axis of it."""
    if reader.op_type != "Reshape" or reader.domain != "" or reader.inputs[0] is not value:
        return None
    given = constant(reader.inputs[1])
    if given is None:
        return None
    if attribute(reader, "allowzero", 0) and 0 in given:
        return None
    sizes = [_size([dims[i]]) if size == 0 else int(size) for i, size in enumerate(given)]
    return np.array(sizes, np.int64) if sizes.count(-1) <= 1 else None
