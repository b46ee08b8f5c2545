"""Graphs become calls of kernels, and near misses stay."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
WEIGHTS = {
    "scale": np.linspace(0.5, 1.5, 32, dtype=np.float32),
    "bias": np.linspace(-1, 1, 32, dtype=np.float32),
}


def call(text, **options):
    context = options.pop("context", H100)
    weights = {
        k: v
        for k, v in {**WEIGHTS, **options.pop("weights", {})}.items()
        if f"{k})" in text or f"{k}," in text
    }
    return check_pass(CallKernels(), parse(text, **weights), context=context, **options)


LAYER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 7, 32] x) => (float[N, 7, 32] y) {
  y = LayerNormalization <axis = %s, epsilon = 0.001> (x, scale, bias)
}
"""
PRE_NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 32] x, float[N, 32] r) => (float[N, 32] y) {
  t = Add (x, r)
  n = LayerNormalization <axis = -1> (t, scale, bias)
  e = Exp (n)
  y = Add (t, e)
}
"""
RMS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 32] x, float[N, 32] r) => (float[N, 32] y) <float two = {2}, int64[1] last = {-1}, float e = {1e-5}> {
  t = Add (x, r)
  p = Pow (t, two)
  m = ReduceMean <keepdims = %s> (p, last)
  a = Add (m, e)
  d = Sqrt (a)
  q = Div (t, d)
  n = Mul (q, scale)
  y = Add (t, n)
}
"""


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_layer_normalization_is_a_kernel(axis):
    after = call(LAYER % axis, ops=["LayerNorm"])
    (node,) = walk(after)
    assert node.domain == "optkit"
    assert np.isclose(node.attributes["epsilon"].value, 0.001)


def test_normalization_of_more_axes_is_left_alone():
    weights = {name: np.ones((7, 32), np.float32) for name in WEIGHTS}
    call(LAYER % "1", ops=["LayerNormalization"], weights=weights)


def test_a_sum_that_others_read_leaves_the_kernel_too():
    after = call(PRE_NORM, ops=["AddLayerNorm", "Exp", "Add"])
    node = next(iter(walk(after)))
    assert node.outputs[1].uses()


def test_a_sum_that_is_read_before_is_added_apart():
    text = PRE_NORM.replace("  n = Layer", "  s = Exp (t)\n  n = Layer").replace("Add (t, e)", "Add (s, e)")
    call(text, ops=["Add", "Exp", "LayerNorm", "Exp", "Add"])


def test_a_sum_that_is_an_output_keeps_its_name():
    text = PRE_NORM.replace("=> (", "=> (float[N, 32] t, ")
    call(text, ops=["AddLayerNorm", "Exp", "Add"])


def test_a_residual_of_another_shape_is_added_apart():
    text = PRE_NORM.replace("float[N, 32] r", "float[32] r")
    call(text, ops=["Add", "LayerNorm", "Exp", "Add"])


def test_rms_normalization_with_its_residual_is_a_kernel():
    call(RMS % "1", ops=["AddRmsNorm", "Add"])


def test_rms_normalization_alone_is_a_kernel():
    text = (RMS % "1").replace("t = Add (x, r)", "t = Exp (x)").replace("y = Add (t, n)", "y = Add (r, n)")
    call(text, ops=["Exp", "RmsNorm", "Add"])


@pytest.mark.parametrize(("old", "new"), [("<float two = {2}", "<float two = {3}"), ("{-1}", "{0}")])
def test_other_definitions_are_left_alone(old, new):
    after = call((RMS % "1").replace(old, new))
    assert not [n for n in walk(after) if n.domain == "optkit"]


def test_rows_that_cannot_be_read_16_bytes_at_a_time_are_left_alone():
    weights = {name: np.ones(24, np.float32) for name in WEIGHTS}
    call((LAYER % "-1").replace("32]", "24]"), ops=["LayerNormalization"], weights=weights)


def test_rows_too_long_for_registers_are_left_alone():
    weights = {name: np.ones(8208, np.float32) for name in WEIGHTS}
    call((LAYER % "-1").replace("32]", "8208]"), ops=["LayerNormalization"], weights=weights)


@pytest.mark.parametrize("name", ["cpu", "t4"])
def test_targets_without_kernels_stay_as_they_are(name):
    call(LAYER % "-1", ops=["LayerNormalization"], context=Context(target=target(name)))


def test_kernels_can_be_chosen():
    after = check_pass(
        CallKernels(kernels=("layer-norm",)), parse(PRE_NORM, **WEIGHTS), context=H100,
        ops=["Add", "LayerNorm", "Exp", "Add"],
    )  # fmt: skip
    assert len(after.functions) == 1


GATED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, %s] g, float[N, %s] u) => (float[N, 32] y) {
  %s
}
"""


@pytest.mark.parametrize(
    ("nodes", "kernel"),
    [
        ("s = Sigmoid (g) a = Mul (g, s) y = Mul (a, u)", "SwiGlu"),
        ("s = Sigmoid (g) a = Mul (s, u) y = Mul (g, a)", "SwiGlu"),
        ("s = Sigmoid (g) a = Mul (u, g) y = Mul (a, s)", "SwiGlu"),
        ("a = Gelu (g) y = Mul (u, a)", "GeGlu"),
    ],
)
def test_a_gated_activation_is_a_kernel(nodes, kernel):
    call(GATED % (32, 32, nodes), ops=[kernel])


@pytest.mark.parametrize(
    ("gate", "up", "nodes", "ops"),
    [
        (32, 32, 'a = Gelu <approximate = "tanh"> (g) y = Mul (u, a)', ["Gelu", "Mul"]),
        (32, 1, "a = Gelu (g) y = Mul (a, u)", ["Gelu", "Mul"]),
        (32, 32, "s = Sigmoid (u) a = Mul (g, s) y = Mul (a, u)", ["SwiGlu"]),
        (32, 32, "s = Tanh (g) a = Mul (g, s) y = Mul (a, u)", ["Tanh", "Mul", "Mul"]),
        (32, 32, "s = Sigmoid (g) a = Mul (s, s) y = Mul (a, u)", ["Sigmoid", "Mul", "Mul"]),
    ],
)
def test_other_gates_are_left_alone(gate, up, nodes, ops):
    call(GATED % (gate, up, nodes), ops=ops)


PRODUCT = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 3, 16] x) => (float16[N, 3, 32] y) {
  %s
}
"""
HALVES = {
    "w": (np.arange(512).reshape(16, 32) % 7 / 8 - 0.4).astype(np.float16),
    "b": np.linspace(-1, 1, 32).astype(np.float16),
}


@pytest.mark.parametrize(
    ("nodes", "ops"),
    [
        ("y = MatMul (x, w)", ["MatMul"]),
        ("p = MatMul (x, w) y = Add (b, p)", ["Linear"]),
        ("p = MatMul (x, w) s = Add (p, b) y = Relu (s)", ["LinearRelu"]),
        ("p = MatMul (x, w) s = Add (p, b) y = Gelu (s)", ["LinearGelu"]),
        ('p = MatMul (x, w) s = Add (p, b) y = Gelu <approximate = "tanh"> (s)', ["Linear", "Gelu"]),
        ("p = MatMul (x, w) s = Exp (p) y = Add (s, b)", ["MatMul", "Exp", "Add"]),
    ],
)
def test_a_product_with_what_follows_is_a_kernel(nodes, ops):
    # Halves: a rounding of the product more or less is 2**-11 of values up to 8.
    after = check_pass(
        CallKernels(), parse(PRODUCT % nodes, **HALVES), context=H100, ops=ops, atol=8e-3, rtol=2e-3
    )
    assert next(iter(walk(after))).domain == "optkit"


def test_products_in_float32_and_of_two_activations_are_left_alone():
    text = PRODUCT.replace("float16", "float") % "y = MatMul (x, w)"
    after = check_pass(CallKernels(), parse(text, w=HALVES["w"].astype(np.float32)), context=H100)
    assert [n.domain for n in walk(after)] == [""]
    both = PRODUCT.replace("x)", "x, float16[16, 32] w)") % "y = MatMul (x, w)"
    after = check_pass(CallKernels(), parse(both), context=H100, atol=8e-3)
    assert [n.domain for n in walk(after)] == [""]


def test_matrices_that_are_not_read_16_bytes_at_a_time_are_left_alone():
    text = PRODUCT.replace("32]", "24]") % "y = MatMul (x, w)"
    after = check_pass(CallKernels(), parse(text, w=HALVES["w"][:, :24].copy()), context=H100, atol=8e-3)
    assert [n.domain for n in walk(after)] == [""]
