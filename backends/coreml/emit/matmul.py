"""Matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, emits, is_float, like, wide
from optkit.backends.coreml.emit.quant import is_weight, weight
from optkit.backends.coreml.quiet import mb
from optkit.graph import rank


@emits("MatMul")
def _matmul(c: Context, node: ir.Node) -> Any:
    x = wide(c.input(node, 0))
    if is_weight(c, node, 1) and rank(node.inputs[1]) == 2 and is_float(x) and x.rank in (2, 3):
        return mb.linear(x=x, weight=weight(c, node, 1, transposed=True))
    y = weight(c, node, 1) if is_weight(c, node, 1) else wide(c.input(node, 1))
    first, last = x.rank == 1, y.rank == 1
    x = mb.expand_dims(x=x, axes=[0]) if first else x
    y = mb.expand_dims(x=y, axes=[1]) if last else y
    out = mb.matmul(x=x, y=y)
    axes = [axis for axis, gone in ((-2, first), (-1, last)) if gone]
    return mb.squeeze(x=out, axes=axes) if axes else out


@emits("Gemm")
def _gemm(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    turned = bool(node.attributes.get_int("transB", 0))
    if node.attributes.get_int("transA", 0):
        x = mb.transpose(x=x, perm=[1, 0])
    bias = c.known(node, 2)
    if is_weight(c, node, 1):
        w = weight(c, node, 1, transposed=not turned)
        settings = {"x": x, "weight": w}
        # Bias is one number for each column; other shapes are added afterwards.
        if alpha == 1.0 and bias is not None and bias.size == w.shape[0] and bias.shape[-1] == bias.size:
            return mb.linear(bias=_scaled(bias.reshape(-1), beta, x), **settings)
        out = mb.linear(**settings)
    else:
        out = mb.matmul(x=x, y=c.input(node, 1), transpose_y=turned)
    if alpha != 1.0:
        out = mb.mul(x=out, y=like(out, alpha))
    if c.has(node, 2):
        added = c.input(node, 2) if beta == 1.0 else mb.mul(x=c.input(node, 2), y=like(out, beta))
        out = mb.add(x=out, y=added)
    return out


def _scaled(bias: np.ndarray, beta: float, x: Any) -> np.ndarray:
    return np.ascontiguousarray((bias * np.asarray(beta, bias.dtype)).astype(type(like(x, 0))))


def _refuse_einsum(node: ir.Node) -> str | None:
    inputs, arrow, output = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        return "an equation without '->'"
    if len(terms) > 2:
        return f"an equation of {len(terms)} operands"
    if "." in inputs or "." in output:
        return "an equation with an ellipsis"
    others = [output + "".join(t for j, t in enumerate(terms) if j != i) for i in range(len(terms))]
    if any(not set(t) & set(o) for t, o in zip(terms, others, strict=True)):
        return "an equation that sums up all of an operand"
    if any(len(set(t)) != len(t) for t in terms):
        return "an equation that takes a diagonal"
    return None


@emits("Einsum", refuse=_refuse_einsum)
def _einsum(c: Context, node: ir.Node) -> Any:
    """By one product of matrices: axes that both have and the output has first, the summed ones last."""
    inputs, _, output = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    terms = inputs.split(",")
    operands = [
        _summed(c.input(node, i), term, output + "".join(t for j, t in enumerate(terms) if j != i))
        for i, term in enumerate(terms)
    ]
    if len(operands) == 1:
        x, letters = operands[0]
        return mb.transpose(x=x, perm=[letters.index(k) for k in output])
    (x, left), (y, right) = operands
    batch = [k for k in left if k in right and k in output]
    summed = [k for k in left if k in right and k not in output]
    rows, columns = [k for k in left if k not in right], [k for k in right if k not in left]
    sizes = dict(zip(right, c.sizes(y), strict=True)) | dict(zip(left, c.sizes(x), strict=True))
    x = mb.transpose(x=x, perm=[left.index(k) for k in (*batch, *rows, *summed)])
    y = mb.transpose(x=y, perm=[right.index(k) for k in (*batch, *summed, *columns)])
    along = [sizes[k] for k in batch]
    flat = {
        name: c.product([sizes[k] for k in group])
        for name, group in (("r", rows), ("s", summed), ("c", columns))
    }
    out = mb.matmul(
        x=c.reshape(x, [*along, flat["r"], flat["s"]]), y=c.reshape(y, [*along, flat["s"], flat["c"]])
    )
    order = [*batch, *rows, *columns]
    if not order:
        return mb.squeeze(x=out, axes=[0, 1])
    out = c.reshape(out, [sizes[k] for k in order])
    return mb.transpose(x=out, perm=[order.index(k) for k in output])


def _summed(x: Any, term: str, elsewhere: str) -> tuple[Any, str]:
    """``x`` without the axes that nothing else names."""
    alone = [i for i, k in enumerate(term) if k not in elsewhere]
    if not alone:
        return x, term
    kept = "".join(k for k in term if k in elsewhere)
    return mb.reduce_sum(x=x, axes=alone, keep_dims=False), kept
