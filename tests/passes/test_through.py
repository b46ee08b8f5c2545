from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.passes.quantization.through import felt, through
from optkit.reference import ReferenceSession
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 22]>\n'
X = np.linspace(-12, 12, 1001).astype(np.float32)


def _model(body: str, outputs: str = "float[1001] y") -> ir.Model:
    return parse(f"{HEAD}agraph (float[1001] x, float bound) => ({outputs}) {{ {body} }}")


FUNCTIONS = {
    "Clip": "low = Constant <value_float = -1.0> () high = Constant <value_float = 5.0> () y = Clip (x, low, high)",
    "Clip above": "high = Constant <value_float = 5.0> () y = Clip (x, , high)",
    "Gelu": "y = Gelu (x)",
    "Gelu, tanh": 'y = Gelu <approximate = "tanh"> (x)',
    "HardSigmoid": "y = HardSigmoid (x)",
    "HardSigmoid, steep": "y = HardSigmoid <alpha = 0.5, beta = 0.25> (x)",
    "HardSwish": "y = HardSwish (x)",
    "Mish": "y = Mish (x)",
    "Relu": "y = Relu (x)",
    "Sigmoid": "y = Sigmoid (x)",
    "Softplus": "y = Softplus (x)",
    "Swish": "s = Sigmoid (x) y = Mul (x, s)",
    "Swish, turned": "s = Sigmoid (x) y = Mul (s, x)",
    "Tanh": "y = Tanh (x)",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_is_what_onnx_runtime_computes(name):
    model = _model(FUNCTIONS[name])
    function = through(model.graph.inputs[0])
    assert function is not None
    expected = ReferenceSession(model).run({"x": X, "bound": np.array(1, np.float32)})["y"]
    np.testing.assert_allclose(function(X.astype(np.float64)), expected, atol=5e-4)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = HardSwish (x)", "float[1001] y, float[1001] x"),
        ("h = HardSwish (x) y = Add (h, x)", "float[1001] y"),
        ("h = HardSwish (x) g = Relu (x) y = Add (h, g)", "float[1001] y"),
        ("s = Sigmoid (x) t = Tanh (s) y = Mul (x, t)", "float[1001] y"),
        ("s = Sigmoid (x) y = Mul (x, s)", "float[1001] y, float[1001] s"),
        ("s = Sigmoid (x) y = Add (x, s)", "float[1001] y"),
        ("y = Clip (x, bound)", "float[1001] y"),
        ("y = Clip (x)", "float[1001] y"),
        ("y = LeakyRelu (x)", "float[1001] y"),
        ("y = Identity (x)", "float[1001] y"),
    ],
)
def test_near_misses_let_everything_through(body, outputs):
    assert through(_model(body, outputs).graph.inputs[0]) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HardSwish", (-3, 12)),
        ("Relu", (0, 12)),
        ("Clip", (-1, 5)),
        ("Clip above", (-12, 5)),
        ("HardSigmoid", (-2.5, 2.5)),
        ("HardSigmoid, steep", (-0.5, 1.5)),
        # Where 1 / (1 + exp(-x)) is within 1/1024 of 0 and 1.
        ("Sigmoid", (-6.93, 6.93)),
    ],
)
def test_nothing_is_felt_where_the_function_is_flat(name, expected):
    function = through(_model(FUNCTIONS[name]).graph.inputs[0])
    assert felt(-12.0, 12.0, function) == pytest.approx(expected, abs=0.04)


def test_a_range_that_is_felt_as_a_whole_or_is_one_point_stays():
    function = through(_model("y = HardSwish (x)").graph.inputs[0])
    assert felt(-1.0, 2.0, function) == pytest.approx((-1.0, 2.0), abs=0.02)
    assert felt(1.0, 1.0, function) == (1.0, 1.0)
    # All of it is flat: nothing is gained, and a range of nothing would be no range.
    assert felt(-9.0, -4.0, function) == (-9.0, -4.0)


@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    low=st.floats(-1e3, 1e3),
    width=st.floats(1e-3, 1e3),
)
@settings(deadline=None)
def test_what_is_cut_off_changes_the_outputs_by_a_thousandth_of_their_range_at_most(name, low, width):
    function = through(_model(FUNCTIONS[name]).graph.inputs[0])
    high = low + width
    left, right = felt(low, high, function)
    assert low <= left <= right <= high
    x = np.linspace(low, high, 4096)
    y = function(x)
    assert np.abs(y - function(np.clip(x, left, right))).max() <= np.ptp(y) / 1024 * (1 + 1e-9)
