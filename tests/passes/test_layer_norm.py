from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.layer_norm import FuseLayerNorm
from optkit.testing import check_pass, parse

RANDOM = np.random.default_rng(0)
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 5, 8] x) => (float[A, B, C] y)
<float eps = {1e-5}, float half = {0.5}, float minus = {-0.5}, float one = {1}, float two = {2}, int64[1] last = {-1}, int64[2] both = {1, 2}, int64[1] second = {1}> {
  %s
}
"""
HEAD = "m = ReduceMean(x, last) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, last) e = Add(v, eps)"


def model(body: str):
    return parse(
        MODEL % body,
        scale=RANDOM.standard_normal(8).astype(np.float32),
        bias=RANDOM.standard_normal(8).astype(np.float32),
        wide=RANDOM.standard_normal((5, 8)).astype(np.float32),
        column=RANDOM.standard_normal((5, 1)).astype(np.float32),
        full=RANDOM.standard_normal((1, 1, 8)).astype(np.float32),
    )


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (f"{HEAD} r = Sqrt(e) n = Div(d, r) s = Mul(n, scale) y = Add(s, bias)", 3),
        (f"{HEAD} r = Sqrt(e) n = Div(d, r) s = Mul(scale, n) y = Add(bias, s)", 3),
        (f"{HEAD} r = Sqrt(e) n = Div(d, r) s = Mul(n, full) y = Add(s, full)", 3),
        (f"{HEAD} r = Sqrt(e) n = Div(d, r) y = Mul(n, scale)", 2),
        (f"{HEAD} r = Sqrt(e) y = Div(d, r)", 2),
        (f"{HEAD} r = Pow(e, half) n = Div(d, r) s = Mul(n, scale) y = Add(s, bias)", 3),
        (f"{HEAD} r = Pow(e, minus) n = Mul(d, r) s = Mul(n, scale) y = Add(s, bias)", 3),
        (f"{HEAD} r = Sqrt(e) i = Reciprocal(r) n = Mul(d, i) s = Mul(n, scale) y = Add(s, bias)", 3),
        (f"{HEAD.replace('Pow(d, two)', 'Mul(d, d)')} r = Sqrt(e) i = Div(one, r) n = Mul(i, d) s = Mul(n, scale) y = Add(s, bias)", 3),
        (f"{HEAD.replace('last', 'both')} r = Sqrt(e) n = Div(d, r) s = Mul(n, wide) y = Add(s, wide)", 3),
        # TensorFlow
        (f"{HEAD} r = Sqrt(e) i = Reciprocal(r) f = Mul(i, scale) p = Mul(x, f) o = Mul(m, f) b = Sub(bias, o) y = Add(p, b)", 3),
    ],
)  # fmt: skip
def test_every_spelling(body, inputs):
    # Sums of 8 (or 40) terms around 1, divided by a deviation around 1.
    after = check_pass(FuseLayerNorm(), model(body), ops=["LayerNormalization"], atol=2e-5, rtol=2e-5)
    assert len(after.graph[0].inputs) == inputs
    assert after.graph[0].attributes.get_float("epsilon") == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "body",
    [
        f"{HEAD.replace('last', 'second')} r = Sqrt(e) y = Div(d, r)",
        f"{HEAD.replace('Pow(d, two)', 'Pow(x, two)')} r = Sqrt(e) y = Div(d, r)",
        f"{HEAD.replace('v = ReduceMean(q, last)', 'v = ReduceMean(q, second)')} r = Sqrt(e) y = Div(d, r)",
        f"{HEAD} r = Sqrt(e) y = Div(x, r)",
        "m = ReduceMean(x, last) d = Sub(x, m) q = Pow(d, two) v = ReduceSum(q, last) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)",
    ],
)
def test_near_misses_stay(body):
    # Positive, so that no root of a negative number is taken.
    feeds = {"x": np.abs(RANDOM.standard_normal((3, 5, 8))).astype(np.float32)}
    source = model(body)
    check_pass(FuseLayerNorm(), source, ops=[node.op_type for node in source.graph], **feeds)


def test_a_scale_for_another_axis_is_no_part_of_it():
    source = model(f"{HEAD} r = Sqrt(e) n = Div(d, r) y = Mul(n, column)")
    check_pass(FuseLayerNorm(), source, ops=["LayerNormalization", "Mul"], atol=2e-5)


def test_the_mean_that_others_read_stays():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 8] x) => (float[N, 8] y, float[N, 1] z) <float eps = {1e-5}, float two = {2}, int64[1] last = {-1}> {
          m = ReduceMean(x, last) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, last) e = Add(v, eps)
          r = Sqrt(e) y = Div(d, r) z = Neg(m)
        }
        """
    )
    check_pass(FuseLayerNorm(), source, ops=[node.op_type for node in source.graph])
