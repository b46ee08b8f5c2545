"""Attention in parts: a head at a time, and a run of queries at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.dims import shape_of
from optkit.graph import attribute, graphs, rank, scalar, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, substitute

# Beyond, parts are so many that the program costs more than they save.
_MOST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """``softmax(scale * (q @ k) + mask) @ v``, every step as the graph has it.

    Attributes:
        scores: The product of ``q [B, H, T, D]`` and ``k [B, H, D, S]``.
        steps: What lies between it and the product with ``v``: scales, masks, the Softmax.
        product: With ``v [B, H, S, E]``.
    """

    scores: ir.Node
    steps: tuple[ir.Node, ...]
    product: ir.Node


def attentions(graph: ir.Graph) -> list[Attention]:
    """All of a graph; of none are the values between the steps read elsewhere."""
    found = (_attention(n) for n in graph if n.op_type == "MatMul" and n.domain == "")
    return [a for a in found if a is not None]


def _attention(product: ir.Node) -> Attention | None:
    steps: list[ir.Node] = []
    value, seen = product.inputs[0], False
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "" or node.graph is not product.graph or rank(value) != 4:
            return None
        if len(users(value)) != 1 or value.is_graph_output():
            return None
        if node.op_type == "MatMul":
            shapes = [shape_of(v) for v in (*node.inputs, *product.inputs)]
            alike = all(s is not None and len(s) == 4 for s in shapes)
            return (
                Attention(scores=node, steps=tuple(steps[::-1]), product=product) if seen and alike else None
            )
        if node.op_type == "Softmax" and not seen and attribute(node, "axis", -1) in (-1, 3):
            seen, value = True, node.inputs[0]
        elif node.op_type in ("Add", "Mul", "Div") and seen:
            value = _carried(node)
        else:
            return None
        steps.append(node)
    return None


def _carried(node: ir.Node) -> ir.Value | None:
    """That input of a step which comes from the scores: the other is a number, or a mask that broadcasts."""
    first, second = node.inputs
    if scalar(second) is not None:
        return first
    if node.op_type != "Div" and scalar(first) is not None:
        return second
    if node.op_type != "Add":
        return None
    for one, other in ((first, second), (second, first)):
        behind = one.producer() if one is not None else None
        if behind is not None and behind.op_type in ("MatMul", "Mul", "Div", "Add") and rank(one) == 4:
            shapes = shape_of(one), shape_of(other)
            if shapes[1] is not None and len(shapes[1]) <= 4 and shapes[0] != shapes[1]:
                return one
    return None


def split(found: Attention, axis: int, parts: Sequence[int], names: Names) -> None:
    """Compute ``found`` in ``parts`` along an axis of the scores: 1 for heads, 2 for queries."""
    op = Builder(found.product, names)
    sizes = np.asarray(parts, np.int64)

    def cut(value: ir.Value | None, along: int) -> Sequence[ir.Value | None]:
        dims = shape_of(value)
        place = along if dims is None else along - (4 - len(dims))
        if value is None or dims is None or place < 0 or dims[place] == 1 or scalar(value) is not None:
            return [value] * len(parts)
        return op.node("Split", (value, sizes), {"axis": place}, outputs=len(parts))

    query, key = found.scores.inputs
    queries, keys = cut(query, axis), cut(key, axis) if axis == 1 else [key] * len(parts)
    values = cut(found.product.inputs[1], axis) if axis == 1 else [found.product.inputs[1]] * len(parts)
    carried = [op.MatMul(q, k) for q, k in zip(queries, keys, strict=True)]
    before = found.scores.outputs[0]
    for step in found.steps:
        others = [[None] * len(parts) if v is before else cut(v, axis) for v in step.inputs]
        attributes = {a.name: a for a in step.attributes.values()}
        for i, value in enumerate(carried):
            inputs = [
                value if v is before else other[i] for v, other in zip(step.inputs, others, strict=True)
            ]
            carried[i] = op.node(step.op_type, inputs, attributes)[0]
        before = step.outputs[0]
    results = [op.MatMul(p, v) for p, v in zip(carried, values, strict=True)]
    substitute(found.product.outputs[0], op.Concat(*results, axis=axis))
    for old in (found.product, *found.steps[::-1], found.scores):
        assert old.graph is not None
        old.graph.remove(old, safe=True)


def _divides(found: Attention, axis: int, size: int) -> bool:
    """Whether all that is split along ``axis`` of the scores is known to have ``size`` there, or 1 and serves all parts."""
    before = found.scores.outputs[0]
    others = [found.scores.inputs[0]]
    for step in found.steps:
        others += [v for v in step.inputs if v is not before and v is not None and scalar(v) is None]
        before = step.outputs[0]
    if axis == 1:
        whole = [shape_of(v) for v in (found.scores.inputs[1], found.product.inputs[1])]
        if any(s is None or s[1] != size for s in whole):
            return False
    for value in others:
        dims = shape_of(value)
        if dims is None or len(dims) > 4:
            return False
        place = axis - (4 - len(dims))
        if place >= 0 and dims[place] not in (1, size):
            return False
    query = shape_of(found.scores.inputs[0])
    return query is not None and query[axis] == size


class SplitHeads(GraphPass):
    """Compute attention a head at a time.

    Before: ``softmax(q @ k * scale + mask) @ v`` over ``[B, H, T, S]`` scores.
    After: the same for each of the ``H`` heads, and one Concat; not a number changes.
    Only where the target computes best so: "Deploying Transformers on the Apple Neural Engine" (Apple Machine Learning
    Research, June 2022), principle 2: smaller tensors are more often in the L2 cache, and heads spread over cores.

    Attributes:
        most: Attention with more heads stays whole.
    """

    name: ClassVar[str] = "split-heads"

    most: int = Field(default=32, ge=2)

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Split every attention of several heads, where the target wants it."""
        if not context.target.convolves:
            return []
        changes, names = [], Names(model)
        for graph in graphs(model):
            for found in attentions(graph):
                shape = shape_of(found.scores.inputs[0])
                count = shape[1] if shape is not None else None
                if isinstance(count, int) and 1 < count <= self.most and _divides(found, 1, count):
                    split(found, 1, [1] * count, names)
                    changes.append(Change(rule=self.name, node=str(found.product.name)))
        return changes


class ChunkAttention(GraphPass):
    """Compute attention for a run of queries at a time.

    Before: scores ``[B, H, T, S]`` at once. After: ``T / rows`` times scores ``[B, H, rows, S]``, and one Concat; not a
    number changes, as each query has a softmax of its own. Only where the target computes best so: Apple,
    ml-stable-diffusion, ``attention.py``, ``split_einsum_v2`` (chunks of 512 queries).

    Attributes:
        rows: Queries at a time.
    """

    name: ClassVar[str] = "chunk-attention"

    rows: int = Field(default=512, ge=1)

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Split every attention with a fixed number of queries beyond ``rows``, where the target wants it."""
        if not context.target.convolves:
            return []
        changes, names = [], Names(model)
        for graph in graphs(model):
            for found in attentions(graph):
                shape = shape_of(found.scores.inputs[0])
                queries = shape[2] if shape is not None else None
                few = isinstance(queries, int) and self.rows < queries <= _MOST * self.rows
                if isinstance(queries, int) and few and _divides(found, 2, queries):
                    whole, left = divmod(queries, self.rows)
                    split(found, 2, [self.rows] * whole + [left] * (left > 0), names)
                    changes.append(Change(rule=self.name, node=str(found.product.name)))
        return changes
