from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.sigmoid import FuseSigmoid
from optkit.passes.fusion.softplus import FuseSoftplus
from optkit.testing import check_pass

X = np.linspace(-30, 30, 121, dtype=np.float32)
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N] x, float[N] z) => (float[N] y)
<float one = {1}, float two = {2}, float minus = {-1}, float limit = {%s}> {
  %s
}
"""
HEAD = "n = Neg(x) e = Exp(n) a = Add(e, one)"


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (f"{HEAD} y = Div(one, a)", ["Sigmoid"]),
        (f"{HEAD.replace('Neg(x)', 'Mul(x, minus)')} y = Reciprocal(a)", ["Sigmoid"]),
        (f"{HEAD.replace('Add(e, one)', 'Add(one, e)')} y = Div(x, a)", ["Sigmoid", "Mul"]),
    ],
)
def test_sigmoid_in_every_spelling(body, ops):
    check_pass(FuseSigmoid(), MODEL % ("20", body), ops=ops, x=X, z=X)


@pytest.mark.parametrize(
    "body",
    [
        f"{HEAD} y = Div(two, a)",
        f"{HEAD} y = Div(z, a)",
        f"{HEAD.replace('Neg(x)', 'Abs(x)')} y = Div(one, a)",
        f"{HEAD.replace('one', 'two')} y = Div(one, a)",
    ],
)
def test_what_is_no_sigmoid_stays(body):
    after = check_pass(FuseSigmoid(), MODEL % ("20", body), x=X, z=X)
    assert [n.op_type for n in after.graph][1:] == ["Exp", "Add", "Div"]


GUARD = "p = Softplus(x) g = Greater(x, limit) y = Where(g, x, p)"


@pytest.mark.parametrize("limit", ["20", "15"])
def test_softplus_needs_no_threshold(limit):
    check_pass(FuseSoftplus(), MODEL % (limit, GUARD), ops=["Softplus"], x=X, z=X)
    other = "p = Softplus(x) g = LessOrEqual(x, limit) y = Where(g, p, x)"
    check_pass(FuseSoftplus(), MODEL % (limit, other), ops=["Softplus"], x=X, z=X)


@pytest.mark.parametrize(
    ("limit", "body"),
    [
        ("5", GUARD),
        ("20", GUARD.replace("Where(g, x, p)", "Where(g, z, p)")),
        ("20", GUARD.replace("Where(g, x, p)", "Where(g, p, x)")),
        ("20", GUARD.replace("Greater(x, limit)", "Greater(z, limit)")),
    ],
)
def test_thresholds_that_change_something_stay(limit, body):
    check_pass(FuseSoftplus(), MODEL % (limit, body), ops=["Softplus", "Greater", "Where"], x=X, z=X)


def test_mish():
    body = "p = Softplus(x) t = Tanh(p) y = Mul(t, x)"
    check_pass(FuseSoftplus(), MODEL % ("20", body), ops=["Mish"], x=X, z=X)


@pytest.mark.parametrize(
    "body", ["p = Softplus(x) t = Tanh(p) y = Mul(t, z)", "p = Softplus(x) t = Tanh(p) y = Add(t, x)"]
)
def test_what_is_no_mish_stays(body):
    after = check_pass(FuseSoftplus(), MODEL % ("20", body), x=X, z=X)
    assert [n.op_type for n in after.graph][:2] == ["Softplus", "Tanh"]
