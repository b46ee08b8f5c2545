"""Softplus loses a guard that it does not need; with Tanh behind it, it becomes Mish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from optkit.graph import scalar
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply

# From here on log(1 + exp(x)) is x in float32: exp(-15) / 15 is a third of half a unit in the last place.
_LINEAR = 15.0


def _guarded_pattern(op: Any, x: Any, limit: Any) -> Any:
    softplus = op.Softplus(x)
    return op.any(
        op.Where(op.Greater(x, limit), x, softplus), op.Where(op.LessOrEqual(x, limit), softplus, x)
    )


def _guarded(x: ir.Value, limit: ir.Value, **_: Any) -> Match:
    number = scalar(limit)
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return Match().fail("not known to be float32 or narrower", x)
    if number is None or number < _LINEAR:
        return Match().fail(f"not a constant from {_LINEAR:g} on", limit)
    if (limit.shape is None or len(limit.shape) > len(x.shape or ())) and limit.shape != ir.Shape([]):
        return Match().fail("may have more axes", limit)
    return Match()


def _mish_pattern(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Tanh(op.Softplus(x)))


def _is_float(x: ir.Value, **_: Any) -> Match:
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return Match() if known else Match().fail("not known to be a float", x)


class FuseSoftplus(GraphPass):
    """Replace softplus with PyTorch's threshold by ``Softplus(x)``, and ``x * tanh(softplus(x))`` by ``Mish(x)``.

    Before: ``Where(x > 20, x, Softplus(x))``: beyond 15 both are the same float32.
    ``log(1 + exp(x))`` stays: it overflows where the operator does not, and costs ONNX Runtime less.
    """

    name: ClassVar[str] = "fuse-softplus"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every definition."""
        return apply(
            [
                Rule(
                    _guarded_pattern,
                    lambda op, x, **_: op.Softplus(x),
                    _guarded,
                    name="softplus-threshold",
                ),
                Rule(_mish_pattern, lambda op, x, **_: op.Mish(x), _is_float, name="mish"),
            ],
            model,
        )
