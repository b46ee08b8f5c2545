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
