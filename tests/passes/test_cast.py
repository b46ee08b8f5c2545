from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from optkit.data import CalibrationData
from optkit.graph import verify
from optkit.passes.base import Context
from optkit.passes.lowering.cast import CastFloats
from optkit.passes.lowering.kernels import CallKernels
from optkit.targets import target
from optkit.testing import check_pass, parse

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] b = {0.5, -1, 2}> {
  m = MatMul(x, w)
  s = %s
  y = Add(s, b)
}
"""

# Eleven bits of significand: a product of four terms is off by a few units of 2^-11.
HALF = {"atol": 4e-2, "rtol": 4 * 2.0**-11}


def test_products_are_cast_and_softmax_stays_in_float32():
    after = check_pass(
        CastFloats(),
        MODEL % "Softmax(m)",
        ops=["Cast", "MatMul", "Cast", "Softmax", "Cast", "Add", "Cast"],
        **HALF,
    )
    assert [v.dtype for v in (*after.graph.inputs, *after.graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert {str(v.const_value.dtype) for v in after.graph.initializers.values()} == {"FLOAT16"}


def test_neighbours_in_half_precision_share_no_casts():
    check_pass(CastFloats(), MODEL % "Relu(m)", ops=["Cast", "MatMul", "Relu", "Add", "Cast"], **HALF)


def test_what_the_recipe_keeps_is_kept():
    check_pass(
        CastFloats(keep=("MatMul", "Relu")),
        MODEL % "Relu(m)",
        ops=["MatMul", "Relu", "Cast", "Add", "Cast"],
        **HALF,
    )


def test_values_beyond_half_precision_keep_their_nodes_in_float32():
    context = Context(target=target("cpu"), data=CalibrationData([{"x": np.full((1, 4), 4000, np.float32)}]))
    # 4000 * (1 + 4 + 7 + 10) = 88,000 is beyond 65,504; 4000 is not, but nothing is left to cast.
    check_pass(CastFloats(), MODEL % "Relu(m)", ops=["MatMul", "Relu", "Add"], context=context)


def test_a_constant_beyond_half_precision_keeps_its_node_in_float32():
    text = (MODEL % "Relu(m)").replace("float[3] b = {0.5, -1, 2}", "float[3] b = {0.5, -1, -3.4e38}")
    check_pass(CastFloats(), text, ops=["Cast", "MatMul", "Relu", "Cast", "Add"], **HALF)


def test_scales_of_resize_stay_in_float32():
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[4] s = {1, 1, 2, 2}> { y = Resize<mode = "nearest">(x, , s) }
    """
    check_pass(CastFloats(), text, ops=["Cast", "Resize", "Cast"], **HALF)


PLACES = """
<ir_version: 10, opset_import: ["" : 21]>
g (int64[N] x, float[N, 4] h) => (float[N, 4] y) <float[4] rates = {1, 0.3, 0.1, 0.03}, int64[2] tall = {-1, 1}, float four = {4}> {
  p = Reshape (x, tall)
  f = Cast <to = 1> (p)
  a = Mul (f, rates)
  s = Sin (%s)
  y = Mul (s, h)
}
"""


def test_angles_of_places_are_computed_in_float32():
    ops = ["Cast", "Reshape", "Cast", "Mul", "Sin", "Cast", "Mul", "Cast"]
    # 40001 has no float16, and an error of 16 in an angle is any error.
    check_pass(CastFloats(), PLACES % "a", ops=ops, x=np.array([3, 2049, 40001]), **HALF)


def test_sines_of_what_layers_compute_are_cast():
    text = (
        (PLACES % "t")
        .replace("  s =", "  t = Mul (h, four)\n  r = Relu (t)\n  s =")
        .replace("Sin (t)", "Sin (r)")
    )
    after = check_pass(CastFloats(), text, x=np.array([3, 4, 5]), **HALF)
    (sine,) = (n for n in after.graph if n.op_type == "Sin")
    assert sine.outputs[0].dtype == ir.DataType.FLOAT16


POWERS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float half = {0.5}, float tiny = {1e-10}> {
  h = Mul (x, half)
  r = Relu (h)
  p = Mul (r, r)
  f = MatMul (p, w)
  t = Max (f, tiny)
  l = %s (t)
  y = Mul (l, half)
}
"""


def test_what_logarithms_are_taken_of_is_computed_in_float32():
    # Powers of 1e-4 are 1e-8, of which float16 leaves 0; Relu, which they are of, is the last that could lose them.
    ops = ["Cast", "Mul", "Cast", "Relu", "Mul", "MatMul", "Max", "Log", "Cast", "Mul", "Cast"]
    x = np.array([[2e-4, 4e-4, 1e-3, 2.0], [2e-4, 2e-4, 2e-4, 2e-4]], np.float32)
    check_pass(CastFloats(), POWERS % "Log", ops=ops, x=x, **HALF)


def test_what_no_logarithm_is_taken_of_is_cast():
    check_pass(
        CastFloats(keep=()),
        POWERS % "Sqrt",
        ops=["Cast", "Mul", "Relu", "Mul", "MatMul", "Max", "Sqrt", "Mul", "Cast"],
        **HALF,
    )


def test_bfloat16_has_the_range_of_logarithms():
    model = parse(POWERS % "Log")
    CastFloats(to="bf16").run(model, Context(target=target("cpu")))
    assert next(n for n in model.graph if n.op_type == "MatMul").outputs[0].dtype == ir.DataType.BFLOAT16


NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 32] x, float[N, 32] r) => (float[N, 32] y) {
  t = Add (x, r)
  n = LayerNormalization <axis = -1> (t, s, b)
  y = Add (t, n)
}
"""


def test_norms_that_are_calls_of_kernels_come_and_go_in_half_precision():
    model = parse(
        NORM, s=np.linspace(0.5, 1.5, 32, dtype=np.float32), b=np.linspace(-1, 1, 32, dtype=np.float32)
    )
    context = Context(target=target("h100"))
    CallKernels().run(model, context)
    after = check_pass(
        CastFloats(), model, context=context, ops=["Cast", "Cast", "AddLayerNorm", "Add", "Cast"], **HALF
    )
    assert {v.dtype for v in after.graph[2].outputs} == {ir.DataType.FLOAT16}


def test_bfloat16_needs_no_range():
    model = parse((MODEL % "Relu(m)").replace("float[3] b = {0.5, -1, 2}", "float[3] b = {0.5, -1, 1e30}"))
    CastFloats(to="bf16").run(model, Context(target=target("cpu")))
    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "Relu", "Add", "Cast"]
    assert model.graph[1].outputs[0].dtype == ir.DataType.BFLOAT16


def test_float32s_lowest_number_stays_finite_in_bfloat16():
    """The nearest number is minus infinity, with which a query whose keys are all hidden gives NaN."""
    model = parse(
        (MODEL % "Relu(m)").replace(", float[3] b = {0.5, -1, 2}", ""),
        b=np.array([np.finfo(np.float32).min, -np.inf, -1e30], np.float32),
    )
    CastFloats(to="bf16").run(model, Context(target=target("cpu")))
    b = model.graph[3].inputs[1].const_value.numpy().astype(np.float32)
    np.testing.assert_array_equal(b[:2], [float(ml_dtypes.finfo(ml_dtypes.bfloat16).min), -np.inf])
    np.testing.assert_allclose(b[2], -1e30, rtol=2.0**-8)


ATTENTION = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[B, 2, T, 16] q, float[B, 2, T, 16] k, float[B, 2, T, 16] v, float[B, T, T] mask%s) => (float[B, 2, T, 16] y) {
  one = Constant <value_ints = [1]> ()
  %s
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  s = MatMul(q, t)
  h = Add(s, m)
  w = Softmax <axis = -1> (h)
  y = MatMul(w, v)
}
"""
MASKS = {
    "from outside": ("", "m = Unsqueeze(mask, one)"),
    "out of a choice": (
        ", bool c",
        "l = If (c) <then_branch = t () => (float[B, T, T] a) { a = Identity(mask) }, "
        "else_branch = e () => (float[B, T, T] b) { b = Identity(mask) }> m = Unsqueeze(l, one)",
    ),
    "with others": (", float[1, 1, 1, T] bias", "u = Unsqueeze(mask, one) m = Add(u, bias)"),
}


@pytest.mark.parametrize("low", [float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_each_run_hides_keys_with_float32s_lowest_number_in_bfloat16_as_well(name, low):
    """ONNX's own evaluator runs bfloat16, which ONNX Runtime does not on a processor."""
    model = parse(ATTENTION % MASKS[name])
    random = np.random.default_rng(0)
    feeds = {key: random.normal(size=(2, 2, 4, 16)).astype(np.float32) / 2 for key in "qkv"}
    # The second sequence is padded by two on the left: its first two queries see no key.
    seen = np.tri(4, dtype=bool) & np.array([[1, 1, 1, 1], [0, 0, 1, 1]], bool)[:, None]
    feeds["mask"] = np.where(seen, 0, low).astype(np.float32)
    feeds |= {"c": np.array(True)} if "bool c" in MASKS[name][0] else {}
    feeds |= {"bias": np.zeros((1, 1, 1, 4), np.float32)} if "bias" in MASKS[name][0] else {}
    with np.errstate(invalid="ignore"):
        (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
        CastFloats(to="bf16").run(model, Context(target=target("cpu")))
        verify(model)
        (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    # Where minus infinity hides all keys, it is NaN before and after. Eight bits of significand, in four roundings.
    np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-8, atol=4 * 2.0**-8)
    assert np.isnan(expected[1, :, :2]).all() == np.isinf(low)


def test_what_is_no_mask_is_cast_as_it_is():
    model = parse((MODEL % "Relu(m)").replace("y = Add(s, b)", "t = Add(s, b) y = Add(t, b)"))
    CastFloats(to="bf16").run(model, Context(target=target("cpu")))
    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "Relu", "Add", "Add", "Cast"]


def test_masks_of_kernels_are_halved_and_those_in_float16_are_not():
    text = ATTENTION % MASKS["from outside"]
    model = parse(text)
    CastFloats(to="fp16").run(model, Context(target=target("cpu")))
    assert not [n for n in model.graph if n.op_type == "Less"]
    call = "y = optkit.MaskedAttention <scale = 1.0> (q, k, v, m)"
    model = parse(
        text[: text.index("t = Trans")].replace('["" : 21]', '["" : 21, "optkit" : 1]') + call + "\n}"
    )
    CastFloats(to="bf16").run(model, Context(target=target("h100")))
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == [
        *["Cast"] * 3, "Less", "Where", "Mul", "Cast", "Unsqueeze", "MaskedAttention", "Cast"
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["fp8", "fp32"])
def test_other_formats_are_refused(to):
    with pytest.raises(ValueError, match="fp16"):
        CastFloats(to=to)
