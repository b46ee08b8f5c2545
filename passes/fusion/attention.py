"""Scaled dot-product attention loses what exporters add to it: guards, zero masks, detours, a second scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, rank, scalar, users
from optkit.masks import is_zero, number, sight
from optkit.passes.base import Context, GraphPass
from optkit.passes.cleanup.dead import remove_nodes
from optkit.passes.fusion.hidden_scores import RULE, is_product
from optkit.rewrite import Builder, Change, Match, Rule, apply

_MOVES = frozenset({"Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity"})


def _guarded_pattern(op: Any, p: Any, v: Any) -> Any:
    return op.MatMul(op.Where(op.IsNaN(p), 0, p), v)


def _guarded(root: ir.Node, p: ir.Value, v: ir.Value) -> Match:
    softmax = p.producer()
    if softmax is None or softmax.op_type != "Softmax" or softmax.domain != "":
        return Match().fail("the guarded value is no Softmax", p)
    if attribute(softmax, "axis", -1) not in (-1, (rank(p) or 0) - 1):
        return Match().fail("the Softmax is not over the last axis", softmax)
    scores = softmax.inputs[0]
    node = scores.producer() if scores is not None else None
    if node is not None and node.op_type == "Add" and _mask(node) is None:
        return Match().fail("which operand is the mask is not known", node)
    if node is None or (node.op_type != "Add" and not is_product(scores)):
        return Match().fail("the Softmax is not over products", softmax)
    return Match()


def _mask(add: ir.Node) -> ir.Value | None:
    """What is added to the products; None where that is not known."""
    products = [is_product(v) for v in add.inputs]
    return add.inputs[products.index(False)] if sorted(products) == [False, True] else None


def _is_finite(value: ir.Value | None) -> bool:
    """Whether ``value`` can never be infinite or NaN."""
    if value is None:
        return False
    array = constant(value)
    if array is not None:
        return array.dtype.kind in "fiub" and bool(np.all(np.isfinite(array)))
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "Cast":
        before = node.inputs[0]
        whole = before is not None and before.dtype is not None and before.dtype.is_integer()
        return whole or is_zero(value)
    if node.op_type == "ConstantOfShape":
        return is_zero(value)
    if node.op_type == "Where":
        return _is_finite(node.inputs[1]) and _is_finite(node.inputs[2])
    return node.op_type in _MOVES and _is_finite(node.inputs[0])


def _unguard(op: Builder, root: ir.Node, p: ir.Value, v: ir.Value) -> Any:
    softmax = p.producer()
    assert softmax is not None
    assert softmax.inputs[0] is not None
    add = softmax.inputs[0].producer()
    product = op.MatMul(p, v)
    mask = _mask(add) if add is not None and add.op_type == "Add" else None
    if mask is None or _is_finite(mask):
        return product
    assert mask.dtype is not None
    kind = mask.dtype.numpy()
    highest = op.ReduceMax(mask, np.array([-1], np.int64), keepdims=1)
    return op.Where(op.Equal(highest, np.array(-np.inf, kind)), np.zeros((), kind), product)


def _zero_mask_pattern(op: Any, scores: Any, mask: Any) -> Any:
    return op.Add(scores, mask)


def _zero_mask(root: ir.Node, scores: ir.Value, mask: ir.Value) -> Match:
    if not is_product(scores):
        return Match().fail("not products and a mask", root)
    if constant(mask) is not None or not is_zero(mask):
        return Match().fail("the mask is not zero everywhere", mask)
    if None in (known := shape_of(scores) or (None,)) or known != shape_of(root.outputs[0]):
        return Match().fail("the mask may widen what it is added to", root)
    return Match()


def _rows_pattern(op: Any, mask: Any, axes: Any, low: Any, zero: Any, p: Any, v: Any) -> Any:
    return op.MatMul(op.Where(op.Equal(op.ReduceMax(mask, axes), low), zero, p), v)


def _rows(
    root: ir.Node, mask: ir.Value, axes: ir.Value, low: ir.Value, zero: ir.Value, p: ir.Value, **_: Any
) -> Match:
    softmax = p.producer()
    if softmax is None or softmax.op_type != "Softmax" or softmax.domain != "":
        return Match().fail("the guarded value is no Softmax", p)
    if attribute(softmax, "axis", -1) not in (-1, (rank(p) or 0) - 1):
        return Match().fail("the Softmax is not over the last axis", softmax)
    if number(low) != -np.inf or number(zero) != 0 or scalar(axes) not in (-1, (rank(mask) or 0) - 1):
        return Match().fail("does not put 0 where a row of the mask is infinite", root)
    where = root.inputs[0].producer() if root.inputs[0] is not None else None
    equal = where.inputs[0].producer() if where is not None and where.inputs[0] is not None else None
    assert equal is not None
    for node in (v.producer() for v in equal.inputs if v is not None):
        if node is not None and node.op_type == "ReduceMax" and not attribute(node, "keepdims", 1):
            return Match().fail("the rows of the mask are not kept", node)
    return Match()


def _behind(op: Builder, mask: ir.Value, p: ir.Value, v: ir.Value, **_: Any) -> Any:
    product = op.MatMul(p, v)
    assert mask.dtype is not None
    kind = mask.dtype.numpy()
    if _is_finite(mask) or _sees_itself(mask, v):
        return product
    highest = op.ReduceMax(mask, np.array([-1], np.int64), keepdims=1)
    return op.Where(op.Equal(highest, np.array(-np.inf, kind)), np.zeros((), kind), product)


def _sees_itself(mask: ir.Value, keys: ir.Value) -> bool:
    """Whether there is a key for every query: all see the first one, or that at their own place."""
    found, shape = sight(mask, keys), shape_of(mask)
    if isinstance(found, str) or found.keys is not None:
        return False
    if found.last:
        return True
    return found.window == 0 or (shape is not None and shape[-1] is not None and shape[-1] == shape[-2])


def _detour_pattern(op: Any, k: Any, flat: Any, whole: Any) -> Any:
    return op.Reshape(op.Transpose(op.Reshape(k, flat), perm=(0, 2, 1)), whole)


def _detour(root: ir.Node, k: ir.Value, flat: ir.Value, whole: ir.Value) -> Match:
    transpose = root.inputs[0].producer() if root.inputs[0] is not None else None
    assert transpose is not None
    outer, inner, last = shape_of(k), shape_of(transpose.inputs[0]), shape_of(root.outputs[0])
    if outer is None or inner is None or last is None or len(outer) != 4 or len(last) != 4:
        return Match().fail("not four known axes", k)
    if None in outer or list(inner[1:]) != list(outer[2:]):
        return Match().fail("does not keep the last two axes", transpose)
    if list(last) != [outer[0], outer[1], outer[3], outer[2]]:
        return Match().fail("does not exchange the last two axes alone", root)
    return Match()


def _scales_pattern(op: Any, q: Any, a: Any, k: Any, b: Any) -> Any:
    return op.MatMul(op.Mul(q, a), op.Mul(k, b))


def _scales(root: ir.Node, q: ir.Value, a: ir.Value, k: ir.Value, b: ir.Value) -> Match:
    for value in (a, b):
        if scalar(value) is None or (rank(value) or 0) > (rank(q) or 0):
            return Match().fail("not a constant scalar", value)
    product = (scalar(a) or 0.0) * (scalar(b) or 0.0)
    if not np.isfinite(product) or product == 0:
        return Match().fail("the product of the scales is out of range", root)
    if constant(q) is not None or constant(k) is not None or q.dtype != k.dtype or q.dtype is None:
        return Match().fail("not a product of two activations", root)
    return Match()


def _one_scale(op: Builder, q: ir.Value, a: ir.Value, k: ir.Value, b: ir.Value, **_: Any) -> Any:
    return op.MatMul(_scaled(op, q, (scalar(a) or 0.0) * (scalar(b) or 0.0)), k)


def _scaled_scores_pattern(op: Any, q: Any, k: Any, c: Any) -> Any:
    return op.any(op.Mul(op.MatMul(q, k), c), op.Div(op.MatMul(q, k), c))


def _scaled_scores(root: ir.Node, q: ir.Value, k: ir.Value, c: ir.Value) -> Match:
    number = scalar(c)
    if number is None or not number or not np.isfinite(number) or (rank(c) or 0) > (rank(q) or 0):
        return Match().fail("not a constant scalar", c)
    if rank(k) is None or constant(k) is not None:
        return Match().fail("not a product of two activations", root)
    if not all(n.op_type in ("Softmax", "Add") for n in users(root.outputs[0])):
        return Match().fail("not the scores of an attention", root)
    layer = _chain(q)[0].producer()
    operands = layer.inputs if layer is not None and layer.op_type in ("MatMul", "Gemm", "Add") else ()
    if not _chain(q)[1] or not any(constant(v) is not None for v in operands):
        return Match().fail("no linear layer to take the scale in", q)
    return Match()


def _scale_queries(op: Builder, root: ir.Node, q: ir.Value, k: ir.Value, c: ir.Value) -> Any:
    number = scalar(c)
    assert number
    return op.MatMul(_scaled(op, q, number if root.op_type == "Mul" else 1 / number), k)


def _chain(q: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """What ``q`` is made of by moving elements about, and the nodes that do so, as far as nothing else reads them."""
    nodes: list[ir.Node] = []
    while (
        (node := q.producer()) is not None
        and node.op_type in ("Reshape", "Transpose")
        and node.domain == ""
        and (before := node.inputs[0]) is not None
        and len(q.uses()) == 1
        and not q.is_graph_output()
    ):
        nodes.insert(0, node)
        q = before
    return q, nodes if len(q.uses()) == 1 else []


def _scaled(op: Builder, q: ir.Value, factor: float) -> ir.Value:
    """``q * factor``, with the factor in front of what only moves elements, where a linear layer can take it in."""
    source, nodes = _chain(q)
    source = source if nodes else q
    assert source.dtype is not None
    scaled = op.Mul(source, np.asarray(factor, source.dtype.numpy()))
    for node in nodes:
        (scaled,) = op.node(node.op_type, [scaled, *node.inputs[1:]], node.attributes)
    return scaled


class CleanAttention(GraphPass):
    """Take out of attention what exporters put into it and no result needs.

    * ``Where(IsNaN(p), 0, p) @ v`` with ``p = Softmax(scores + mask)``: rows that are masked altogether give 0. Where the
      mask is finite, or there is none, no row is; else the rows are looked up in the mask, which all layers share,
      and not in every ``p``.
    * ``Where(max(mask) == -inf, 0, p) @ v``, which is how ONNX's Attention says the same, is asked behind the product, or not
      at all where the mask is causal or finite.
    * ``Where(hidden, low, scores)``, as ``masked_fill`` writes it, becomes ``scores + Where(seen, 0, low)``, whose mask is small
      and shared: what kernels and runtimes know as attention. ``low`` is minus infinity, or -10000 and below: then one that no
      score changes takes its place, so that queries that see no key still give all the same weight; float16 has none.
    * A mask that is zero everywhere.
    * ``k`` transposed as three axes with a Reshape before and behind becomes one Transpose.
    * ``(q * a) @ (k * b)`` becomes ``(q * ab) @ k``, with the factor in front of the head split where that is possible,
      so that ``fold-affine`` takes it into the weights of ``q``.

    Exact but for rounding, given finite scores, those of keys that are seen far above ``low``: a guard, and a choice, also hid NaN
    that came from elsewhere.
    """

    name: ClassVar[str] = "clean-attention"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Clean up every attention."""
        rules = [
            RULE,
            Rule(
                _zero_mask_pattern, lambda op, scores, **_: op.Identity(scores), _zero_mask, name="zero-mask"
            ),
            Rule(_rows_pattern, _behind, _rows, name="row-guard"),
            Rule(_guarded_pattern, _unguard, _guarded, name="nan-guard"),
            Rule(
                _detour_pattern,
                lambda op, k, **_: op.Transpose(k, perm=[0, 1, 3, 2]),
                _detour,
                name="transposed-keys",
            ),
            Rule(_scales_pattern, _one_scale, _scales, name="two-scales"),
            Rule(_scaled_scores_pattern, _scale_queries, _scaled_scores, name="scaled-scores"),
        ]
        changes = apply(rules, model)
        # The nodes that stood behind a scale are written anew; what is left of the old ones goes.
        return [*changes, *remove_nodes(model.graph)] if changes else []
