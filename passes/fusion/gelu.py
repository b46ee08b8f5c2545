"""Gelu written out becomes one Gelu node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply

_ROOT = math.sqrt(2)
_TANH = math.sqrt(2 / math.pi)


def _halved(op: Any, x: Any, sum: Any) -> Any:
    """``x * sum / 2`` in the ways that exporters write it."""
    return op.any(
        op.Mul(op.Mul(x, sum), 0.5),
        op.Mul(op.Mul(x, 0.5), sum),
        op.Mul(x, op.Mul(sum, 0.5)),
        op.Div(op.Mul(x, sum), 2),
        op.Mul(x, op.Div(sum, 2)),
        op.Mul(op.Div(x, 2), sum),
    )


def _erf_pattern(op: Any, x: Any) -> Any:
    scaled = op.any(op.Div(x, _ROOT), op.Mul(x, 1 / _ROOT))
    return _halved(op, x, op.Add(op.Erf(scaled), 1))


def _tanh_pattern(op: Any, x: Any) -> Any:
    cube = op.any(op.Pow(x, 3), op.Mul(op.Mul(x, x), x))
    small = op.any(op.Mul(cube, 0.044715), op.Mul(op.Mul(op.Mul(x, 0.044715), x), x))
    inner = op.any(
        op.Mul(op.Add(x, small), _TANH),
        op.Mul(op.Add(x, op.Mul(op.Mul(x, 0.044715), op.Mul(x, x))), _TANH),
        # x * (c + c * 0.044715 * x * x)
        op.Mul(x, op.Add(op.Mul(op.Mul(x, x), _TANH * 0.044715), _TANH)),
        op.Mul(op.Mul(x, op.Add(op.Mul(op.Mul(x, x), 0.044715), 1)), _TANH),
        op.Mul(op.Mul(x, _TANH), op.Add(op.Mul(op.Mul(x, x), 0.044715), 1)),
    )
    return _halved(op, x, op.Add(op.Tanh(inner), 1))


def _is_float(x: ir.Value, **_: Any) -> Match:
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
    return Match() if known else Match().fail("not known to be a float", x)


class FuseGelu(GraphPass):
    """Replace Gelu's definition, with Erf or its approximation with Tanh, by the operator (opset 20 on).

    Before: ``y = x * (erf(x / sqrt(2)) + 1) / 2``. After: ``y = Gelu(x)``.
    Before: ``y = x * (tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)) + 1) / 2``. After: ``y = Gelu(x, approximate="tanh")``.
    """

    name: ClassVar[str] = "fuse-gelu"

    erf: bool = True
    """Whether to replace the definition with Erf."""
    tanh: bool = True
    """Whether to replace the approximation with Tanh."""

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every definition."""
        rules = []
        if self.erf:
            rules.append(Rule(_erf_pattern, lambda op, x, **_: op.Gelu(x), _is_float, name="erf-gelu"))
        if self.tanh:
            rules.append(
                Rule(
                    _tanh_pattern,
                    lambda op, x, **_: op.Gelu(x, approximate="tanh"),
                    _is_float,
                    name="tanh-gelu",
                )
            )
        return apply(rules, model)
