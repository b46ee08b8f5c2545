from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.gelu import FuseGelu
from optkit.testing import check_pass

X = np.linspace(-6, 6, 97, dtype=np.float32)
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N] x) => (float[N] y)
<float half = {0.5}, float one = {1}, float two = {2}, float three = {3}, float root = {1.4142135}, float inverse = {0.70710677}, float t = {0.7978846}, float k = {0.044715}, float tk = {0.035677407}> {
  %s
}
"""


@pytest.mark.parametrize(
    "body",
    [
        "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)",
        "d = Mul(x, inverse) e = Erf(d) a = Add(one, e) h = Mul(half, x) y = Mul(h, a)",
        "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(a, half) y = Mul(x, h)",
        "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(a, x) y = Div(m, two)",
    ],
)
def test_every_spelling_with_erf(body):
    # Erf of ONNX Runtime is good to a few 1e-7; values up to 6 multiply it.
    check_pass(FuseGelu(), MODEL % body, ops=["Gelu"], atol=5e-6, x=X)


@pytest.mark.parametrize(
    "body",
    [
        "p = Pow(x, three) q = Mul(p, k) s = Add(x, q) u = Mul(s, t) h = Tanh(u) a = Add(h, one) m = Mul(x, half) y = Mul(m, a)",
        "w = Mul(x, x) v = Mul(w, x) q = Mul(k, v) s = Add(x, q) u = Mul(t, s) h = Tanh(u) a = Add(h, one) m = Mul(x, a) y = Mul(m, half)",
        "w = Mul(x, x) v = Mul(w, k) s = Add(v, one) q = Mul(x, t) u = Mul(q, s) h = Tanh(u) a = Add(h, one) m = Mul(x, a) y = Mul(m, half)",
        "w = Mul(x, x) v = Mul(w, tk) s = Add(v, t) u = Mul(x, s) h = Tanh(u) a = Add(h, one) m = Mul(x, a) y = Mul(m, half)",
    ],
)
def test_every_spelling_with_tanh(body):
    after = check_pass(FuseGelu(), MODEL % body, ops=["Gelu"], atol=5e-6, x=X)
    assert after.graph[0].attributes["approximate"].as_string() == "tanh"


@pytest.mark.parametrize(
    "body",
    [
        "d = Div(x, two) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)",
        "d = Div(x, root) e = Erf(d) a = Add(e, half) m = Mul(x, a) y = Mul(m, half)",
        "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(d, a) y = Mul(m, half)",
        "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, one)",
    ],
)
def test_near_misses_stay(body):
    check_pass(FuseGelu(), MODEL % body, ops=["Div", "Erf", "Add", "Mul", "Mul"], x=X)


def test_each_definition_can_be_left_out():
    body = "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)"
    check_pass(FuseGelu(erf=False), MODEL % body, ops=["Div", "Erf", "Add", "Mul", "Mul"], x=X)


def test_definitions_in_bodies():
    check_pass(
        FuseGelu(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) <float half = {0.5}, float one = {1}, float root = {1.4142135}> {
          y = If (b) <
            then_branch = yes () => (float[N] t) { d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) t = Mul(m, half) },
            else_branch = no () => (float[N] f) { f = Identity(x) }
          >
        }
        """,
        ops=["If", "Gelu", "Identity"],
        b=np.array(True),
    )
