"""Hard sigmoid and hard swish written out become one node each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from optkit.graph import scalar
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply

_SIXTH = 1 / 6


def _clipped(op: Any, x: Any) -> Any:
    """``clip(x + 3, 0, 6)`` in the ways that exporters write it."""
    moved = op.Add(x, 3)
    return op.any(
        op.Clip(moved, 0, 6),
        op.Min(op.Max(moved, 0), 6),
        op.Max(op.Min(moved, 6), 0),
        op.Min(op.Relu(moved), 6),
        op.Clip(op.Relu(moved), 0, 6),
        op.Clip(op.Relu(moved), None, 6),
    )


def _swish_pattern(op: Any, x: Any) -> Any:
    clipped = _clipped(op, x)
    return op.any(
        op.Div(op.Mul(x, clipped), 6),
        op.Mul(op.Mul(x, clipped), _SIXTH),
        op.Mul(x, op.Div(clipped, 6)),
        op.Mul(x, op.Mul(clipped, _SIXTH)),
        op.Mul(op.Mul(x, _SIXTH), clipped),
        op.Mul(op.Div(x, 6), clipped),
    )


def _sigmoid_pattern(op: Any, x: Any) -> Any:
    clipped = _clipped(op, x)
    return op.any(op.Div(clipped, 6), op.Mul(clipped, _SIXTH), op.Clip(op.Div(op.Add(x, 3), 6), 0, 1))


def _line_pattern(op: Any, x: Any, a: Any, b: Any) -> Any:
    line = op.Add(op.Mul(x, a), b)
    return op.any(op.Clip(line, 0, 1), op.Min(op.Max(line, 0), 1), op.Max(op.Min(line, 1), 0))


def _is_float(x: ir.Value, **_: Any) -> Match:
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return Match() if known else Match().fail("not known to be a float", x)


def _is_line(x: ir.Value, a: ir.Value, b: ir.Value, **_: Any) -> Match:
    for value in (a, b):
        if scalar(value) is None:
            return Match().fail("not a constant scalar", value)
    return _is_float(x)


def _is_sixth(root: ir.Node, x: ir.Value, **_: Any) -> Match:
    """Hard swish is ``x`` times the hard sigmoid with ``alpha = 1/6`` and ``beta = 1/2``."""
    sigmoid = next(v.producer() for v in root.inputs if v is not None and v is not x)
    assert sigmoid is not None
    for name, default, wanted in (("alpha", 0.2, _SIXTH), ("beta", 0.5, 0.5)):
        found = sigmoid.attributes.get_float(name, default)
        if not math.isclose(found, wanted, rel_tol=2e-5):
            return Match().fail(f"{name} is {found:.6g}, not {wanted:.6g}", sigmoid)
    return _is_float(x)


def _swish(op: Any, x: ir.Value, **_: Any) -> Any:
    return op.HardSwish(x)


def _sigmoid(op: Any, x: ir.Value, **_: Any) -> Any:
    return op.HardSigmoid(x, alpha=_SIXTH, beta=0.5)


def _line(op: Any, x: ir.Value, a: ir.Value, b: ir.Value, **_: Any) -> Any:
    return op.HardSigmoid(x, alpha=scalar(a), beta=scalar(b))


class FuseHardSwish(GraphPass):
    """Replace the definitions of HardSwish and HardSigmoid by the operators.

    Before: ``y = x * clip(x + 3, 0, 6) / 6``, in any order and spelling. After: ``y = HardSwish(x)``.
    Before: ``y = clip(a * x + b, 0, 1)``. After: ``y = HardSigmoid(x)``.

    The division by 6 is rounded at another place: a unit in the last place or two of difference.
    """

    name: ClassVar[str] = "fuse-hard-swish"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every definition."""
        return apply(
            [
                Rule(_swish_pattern, _swish, _is_float, name="hard-swish"),
                Rule(lambda op, x: op.Mul(x, op.HardSigmoid(x)), _swish, _is_sixth, name="hard-swish"),
                Rule(_sigmoid_pattern, _sigmoid, _is_float, name="hard-sigmoid"),
                Rule(_line_pattern, _line, _is_line, name="hard-sigmoid"),
            ],
            model,
        )
