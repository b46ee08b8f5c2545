"""Products whose columns go apart, part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import constant, graphs, made_for_one, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove_unused, substitute


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projection:
    """A product with a constant matrix, on its way to a Split.

    Attributes:
        product: The MatMul.
        bias: The Add behind it, where there is one.
        forms: The Reshape and the Transpose behind that, where there are such.
        split: What divides the columns.
        sizes: Columns of each part.
        place: The axis that a Reshape makes of the columns, where it has one place in each part; else None.
    """

    product: ir.Node
    bias: ir.Node | None
    forms: tuple[ir.Node, ...]
    split: ir.Node
    sizes: tuple[int, ...]
    place: int | None

    @property
    def axes(self) -> int:
        """Of the tensor that is divided."""
        return len(shape_of(self.split.inputs[0]) or ())


class SplitProjections(GraphPass):
    """Compute queries, keys and values that one product gives in a product each.

    Before: ``Split(Add(MatMul(x, w), b))`` along the columns, with or without a Reshape to ``[..., 3, H, D]`` and a Transpose in
    between. After: ``Add(MatMul(x, w_i), b_i)`` in the form of each part. The columns are the same numbers as before.
    TensorRT takes such products apart itself, and scales of columns get lost with it: it multiplies in float16 what was to be
    multiplied in 8 bits (TensorRT-RTX 1.7.1, by its plans). An axis that has one place in each part, and that nothing but a
    Squeeze reads, is left out from the start: the Neural Engine works on four axes ("Deploying Transformers on the Apple Neural
    Engine", Apple Machine Learning Research, June 2022, principle 1).

    Attributes:
        wide: Only where what lies in between has more axes than the target takes.
    """

    name: ClassVar[str] = "split-projections"
    wide: bool = False

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Take every such product apart, or those with too many axes behind them."""
        names, changes = Names(model), list[Change]()
        most = context.target.axes if self.wide else 0
        for graph in graphs(model):
            for split in [n for n in graph if n.op_type == "Split" and n.domain == ""]:
                found = _projection(split)
                if found is not None and most is not None and found.axes > most:
                    detail = f"{len(found.sizes)} products of {', '.join(map(str, found.sizes))} columns"
                    changes.append(Change(rule=self.name, node=label(found.product), detail=detail))
                    _apart(found, names)
        return changes


def _projection(split: ir.Node) -> _Projection | None:
    shape = shape_of(split.inputs[0])
    if shape is None:
        return None
    axis = split.attributes.get_int("axis", 0) % len(shape)
    sizes = [d for v in split.outputs if (s := shape_of(v)) is not None and isinstance(d := s[axis], int)]
    if len(sizes) != len(split.outputs) or len(sizes) < 2:
        return None
    node, forms, place = _before(split), list[ir.Node](), None
    if node is not None and node.op_type == "Transpose" and (order := node.attributes.get_ints("perm", ())):
        forms.append(node)
        axis, node = order[axis], _before(node)
    if node is not None and node.op_type == "Reshape":
        columns = _columns(node, axis)
        if columns is None:
            return None
        forms.append(node)
        place = axis if set(sizes) == {1} else None
        sizes, node = [size * columns for size in sizes], _before(node)
    elif forms or axis != len(shape) - 1:
        return None
    bias = None
    if node is not None and node.op_type == "Add":
        bias = node
        held = [v for v in node.inputs if (c := constant(v)) is not None and c.shape == (sum(sizes),)]
        node = next((p for v in node.inputs if v not in held and (p := made_for_one(v)) is not None), None)
        if len(held) != 1:
            return None
    if node is None or node.op_type != "MatMul" or node.graph is not split.graph:
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or weight.shape[1] != sum(sizes):
        return None
    return _Projection(
        product=node, bias=bias, forms=tuple(forms[::-1]), split=split, sizes=tuple(sizes), place=place
    )


def _columns(reshape: ir.Node, axis: int) -> int | None:
    """How many columns lie in one place of ``axis``, where it is the first that a Reshape makes of the last axis."""
    before, after = shape_of(reshape.inputs[0]), shape_of(reshape.outputs[0])
    target = constant(reshape.inputs[1])
    if (
        before is None
        or after is None
        or target is None
        or len(before) - 1 != axis
        or before[:-1] != after[:axis]
    ):
        return None
    rest = [d for d in after[axis:] if isinstance(d, int)]
    whole = isinstance(before[-1], int) and len(rest) == len(after) - axis and -1 not in target[axis:]
    return math.prod(rest[1:]) if whole else None


def _before(node: ir.Node) -> ir.Node | None:
    return made_for_one(node.inputs[0])


def _apart(found: _Projection, names: Names) -> None:
    op = Builder(found.product, names)
    weight, start = constant(found.product.inputs[1]), 0
    assert weight is not None
    for size, out in zip(found.sizes, found.split.outputs, strict=True):
        columns = slice(start, start + size)
        value = op.MatMul(found.product.inputs[0], np.ascontiguousarray(weight[:, columns]))
        if found.bias is not None:
            bias = next(c for v in found.bias.inputs if (c := constant(v)) is not None)
            value = op.Add(value, bias[columns])
        squeezes = _squeezes(found, out)
        for form in found.forms:
            if form.op_type == "Transpose":
                order = list(form.attributes.get_ints("perm") or ())
                if squeezes and found.place is not None:
                    order = [p - (p > found.place) for p in order if p != found.place]
                value = op.Transpose(value, perm=order)
                continue
            before, target = shape_of(form.inputs[0]), constant(form.inputs[1])
            assert before is not None and target is not None
            target = target.copy()
            target[len(before) - 1] = target[len(before) - 1] * size // sum(found.sizes)
            value = op.Reshape(
                value, np.delete(target, found.place) if squeezes and found.place is not None else target
            )
        for after in squeezes or [out]:
            substitute(after, value)
        start += size
    readers = {node for out in found.split.outputs for node in users(out)}
    remove_unused(
        (*readers, found.split, *found.forms[::-1], *([found.bias] if found.bias else []), found.product)
    )


def _squeezes(found: _Projection, out: ir.Value) -> list[ir.Value]:
    """What Squeezes make of a part without the axis that has one place, where nothing else reads it."""
    axis = found.split.attributes.get_int("axis", 0) % found.axes
    readers = users(out)
    alone = (
        found.place is not None
        and not out.is_graph_output()
        and all(_takes_away(node, axis) for node in readers)
    )
    return [node.outputs[0] for node in readers] if alone else []


def _takes_away(node: ir.Node, axis: int) -> bool:
    size = len(shape_of(node.inputs[0]) or ())
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return node.op_type == "Squeeze" and axes is not None and (axes.reshape(-1) % size).tolist() == [axis]
