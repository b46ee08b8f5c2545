from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.rms_norm import FuseRmsNorm
from optkit.testing import check_pass, parse

RANDOM = np.random.default_rng(0)
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 5, 8] x) => (float[A, B, C] y)
<float eps = {1e-5}, float half = {0.5}, float minus = {-0.5}, float one = {1}, float two = {2}, float three = {3}, int64[1] last = {-1}, int64[1] second = {1}> {
  %s
}
"""
HEAD = "q = Pow(x, two) v = ReduceMean(q, last) e = Add(v, eps)"
CANONICAL = ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]


def model(body: str):
    return parse(
        MODEL % body,
        scale=RANDOM.standard_normal(8).astype(np.float32),
        full=RANDOM.standard_normal((1, 1, 8)).astype(np.float32),
        column=RANDOM.standard_normal((5, 1)).astype(np.float32),
        number=RANDOM.standard_normal(1).astype(np.float32),
    )


@pytest.mark.parametrize(
    "body",
    [
        # torch.onnx.export(dynamo=True), transformers 5: x * rsqrt(...), then the weight.
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, scale)",
        # The same from the TorchScript exporter.
        f"{HEAD} r = Sqrt(e) i = Div(one, r) n = Mul(x, i) y = Mul(scale, n)",
        f"{HEAD} r = Sqrt(e) n = Div(x, r) y = Mul(n, full)",
        f"{HEAD} r = Pow(e, half) n = Div(x, r) y = Mul(n, scale)",
        f"{HEAD} r = Pow(e, minus) n = Mul(x, r) y = Mul(n, scale)",
        f"{HEAD.replace('Pow(x, two)', 'Mul(x, x)')} r = Sqrt(e) n = Div(x, r) y = Mul(n, scale)",
        # TensorFlow: the scale first.
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) f = Mul(i, scale) y = Mul(x, f)",
    ],
)
def test_every_spelling_becomes_the_one_that_runtimes_know(body):
    # A mean of 8 squares around 1, a root and two products: a few roundings each.
    check_pass(FuseRmsNorm(), model(body), ops=CANONICAL, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "body",
    [
        f"{HEAD} r = Sqrt(e) n = Div(x, r) y = Mul(n, scale)",
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) y = Mul(x, i)",
        f"{HEAD.replace('last', 'second')} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, scale)",
        f"{HEAD.replace('two', 'three')} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, scale)",
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, column)",
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, number)",
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) n = Mul(q, i) y = Mul(n, scale)",
        f"{HEAD.replace('eps', 'scale')} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, scale)",
        f"{HEAD} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) w = Abs(x) y = Mul(n, w)",
    ],
)
def test_near_misses_stay(body):
    before = model(body)
    after = check_pass(FuseRmsNorm(), before)
    assert [n.op_type for n in after.graph] == [n.op_type for n in before.graph]
