"""Layer normalization written out becomes one LayerNormalization node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, rank, scalar
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply


def normalized(op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
    """``(x - mean) / sqrt(variance + epsilon)`` over ``axes``, in the ways that exporters write it."""
    centred = op.Sub(x, op.ReduceMean(x, axes))
    square = op.any(op.Pow(centred, 2), op.Mul(centred, centred))
    variance = op.Add(op.ReduceMean(square, axes), epsilon)
    deviation = op.any(op.Sqrt(variance), op.Pow(variance, 0.5))
    return op.any(
        op.Div(centred, deviation),
        op.Mul(centred, op.any(op.Reciprocal(deviation), op.Pow(variance, -0.5), op.Div(1, deviation))),
    )


def _whole_pattern(op: Any, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
    return op.Add(op.Mul(normalized(op, x, axes, epsilon), scale), bias)


def _scaled_pattern(op: Any, x: Any, axes: Any, epsilon: Any, scale: Any) -> Any:
    return op.Mul(normalized(op, x, axes, epsilon), scale)


def _bare_pattern(op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
    return normalized(op, x, axes, epsilon)


def _folded_pattern(op: Any, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
    """TensorFlow: ``r = scale / sqrt(var + eps)``; ``y = x * r + (bias - mean * r)``."""
    mean = op.ReduceMean(x, axes)
    square = op.any(op.Mul(op.Sub(x, mean), op.Sub(x, mean)), op.Pow(op.Sub(x, mean), 2))
    variance = op.Add(op.ReduceMean(square, axes), epsilon)
    deviation = op.any(op.Sqrt(variance), op.Pow(variance, 0.5))
    factor = op.any(
        op.Mul(op.any(op.Reciprocal(deviation), op.Pow(variance, -0.5)), scale), op.Div(scale, deviation)
    )
    return op.Add(op.Mul(x, factor), op.Sub(bias, op.Mul(mean, factor)))


def _check(root: ir.Node, x: ir.Value, axes: ir.Value, epsilon: ir.Value, **bound: Any) -> Match:
    match = Match()
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return match.fail("not known to be a float", x)
    number = scalar(epsilon)
    if number is None or number < 0:
        return match.fail("not a constant scalar", epsilon)
    first = _first_axis(x, axes)
    if first is None:
        return match.fail("not the last axes", axes)
    if any(not attribute(user, "keepdims", 1) for user, _ in axes.uses() if user.op_type == "ReduceMean"):
        return match.fail("drops the axes", axes)
    assert x.shape is not None
    size = list(x.shape[first:])
    for name in ("scale", "bias"):
        value = bound.get(name)
        if value is None:
            continue
        array = constant(value)
        if array is None:
            return match.fail("not constant", value)
        shape = list(array.shape)
        while len(shape) > len(size) and shape[0] == 1:
            shape.pop(0)
        if shape != size:
            return match.fail(f"{name} has the shape {list(array.shape)}, not {size}", value)
    if "scale" not in bound and not all(isinstance(d, int) for d in size):
        return match.fail("its last axes are not known", x)
    return match


def _first_axis(x: ir.Value, axes: ir.Value) -> int | None:
    """The first normalized axis, if those from it on are what ``axes`` lists."""
    held, axes_of_x = constant(axes), rank(x)
    if held is None or axes_of_x is None or held.size == 0:
        return None
    listed = sorted(int(a) % axes_of_x for a in held.reshape(-1))
    return listed[0] if listed == list(range(listed[0], axes_of_x)) else None


def _rewrite(op: Any, x: ir.Value, axes: ir.Value, epsilon: ir.Value, **bound: Any) -> Any:
    first = _first_axis(x, axes)
    assert first is not None
    assert x.shape is not None
    assert x.dtype is not None
    size = [int(d) if isinstance(d, int) else 1 for d in x.shape[first:]]
    operands: list[ir.Value | np.ndarray] = [x]
    if bound.get("scale") is None:
        operands.append(np.ones(size, x.dtype.numpy()))
    for name in ("scale", "bias"):
        value = bound.get(name)
        if value is not None:
            array = constant(value)
            assert array is not None
            operands.append(value if array.ndim == len(size) else array.reshape(size))
    return op.LayerNormalization(*operands, axis=first - len(x.shape), epsilon=scalar(epsilon))


class FuseLayerNorm(GraphPass):
    """Replace layer normalization's definition over the last axes by the operator (opset 17 on).

    Before: ``d = x - mean(x)``; ``y = d / sqrt(mean(d**2) + eps) * scale + bias``, nine nodes.
    After: ``y = LayerNormalization(x, scale, bias)`` with the same ``eps``. Scale and bias may be missing.

    The operator adds up in another order: differences of some units in the last place.
    """

    name: ClassVar[str] = "fuse-layer-norm"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every definition."""
        # The largest first: what is left of a definition is one too.
        sizes = ((_whole_pattern, _folded_pattern), (_scaled_pattern,), (_bare_pattern,))
        rules = ([Rule(p, _rewrite, _check, name="layer-norm") for p in patterns] for patterns in sizes)
        return [change for same_size in rules for change in apply(same_size, model)]
