from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.instance_norm import FuseInstanceNorm
from optkit.testing import check_pass, parse

RANDOM = np.random.default_rng(0)
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4, H, 6] x) => (float[A, B, C, D] y)
<float eps = {1e-5}, float one = {1}, float two = {2}, int64[2] space = {2, 3}, int64[2] negative = {-1, -2}, int64[2] other = {1, 2}> {
  %s
}
"""
HEAD = "m = ReduceMean(x, space) d = Sub(x, m) q = Pow(d, two) v = ReduceMean(q, space) e = Add(v, eps)"
TAIL = "s = Mul(n, scale) y = Add(s, bias)"


def model(body: str, source: str = MODEL):
    def floats(*shape):
        return RANDOM.standard_normal(shape).astype(np.float32)

    weights = {"scale": floats(1, 4, 1, 1), "bias": floats(4, 1, 1), "wide": floats(4, 1, 6)}
    return parse(source % body, **weights)


@pytest.mark.parametrize(
    "body",
    [
        f"{HEAD} r = Sqrt(e) n = Div(d, r) {TAIL}",
        f"{HEAD.replace('space', 'negative')} r = Sqrt(e) n = Div(d, r) {TAIL}",
        f"{HEAD.replace('Pow(d, two)', 'Mul(d, d)')} r = Sqrt(e) i = Reciprocal(r) n = Mul(d, i) {TAIL}",
        f"{HEAD} r = Sqrt(e) i = Div(one, r) n = Mul(d, i) s = Mul(scale, n) y = Add(bias, s)",
        f"{HEAD} r = Sqrt(e) y = Div(d, r)",
    ],
)
def test_every_spelling(body):
    # Sums of up to 30 terms around 1, divided by a deviation around 1.
    after = check_pass(FuseInstanceNorm(), model(body), ops=["InstanceNormalization"], atol=2e-5, rtol=2e-5)
    assert after.graph[0].attributes.get_float("epsilon") == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "body",
    [
        f"{HEAD.replace('space', 'other')} r = Sqrt(e) y = Div(d, r)",
        f"{HEAD.replace('Pow(d, two)', 'Pow(x, two)')} r = Sqrt(e) y = Div(d, r)",
        f"{HEAD.replace('Sub(x, m)', 'Sub(m, x)')} r = Sqrt(e) y = Div(d, r)",
        f"{HEAD.replace('eps', 'scale')} r = Sqrt(e) y = Div(d, r)",
    ],
)
def test_near_misses_stay(body):
    before = model(body)
    after = check_pass(FuseInstanceNorm(), before)
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]


def test_scales_that_are_not_one_for_each_channel_stay_outside():
    body = f"{HEAD} r = Sqrt(e) n = Div(d, r) s = Mul(n, wide) y = Add(s, bias)"
    after = check_pass(FuseInstanceNorm(), model(body), atol=2e-5, rtol=2e-5)
    assert [n.op_type for n in after.graph] == ["InstanceNormalization", "Mul", "Add"]


def test_the_last_of_three_axes_is_left_to_the_layer_norm():
    source = MODEL.replace("float[N, 4, H, 6] x", "float[N, 4, 6] x").replace("A, B, C, D", "A, B, C")
    source = source.replace("int64[2] space = {2, 3}", "int64[1] space = {2}")
    body = f"{HEAD} r = Sqrt(e) y = Div(d, r)"
    ops = ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div"]
    check_pass(FuseInstanceNorm(), model(body, source), ops=ops)


def test_unknown_channels_stay():
    source = MODEL.replace("float[N, 4, H, 6] x", "float[N, K, H, 6] x")
    body = f"{HEAD} r = Sqrt(e) y = Div(d, r)"
    ops = ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div"]
    check_pass(FuseInstanceNorm(), model(body, source), ops=ops)
