"""Attention as graphs spell it: products with keys and values, a Softmax between them, heads perhaps in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import scalar

DEPTHS = (16, 32, 64, 128)


def pattern(scaled: str, masked: bool, *, cast: str) -> Callable[..., Any]:
    """Attention as graphs spell it.

    Heads that share keys are seen as queries of one head, as ``group-heads`` writes it, or all have their own.

    Args:
        scaled: ``Mul``, ``Div``, or nothing.
        masked: Whether something is added.
        cast: What is widened for the Softmax: the ``scores`` or the ``masked`` scores, or nothing.
    """

    def build(op: Any, q: Any, k: Any, v: Any, a: Any, b: Any, c: Any, d: Any, scale: Any, mask: Any) -> Any:
        scores = op.any(op.MatMul(q, k), op.Reshape(op.MatMul(op.Reshape(q, a), k), b))
        if scaled:
            scores = getattr(op, scaled)(scores, scale)
        if cast == ("scores" if masked else "masked"):
            scores = op.Cast(scores)
        if masked:
            scores = op.Add(scores, mask)
        if cast == ("masked" if masked else "scores"):
            scores = op.Cast(scores)
        shares = op.Softmax(scores)
        shares = op.Cast(shares) if cast else shares
        return op.any(op.MatMul(shares, v), op.Reshape(op.MatMul(op.Reshape(shares, c), v), d))

    if scaled and masked:
        return build
    if scaled:
        return lambda op, q, k, v, a, b, c, d, scale: build(op, q, k, v, a, b, c, d, scale, None)
    if masked:
        return lambda op, q, k, v, a, b, c, d, mask: build(op, q, k, v, a, b, c, d, None, mask)
    return lambda op, q, k, v, a, b, c, d: build(op, q, k, v, a, b, c, d, None, None)


def above(root: ir.Node, k: ir.Value) -> list[ir.Node]:
    """The nodes from the product with the values up to that with the keys ``k``, that included."""
    found, value = [root], root.inputs[0]
    if root.op_type == "Reshape":
        product = value.producer() if value is not None else None
        assert product is not None
        found, value = [root, product], product.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        found.append(node)
        if node.op_type == "MatMul":
            break
        value = next((v for v in node.inputs if _leads(v, k)), None)
    return found


def _leads(value: ir.Value | None, k: ir.Value, most: int = 8) -> bool:
    """Whether the product with ``k`` lies close above."""
    node = value.producer() if value is not None else None
    if node is None or not most:
        return False
    if node.op_type == "MatMul":
        return node.inputs[1] is k
    return node.op_type in ("Add", "Mul", "Div", "Cast", "Softmax", "Reshape") and any(
        _leads(v, k, most - 1) for v in node.inputs
    )


def heads_of(root: ir.Node, q: ir.Value, k: ir.Value) -> tuple[Dim | None, ...] | None:
    """The shape of the queries as heads; where they become heads and groups of heads in one step, the scores tell it."""
    shape = shape_of(q)
    if shape is None or len(shape) == 4:
        return shape
    nodes = above(root, k)
    if nodes[-1].op_type != "MatMul" or nodes[-2].op_type != "Reshape":
        return None
    rows, scores = shape_of(nodes[-1].inputs[0]), shape_of(nodes[-2].outputs[0])
    if rows is None or scores is None or len(rows) != 4 or len(scores) != 4 or shape[0] != scores[0]:
        return None
    return (*scores[:3], rows[3])


def group(root: ir.Node, heads: tuple[Dim | None, ...], k: ir.Value, v: ir.Value) -> int | str:
    """How many heads share keys and values, or why that is not known.

    Args:
        root: The last node of the pattern.
        heads: Of the queries, ``[batch, heads, queries, depth]``.
        k: ``[batch, groups, depth, keys]``.
        v: ``[batch, groups, keys, depth]``.
    """
    turned, values = shape_of(k), shape_of(v)
    if (
        turned is None
        or values is None
        or len(turned) != 4
        or turned[:2] != values[:2]
        or turned[0] != heads[0]
    ):
        return "keys, values and queries are not known to have the same batch and heads"
    nodes = above(root, k)
    reshaped = [n for n in nodes if n.op_type == "Reshape"]
    if not reshaped:
        return 1 if None not in turned[:2] and turned[1] == heads[1] else "not known to have as many heads"
    many, few = heads[1], turned[1]
    if not isinstance(many, int) or not isinstance(few, int) or many % few:
        return "the numbers of heads are not known"
    inner = nodes[-1].inputs[0]
    product = shape_of(nodes[1].outputs[0])
    scores = shape_of(nodes[-2].outputs[0])
    # Of four axes, the first, the second and the last are kept: then it is heads and queries that are seen as one.
    whole = [heads, (heads[0], many, heads[2], None)]
    parts = [(heads[0], few, None, heads[3])] * 2
    if len(reshaped) != 3 or nodes[-2].op_type != "Reshape":
        return "heads are grouped in another way"
    for found, wanted in zip(
        (shape_of(root.outputs[0]), scores, shape_of(inner), product), (*whole, *parts), strict=True
    ):
        if (
            found is None
            or len(found) != 4
            or any(w not in (None, f) for f, w in zip(found, wanted, strict=True))
        ):
            return "heads are grouped in another way"
    return many // few


def factor(root: ir.Node, k: ir.Value, scale: ir.Value | None) -> float | None:
    """What scores are multiplied with; None where that is no constant."""
    if scale is None:
        return 1.0
    number = scalar(scale)
    if number is None or number == 0:
        return None
    return 1 / number if any(n.op_type == "Div" for n in above(root, k)) else number


def scaled_queries(q: ir.Value) -> tuple[ir.Value, float]:
    """Queries without the constant that they are multiplied with, and that constant."""
    node = q.producer()
    if node is not None and node.op_type == "Mul" and node.domain == "":
        for value, other in (node.inputs, node.inputs[::-1]):
            number = scalar(other)
            if value is not None and number and value.dtype == q.dtype and value.shape == q.shape:
                return value, number
    return q, 1.0


def softmax_axis(root: ir.Node, k: ir.Value) -> int | None:
    """Of the Softmax above ``root``; None where there is none."""
    node = next((n for n in above(root, k) if n.op_type == "Softmax"), None)
    return None if node is None else node.attributes.get_int("axis", -1)


def depth_of(value: ir.Value | None) -> int | None:
    """Elements of a head, where they are one of those that there are tiles for."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    depth = value.shape[3]
    return depth if isinstance(depth, int) and depth in DEPTHS else None


def mask_axes(value: ir.Value | None) -> str | None:
    """Which of batch, heads and queries a mask has, the others being 1 or left out: letters of ``bhq``."""
    shape = shape_of(value)
    if shape is None or not 2 <= len(shape) <= 4 or shape[-1] == 1:
        return None
    return "".join(letter for letter, d in zip("qhb", shape[-2::-1], strict=False) if d != 1)[::-1]
