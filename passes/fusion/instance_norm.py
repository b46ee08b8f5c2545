"""Instance normalization written out becomes one InstanceNormalization node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, rank, scalar
from optkit.passes.base import Context, GraphPass
from optkit.passes.fusion.layer_norm import normalized
from optkit.rewrite import Change, Match, Rule, apply


def _whole_pattern(op: Any, x: Any, axes: Any, epsilon: Any, scale: Any, bias: Any) -> Any:
    return op.Add(op.Mul(normalized(op, x, axes, epsilon), scale), bias)


def _bare_pattern(op: Any, x: Any, axes: Any, epsilon: Any) -> Any:
    return normalized(op, x, axes, epsilon)


def _check(root: ir.Node, x: ir.Value, axes: ir.Value, epsilon: ir.Value, **bound: Any) -> Match:
    match = Match()
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return match.fail("not known to be a float32 or float64", x)
    number = scalar(epsilon)
    if number is None or number < 0:
        return match.fail("not a constant scalar", epsilon)
    dims, listed = rank(x) or 0, constant(axes)
    # Over the last of three axes, without a scale for each channel, it is a layer norm of tokens.
    if dims < (3 if "scale" in bound else 4) or listed is None:
        return match.fail("not a known number of axes", x)
    if sorted(int(a) % dims for a in listed.reshape(-1)) != list(range(2, dims)):
        return match.fail("not all axes but batch and channels", axes)
    if any(not attribute(user, "keepdims", 1) for user, _ in axes.uses() if user.op_type == "ReduceMean"):
        return match.fail("drops the axes", axes)
    channels = x.shape[1] if x.shape is not None else None
    if not isinstance(channels, int):
        return match.fail("the number of channels is not known", x)
    for name in ("scale", "bias"):
        if (value := bound.get(name)) is None:
            continue
        array = constant(value)
        if array is None:
            return match.fail("not constant", value)
        if array.ndim > dims or (1,) * (dims - array.ndim) + array.shape != (1, channels, *(1,) * (dims - 2)):
            return match.fail(f"{name} has the shape {list(array.shape)}: not one for each channel", value)
    return match


def _rewrite(op: Any, x: ir.Value, epsilon: ir.Value, **bound: Any) -> Any:
    assert x.shape is not None
    assert x.dtype is not None
    channels, kind = int(x.shape[1]), x.dtype.numpy()  # type: ignore[arg-type]
    scale, bias = (constant(bound.get(name)) for name in ("scale", "bias"))
    scale = np.ones(channels, kind) if scale is None else scale.reshape(-1)
    bias = np.zeros(channels, kind) if bias is None else bias.reshape(-1)
    return op.InstanceNormalization(x, scale, bias, epsilon=scalar(epsilon))


class FuseInstanceNorm(GraphPass):
    """Replace instance normalization's definition over all axes but the first two by the operator.

    Before: ``d = x - mean(x)``; ``y = d / sqrt(mean(d**2) + eps) * scale + bias`` with means over height and width.
    After: ``y = InstanceNormalization(x, scale, bias)``. Scale and bias may be missing, both at once.

    The operator adds up in another order: differences of some units in the last place.
    """

    name: ClassVar[str] = "fuse-instance-norm"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every definition."""
        # The largest first: what is left of a definition is one too.
        patterns = (_whole_pattern, _bare_pattern)
        rules = ([Rule(pattern, _rewrite, _check, name="instance-norm")] for pattern in patterns)
        return [change for same_size in rules for change in apply(same_size, model)]
