"""Root-mean-square normalization is written in the one way that runtimes recognise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, rank, scalar
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply


def _pattern(op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
    square = op.any(op.Pow(x, 2), op.Mul(x, x))
    variance = op.Add(op.ReduceMean(square, axes), epsilon)
    deviation = op.any(op.Sqrt(variance), op.Pow(variance, 0.5))
    inverse = op.any(op.Reciprocal(deviation), op.Pow(variance, -0.5), op.Div(1, deviation))
    return op.any(
        op.Mul(op.any(op.Div(x, deviation), op.Mul(x, inverse)), scale), op.Mul(x, op.Mul(inverse, scale))
    )


def _check(root: ir.Node, x: ir.Value, axes: ir.Value, epsilon: ir.Value, scale: ir.Value) -> Match:
    match = Match()
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return match.fail("not known to be a float", x)
    number = scalar(epsilon)
    if number is None or number < 0:
        return match.fail("not a constant scalar", epsilon)
    listed, last = constant(axes), (rank(x) or 0) - 1
    if listed is None or [int(a) % (last + 1) for a in listed.reshape(-1)] != [last]:
        return match.fail("not the last axis alone", axes)
    if any(not attribute(user, "keepdims", 1) for user, _ in axes.uses() if user.op_type == "ReduceMean"):
        return match.fail("drops the axis", axes)
    array = constant(scale)
    size = x.shape[-1] if x.shape is not None else None
    if array is None:
        return match.fail("not constant", scale)
    if array.size != size or array.shape[-1:] != (size,) or array.ndim > last + 1:
        return match.fail(f"scale has the shape {list(array.shape)}, not [{size}]", scale)
    if array.ndim == 1 and _is_canonical(root):
        return match.fail("is written that way", root)
    return match


def _is_canonical(root: ir.Node) -> bool:
    """Whether ``root`` ends what ``_rewrite`` writes, by the operators along the way."""
    ops: list[str] = []
    node = root
    while len(ops) < 6:
        ops.append(node.op_type)
        value = node.inputs[1 if node.op_type == "Div" else 0]
        following = value.producer() if value is not None else None
        if following is None:
            break
        node = following
    return ops == ["Mul", "Div", "Sqrt", "Add", "ReduceMean", "Pow"]


def _rewrite(op: Any, x: ir.Value, axes: ir.Value, epsilon: ir.Value, scale: ir.Value, **_: Any) -> Any:
    array = constant(scale)
    assert array is not None
    assert x.dtype is not None
    two = np.asarray(2, x.dtype.numpy())
    variance = op.Add(op.ReduceMean(op.Pow(x, two), axes, keepdims=1), epsilon)
    weights = scale if array.ndim == 1 else array.reshape(-1)
    return op.Mul(op.Div(x, op.Sqrt(variance)), weights)


class FuseRmsNorm(GraphPass):
    """Write ``x / sqrt(mean(x**2) + eps) * scale`` over the last axis with Pow, Sqrt and Div, in this order.

    Before: ``x * (1 / sqrt(mean(x * x) + eps)) * scale``, with Reciprocal, with the scale moved, and so on.
    After: ``Mul(Div(x, Sqrt(Add(ReduceMean(Pow(x, 2)), eps))), scale)``.

    The operator RMSNormalization came with opset 23, which ONNX Runtime's fusions do not read; this spelling they turn
    into one kernel, and so does OpenVINO. Of the others some are left as five operators.
    """

    name: ClassVar[str] = "fuse-rms-norm"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Rewrite every other spelling."""
        return apply([Rule(_pattern, _rewrite, _check, name="rms-norm")], model)
