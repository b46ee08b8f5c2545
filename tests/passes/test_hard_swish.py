from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.fusion.hard_swish import FuseHardSwish
from optkit.testing import check_pass

# Both bends, and far on either side of them.
X = np.concatenate([np.linspace(-8, 8, 129), [-3, 3, 0]]).astype(np.float32)
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N] x) => (float[N] y)
<float zero = {0}, float half = {0.5}, float one = {1}, float two = {2}, float three = {3}, float[1] six = {6}, float sixth = {0.16666667}, float fifth = {0.2}> {
  %s
}
"""


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
        "a = Add(three, x) c = Clip(a, zero, six) m = Mul(c, x) y = Mul(sixth, m)",
        "a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(x, d)",
        "a = Add(x, three) c = Clip(a, zero, six) d = Mul(c, sixth) y = Mul(d, x)",
        "a = Add(x, three) c = Clip(a, zero, six) d = Mul(x, sixth) y = Mul(d, c)",
        "a = Add(x, three) c = Max(a, zero) d = Min(c, six) m = Mul(x, d) y = Div(m, six)",
        "a = Add(x, three) c = Min(a, six) d = Max(c, zero) m = Mul(x, d) y = Div(m, six)",
        "a = Add(x, three) c = Relu(a) d = Min(c, six) m = Mul(x, d) y = Div(m, six)",
        "a = Add(x, three) c = Relu(a) d = Clip(c, , six) m = Mul(x, d) y = Div(m, six)",
        "s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(s, x)",
    ],
)
def test_every_spelling_of_hard_swish(body):
    # Values up to 8, two roundings more or less.
    check_pass(FuseHardSwish(), MODEL % body, ops=["HardSwish"], atol=2e-6, x=X)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)",
        "a = Add(x, three) c = Clip(a, zero, six) y = Mul(c, sixth)",
        "a = Add(x, three) d = Div(a, six) y = Clip(d, zero, one)",
        "a = Mul(x, fifth) b = Add(a, half) y = Clip(b, zero, one)",
        "a = Mul(x, fifth) b = Add(half, a) c = Max(b, zero) y = Min(c, one)",
    ],
)
def test_every_spelling_of_hard_sigmoid(body):
    check_pass(FuseHardSwish(), MODEL % body, ops=["HardSigmoid"], atol=1e-6, x=X)


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        (
            "a = Add(x, two) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",
            ["Add", "Clip", "Mul", "Div"],
        ),
        (
            "a = Add(x, three) c = Clip(a, one, six) m = Mul(x, c) y = Div(m, six)",
            ["Add", "Clip", "Mul", "Div"],
        ),
        (
            "a = Add(x, three) c = Clip(a, zero, three) m = Mul(x, c) y = Div(m, six)",
            ["Add", "Clip", "Mul", "Div"],
        ),
        (
            "a = Add(x, three) c = Clip(a, zero, six) m = Mul(a, c) y = Div(m, six)",
            ["Add", "Clip", "Mul", "Div"],
        ),
        (
            "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(six, m)",
            ["Add", "Clip", "Mul", "Div"],
        ),
        ("a = Mul(x, fifth) b = Add(a, half) y = Clip(b, zero, six)", ["Mul", "Add", "Clip"]),
        ("a = Mul(x, x) b = Add(a, half) y = Clip(b, zero, one)", ["Mul", "Add", "Clip"]),
        ("s = HardSigmoid(x) y = Mul(x, s)", ["HardSigmoid", "Mul"]),
    ],
)
def test_near_misses_stay(body, ops):
    check_pass(FuseHardSwish(), MODEL % body, ops=ops, x=X)


def test_a_part_that_others_read_stays():
    check_pass(
        FuseHardSwish(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, float[N] z) <float zero = {0}, float three = {3}, float six = {6}> {
          a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six) z = Relu(c)
        }
        """,
        ops=["Add", "Clip", "Mul", "Div", "Relu"],
    )
