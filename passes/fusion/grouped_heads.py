"""Heads that share keys and values read them where they are, instead of a copy for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import constant
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Match, Rule, apply


def _repeated(op: Any, x: Any, axis: Any, shape: Any, target: Any) -> Any:
    return op.Reshape(op.Expand(op.Unsqueeze(x, axis), shape), target)


def _keys_pattern(op: Any, q: Any, x: Any, axis: Any, shape: Any, target: Any) -> Any:
    return op.MatMul(q, op.Transpose(_repeated(op, x, axis, shape, target), perm=(0, 1, 3, 2)))


def _values_pattern(op: Any, q: Any, x: Any, axis: Any, shape: Any, target: Any) -> Any:
    return op.MatMul(q, _repeated(op, x, axis, shape, target))


def _check(root: ir.Node, q: ir.Value, x: ir.Value, axis: ir.Value, **_: Any) -> Match:
    match = Match()
    held, rows, few = constant(axis), shape_of(q), shape_of(x)
    if held is None or [int(a) % 5 for a in held.reshape(-1)] != [2] or few is None or len(few) != 4:
        return match.fail("the new axis is not behind that of the heads", axis)
    node: ir.Node | None = root.inputs[1].producer() if root.inputs[1] is not None else None
    if node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert node is not None
    assert node.inputs[0] is not None
    five, many = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if five is None or many is None or rows is None or len(many) != 4 or len(rows) != 4:
        return match.fail("not four known axes", root)
    if (*five[:2], *five[3:]) != few or None in few or (many[0], *many[2:]) != (few[0], *few[2:]):
        return match.fail("repeats more than heads", node)
    heads, groups = many[1], few[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or rows[1] != heads or heads % groups:
        return match.fail("the numbers of heads are not known", root)
    if rows[0] != few[0]:
        return match.fail("another batch", q)
    return match


def _grouped(op: Builder, q: ir.Value, x: ir.Value, product: ir.Value) -> Any:
    groups, heads = shape_of(x), shape_of(q)
    assert groups is not None
    assert heads is not None
    rows = op.Reshape(q, np.array([0, groups[1], -1, 0], np.int64))
    return op.Reshape(op.MatMul(rows, product), np.array([0, heads[1], -1, 0], np.int64))


def _group_keys(op: Builder, q: ir.Value, x: ir.Value, **_: Any) -> Any:
    return _grouped(op, q, x, op.Transpose(x, perm=[0, 1, 3, 2]))


def _group_values(op: Builder, q: ir.Value, x: ir.Value, **_: Any) -> Any:
    return _grouped(op, q, x, x)


class GroupHeads(GraphPass):
    """Multiply all heads that share keys (or values) with them at once: grouped-query and multi-query attention.

    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023,
    arXiv:2305.13245, section 2.2: query heads in groups, each with one head of keys and values.

    Before: ``q [B, H, T, D] @ transpose(repeat(k) [B, H, S, D])``, with each of the G heads of ``k`` copied H / G times.
    After: ``q`` seen as ``[B, G, H / G * T, D]``, times ``k`` itself, seen as ``[B, H, T, S]`` again: the same sums.
    """

    name: ClassVar[str] = "group-heads"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Group every product."""
        return apply(
            [
                Rule(_keys_pattern, _group_keys, _check, name="grouped-keys"),
                Rule(_values_pattern, _group_values, _check, name="grouped-values"),
            ],
            model,
        )
