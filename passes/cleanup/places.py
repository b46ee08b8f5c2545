"""What is written to the places where a mask holds is chosen at every place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, graphs, rank
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove_unused, replaceable, substitute

# What gives an element for an element, and fails for none.
_EACH = frozenset({"Abs", "Add", "Cast", "Mul", "Neg", "Not", "Sub"})

# A value as it is at every place instead of at those of the mask, made on demand.
_Spread = Callable[[Builder], ir.Value]


class PlacesToWhere(GraphPass):
    """Replace writing at the places that a mask names by a choice between two values.

    Before: ``x[mask] = f(z[mask])``, as exporters write it: ``ScatterND(x, p, f(GatherND(z, p)))`` with
    ``p = Transpose(NonZero(mask))``. After: ``Where(mask, f(z), x)``. ``f`` is arithmetic with constants and lookups in
    tables, whose index is 0 where the mask does not hold; or a constant. No size depends on data
    then, which not all runtimes can do, and some only for masks that hold somewhere.
    """

    name: ClassVar[str] = "places-to-where"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every write."""
        names = Names(model)
        return [change for graph in graphs(model) for change in _choose(graph, names)]


def _choose(graph: ir.Graph, names: Names) -> Iterator[Change]:
    for node in tuple(graph):
        if node.op_type != "ScatterND" or node.domain != "" or attribute(node, "reduction", "none") != "none":
            continue
        data, places, updates = node.inputs
        mask = _mask(places)
        if data is None or places is None or updates is None or mask is None or not _covers(data, mask):
            continue
        size, count = len(shape_of(mask) or ()), rank(data)
        spread = _spread(updates, mask)
        if spread is None or count is None:
            continue
        op = Builder(node, names)
        held = _held(op, mask, count)
        above = _above([places, updates])
        chosen = _chosen(op, held, spread(op), data)
        assert replaceable(node.outputs[0], chosen)
        substitute(node.outputs[0], chosen)
        remove_unused([node, *above])
        yield Change(rule="places-to-where", node=label(node), detail=f"{size} axes")


def _held(op: Builder, mask: ir.Value, axes: int) -> ir.Value:
    """The mask beside values with so many axes."""
    held = mask if mask.dtype == ir.DataType.BOOL else op.Cast(mask, to=ir.DataType.BOOL)
    size = rank(mask)
    assert size is not None
    return held if size == axes else op.Unsqueeze(held, np.arange(size, axes))


def _chosen(op: Builder, held: ir.Value, there: ir.Value, elsewhere: ir.Value) -> ir.Value:
    if elsewhere.dtype != ir.DataType.BOOL:
        return op.Where(held, there, elsewhere)
    # ONNX Runtime chooses between numbers alone.
    number = constant(there)
    if number is None:
        return op.Or(op.And(held, there), op.And(op.Not(held), elsewhere))
    return op.Or(held, elsewhere) if number else op.And(op.Not(held), elsewhere)


def _mask(places: ir.Value | None) -> ir.Value | None:
    """What ``places``, ``[n, axes]``, are the places of, in order; None for others."""
    node = None if places is None else places.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Concat":
        columns = [_column(v) for v in node.inputs]
        first = columns[0]
        if first is None or attribute(node, "axis") not in (1, -1):
            return None
        whole = first[0]
        if columns != [(whole, k) for k in range(len(columns))] or (shape_of(whole) or ())[1:] != (
            len(columns),
        ):
            return None
        return _mask(whole)
    source = node.inputs[0] if node.inputs else None
    found = source.producer() if source is not None else None
    if node.op_type != "Transpose" or found is None or found.op_type != "NonZero" or found.domain != "":
        return None
    mask = found.inputs[0]
    shape = shape_of(mask)
    return mask if shape is not None and None not in shape else None


def _column(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The value ``[n, columns]`` and the index that ``value``, ``[n, 1]``, is a column of."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Split" or node.domain != "" or node.inputs[0] is None:
        return None
    sizes = [shape_of(o) for o in node.outputs]
    if attribute(node, "axis", 0) not in (1, -1) or any(s is None or s[1:] != (1,) for s in sizes):
        return None
    return node.inputs[0], next(i for i, o in enumerate(node.outputs) if o is value)


def _covers(value: ir.Value, mask: ir.Value) -> bool:
    """Whether the first axes of ``value`` are those of the mask."""
    shape, leading = shape_of(value), shape_of(mask)
    return shape is not None and leading is not None and shape[: len(leading)] == leading


def _spread(value: ir.Value, mask: ir.Value) -> _Spread | None:
    """What ``value``, whose first axis counts the places of ``mask``, is at every place; None where that is not known."""
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Expand":
        number = constant(node.inputs[0])
        return None if number is None or number.size != 1 else lambda _: _scalar(node.inputs[0], number, _)
    if node.op_type == "GatherND":
        source = node.inputs[0]
        if source is None or attribute(node, "batch_dims", 0) != 0 or not _covers(source, mask):
            return None
        return (lambda _: source) if _mask(node.inputs[1]) is mask else None
    if node.op_type == "Gather":
        return _looked_up(node, mask)
    return _computed(node, mask) if node.op_type in _EACH else None


def _scalar(value: ir.Value | None, number: np.ndarray, op: Builder) -> ir.Value:
    return value if value is not None and number.ndim == 0 else op.constant(number.reshape(()))


def _looked_up(node: ir.Node, mask: ir.Value) -> _Spread | None:
    table, index = node.inputs
    if table is None or index is None or not table.is_initializer() or attribute(node, "axis", 0) != 0:
        return None
    found, axes, size = _spread(index, mask), rank(index), rank(mask)
    if found is None or axes is None or size is None or index.dtype is None:
        return None
    zero = np.asarray(0, index.dtype.numpy())

    def made(op: Builder) -> ir.Value:
        # Beside the mask there may be any numbers; where it holds, one outside of the table stays an error.
        return op.Gather(table, op.Where(_held(op, mask, axes - 1 + size), found(op), zero), axis=0)

    return made


def _computed(node: ir.Node, mask: ir.Value) -> _Spread | None:
    parts: list[_Spread] = []
    ranks = set()
    for value in node.inputs:
        number = constant(value)
        if number is not None:
            if number.size != 1:
                return None
            parts.append(lambda op, v=value, n=number: _scalar(v, n, op))  # type: ignore[misc]
            continue
        found = None if value is None else _spread(value, mask)
        if found is None or value is None or rank(value) is None:
            return None
        ranks.add(rank(value))
        parts.append(found)
    if len(ranks) != 1:
        return None
    attributes = {k: a.value for k, a in node.attributes.items()}
    return lambda op: op.node(node.op_type, [part(op) for part in parts], attributes)[0]


def _above(values: Sequence[ir.Value]) -> list[ir.Node]:
    """What gives ``values``, as far up as the masks."""
    found: dict[ir.Node, None] = {}
    left = [v.producer() for v in values]
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        found[node] = None
        if node.op_type != "NonZero":
            left += [v.producer() for v in node.inputs if v is not None]
    return list(found)
