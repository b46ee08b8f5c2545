"""Operators that ONNX Runtime computes faster from their definition than with its own kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.graph import walk
from optkit.rewrite import Match, Rule, apply

# Beyond, tanh(softplus(x)) is 1 even in float64, and exp(x) squared is far from overflow.
_SATURATED = 20.0


def _mish_check(x: ir.Value, **_: Any) -> Match:
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return Match() if known else Match().fail("exp(x) squared overflows narrower floats", x)


def _mish(op: Any, x: ir.Value, **_: Any) -> Any:
    """``tanh(log(1 + e)) = n / (n + 2)`` with ``n = e * (e + 2)`` and ``e = exp(x)``: nothing cancels."""
    assert x.dtype is not None
    kind = x.dtype.numpy()
    two = op.constant(np.asarray(2, kind), "two")
    e = op.Exp(op.Min(x, np.asarray(_SATURATED, kind)))
    n = op.Mul(e, op.Add(e, two))
    return op.Mul(x, op.Div(n, op.Add(n, two)))


_RULES = {"Mish": Rule(lambda op, x: op.Mish(x), _mish, _mish_check, name="spell-mish")}


def spelled(model: ir.Model) -> ir.Model:
    """``model``, or a copy of it where some operator is better written out. Weights are shared.

    ONNX Runtime has no kernel for Mish and computes ``x * tanh(softplus(x))`` with a Softplus that calls the C library
    for each element.
    """
    if not any(node.domain == "" and node.op_type in _RULES for node in walk(model)):
        return model
    copy = model.clone()
    apply(list(_RULES.values()), copy)
    return copy
