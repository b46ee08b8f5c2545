"""Sigmoid and SiLU written out with Exp become Sigmoid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply


def _denominator(op: Any, x: Any) -> Any:
    return op.Add(op.Exp(op.any(op.Neg(x), op.Mul(x, -1))), 1)


def _sigmoid_pattern(op: Any, x: Any) -> Any:
    return op.any(op.Div(1, _denominator(op, x)), op.Reciprocal(_denominator(op, x)))


def _silu_pattern(op: Any, x: Any) -> Any:
    return op.Div(x, _denominator(op, x))


def _is_float(x: ir.Value, **_: Any) -> Match:
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return Match() if known else Match().fail("not known to be a float", x)


class FuseSigmoid(GraphPass):
    """Replace ``1 / (1 + exp(-x))`` by ``Sigmoid(x)``, and ``x / (1 + exp(-x))`` by ``x * Sigmoid(x)``.

    The latter is what runtimes take for SiLU; the operator Swish of opset 24 takes ONNX Runtime longer.
    """

    name: ClassVar[str] = "fuse-sigmoid"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every definition."""
        return apply(
            [
                Rule(_sigmoid_pattern, lambda op, x, **_: op.Sigmoid(x), _is_float, name="sigmoid"),
                Rule(_silu_pattern, lambda op, x, **_: op.Mul(x, op.Sigmoid(x)), _is_float, name="silu"),
            ],
            model,
        )
