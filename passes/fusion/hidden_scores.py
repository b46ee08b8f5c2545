"""Scores of keys that are not seen, put in their place by hand, become a mask that is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, rank, scalar, users
from optkit.masks import HIDDEN, number
from optkit.rewrite import Builder, Match, Rule

# So low that adding a score does not change it, in formats whose range is that of float32, and that kernels can multiply it with
# log2(e): a query that sees no key gives all the same weight, as where all its scores are one number.
_LOW = -1e38
_WIDE = frozenset({ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """``scores`` where all of ``seen`` are as said with them, else ``low``."""

    scores: ir.Value
    seen: tuple[tuple[ir.Value, bool], ...]
    low: float


def is_product(value: ir.Value | None) -> bool:
    """Whether ``value`` is a matrix product, perhaps scaled."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Identity" and node.domain == "":
        return is_product(node.inputs[0])
    if node is not None and node.op_type in ("Mul", "Div") and node.domain == "":
        operands = node.inputs if node.op_type == "Mul" else node.inputs[:1]
        return any(is_product(v) for v in operands) and any(scalar(v) is not None for v in node.inputs)
    return node is not None and node.op_type == "MatMul" and node.domain == ""


def _choice(where: ir.Node) -> _Choice | str:
    """What ``where`` and others right above it choose between, or why that is no mask."""
    condition, *chosen = where.inputs
    numbers = [number(v) for v in chosen]
    at = next((i for i in (0, 1) if numbers[i] is not None), None)
    low, scores = (numbers[at], chosen[1 - at]) if at is not None else (None, None)
    if at is None or low is None or scores is None or condition is None:
        return "not a choice between scores and a number"
    if low > HIDDEN:
        return f"{low:g} is not so low that no weight is left"
    seen = ((condition, at == 1),)
    above = scores.producer()
    if above is not None and above.op_type == "Where" and above.domain == "":
        inner = _choice(above)
        if isinstance(inner, str):
            return inner
        if inner.low != low:
            return f"keys are hidden with {inner.low:g} and with {low:g}"
        return _Choice(scores=inner.scores, seen=(*inner.seen, *seen), low=low)
    widened = above is not None and above.op_type == "Cast" and above.domain == ""
    if not is_product(above.inputs[0] if above is not None and widened else scores):
        return "not scores of an attention"
    return _Choice(scores=scores, seen=seen, low=low)


def _check(root: ir.Node, **_: ir.Value) -> Match:
    match, readers = Match(), users(root.outputs[0])
    if not readers or root.outputs[0].is_graph_output() or any(n.op_type != "Softmax" for n in readers):
        return match.fail("not read by a Softmax alone", root)
    axes = rank(root.outputs[0])
    if any(attribute(n, "axis", -1) not in (-1, (axes or 0) - 1) for n in readers):
        return match.fail("the Softmax is not over the last axis", readers[0])
    found = _choice(root)
    if isinstance(found, str):
        return match.fail(found, root)
    if found.low != -np.inf and found.scores.dtype not in _WIDE:
        return match.fail("queries that see no key would not give all of them the same weight", root)
    return match


def _rewrite(op: Builder, root: ir.Node, **_: ir.Value) -> Any:
    found = _choice(root)
    assert not isinstance(found, str) and found.scores.dtype is not None
    kind = found.scores.dtype.numpy()
    zero, low = np.zeros((), kind), np.array(_LOW if np.isfinite(found.low) else -np.inf, kind)
    (condition, holds), *others = found.seen
    if not others:
        return op.Add(found.scores, op.Where(condition, *((zero, low) if holds else (low, zero))))
    seen = condition if holds else op.Not(condition)
    for condition, holds in others:
        seen = op.And(seen, condition if holds else op.Not(condition))
    return op.Add(found.scores, op.Where(seen, zero, low))


RULE = Rule(lambda op, condition, a, b: op.Where(condition, a, b), _rewrite, _check, name="hidden-scores")
"""``Where(hidden, low, scores)`` in front of a Softmax, in either order and one in the other, becomes ``scores + mask``."""
