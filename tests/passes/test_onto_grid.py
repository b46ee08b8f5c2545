"""A norm or a gate and the quantization behind it are one kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.kernels import KERNELS
from optkit.passes.base import Context
from optkit.passes.lowering.kernels import CallKernels
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
# What lies next to the border of two steps may fall to either side.
ONE_STEP = {"atol": 1.0, "rtol": 0}
VECTORS = {"s": np.linspace(0.5, 1.5, 32).astype(np.float16), "b": np.linspace(-1, 1, 32).astype(np.float16)}
NORM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 32] x, float16[N, 32] r) => (%s) <float step = {0.02}, %s> {
  %s
  f = Cast <to = 1> (n)
  q = QuantizeLinear (f, step, zero)
  %s
}
"""
INT8 = "int8[N, 32] q"
LAYER = "n = LayerNormalization <axis = -1> (x, s, b)"
ADDED = "t = Add (x, r) n = LayerNormalization <axis = -1> (t, s, b)"
RMS = (
    "p = Pow (%s, two) m = ReduceMean (p, last) e = Add (m, tiny) d = Sqrt (e) u = Div (%s, d) n = Mul (u, s)"
)
RMS_MORE = ", int64[1] last = {-1}"
RMS_GIVEN = {"two": np.array(2, np.float16), "tiny": np.array(1e-5, np.float16)}


def fused(outputs, body, rest, more="", **given):
    text = NORM % (outputs, "int8 zero = {0}" + more, body, rest)
    used = {k: v for k, v in VECTORS.items() if f" {k})" in text or f" {k}," in text}
    return check_pass(CallKernels(), parse(text, **used, **given), context=H100, **ONE_STEP)


def calls(model):
    return [n for n in walk(model) if n.domain == "optkit"]


@pytest.mark.parametrize(
    ("outputs", "body", "rest", "op", "kept"),
    [
        (INT8, LAYER, "", "LayerNormQuantize", []),
        (f"{INT8}, float16[N, 32] y", LAYER, "y = Neg (n)", "LayerNormQuantize", ["normal"]),
        (INT8, ADDED, "", "AddLayerNormQuantize", []),
        (f"{INT8}, float16[N, 32] y", ADDED, "y = Neg (t)", "AddLayerNormQuantize", ["total"]),
        (f"{INT8}, float16[N, 32] y", ADDED, "y = Sub (t, n)", "AddLayerNormQuantize", ["normal", "total"]),
        (INT8, RMS % ("x", "x"), "", "RmsNormQuantize", []),
        (f"{INT8}, float16[N, 32] y", f"t = Add (x, r) {RMS % ('t', 't')}", "y = Neg (t)", "AddRmsNormQuantize", ["total"]),
    ],
)  # fmt: skip
def test_a_norm_and_its_quantization_are_one_kernel(outputs, body, rest, op, kept):
    more, given = (RMS_MORE, RMS_GIVEN) if "Pow" in body else ("", {})
    (node,) = calls(fused(outputs, body, rest, more, **given))
    assert node.op_type == op
    kernel = next(KERNELS[k]() for k in KERNELS if KERNELS[k].op == op)
    problem = kernel.problem(node)
    assert [k for k in ("normal", "total") if problem[k]] == kept
    assert problem["stored"] == "int8"


def test_floats_of_eight_bits_are_a_grid_too():
    text = NORM % ("float[N, 32] y", "int8 no = {0}", LAYER, "y = DequantizeLinear (q, step, zero)")
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    after = check_pass(
        CallKernels(kernels=("layer-norm", "quantize", "layer-norm-quantize")),
        parse(text, zero=zero, **VECTORS),
        context=H100,
        atol=0.3,
    )
    (node,) = calls(after)
    assert (node.op_type, node.outputs[0].dtype) == ("LayerNormQuantize", ir.DataType.FLOAT8E4M3FN)


@pytest.mark.parametrize(
    ("outputs", "body", "rest"),
    [
        (f"{INT8}, float16[N, 32] n", LAYER, ""),  # the result is an output by its name
        (f"{INT8}, float16[N, 32] t", ADDED, ""),
    ],
)
def test_what_is_an_output_of_the_graph_is_computed_apart(outputs, body, rest):
    assert "Quantize" in [n.op_type for n in calls(fused(outputs, body, rest))]


def test_what_is_read_before_it_goes_onto_the_grid_is_computed_apart():
    text = NORM % (f"{INT8}, float16[N, 32] y", "int8 zero = {0}", f"{LAYER} y = Neg (n)", "")
    after = check_pass(CallKernels(), parse(text, **VECTORS), context=H100, **ONE_STEP)
    assert [n.op_type for n in calls(after)] == ["LayerNorm", "Quantize"]


GATE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 32] g, float16[N, 32] u) => (int8[N, 32] q%s) <float step = {0.02}, int8 zero = {0}> {
  %s
  f = Cast <to = 1> (y)
  q = QuantizeLinear (f, step, zero)
  %s
}
"""
SILU = "a = Sigmoid (g) m = Mul (g, a) y = Mul (m, u)"
GELU = "a = Gelu (g) y = Mul (a, u)"
ALONE = "y = Gelu (g)"


@pytest.mark.parametrize(
    ("body", "op"), [(SILU, "SwiGluQuantize"), (GELU, "GeGluQuantize"), (ALONE, "GeluQuantize")]
)
def test_a_gate_and_its_quantization_are_one_kernel(body, op):
    check_pass(CallKernels(), parse(GATE % ("", body, "")), context=H100, ops=[op], **ONE_STEP)


@pytest.mark.parametrize(
    ("more", "body", "rest", "ops"),
    [
        (", float16[N, 32] z", SILU, "z = Neg (y)", ["SwiGlu", "Quantize", "Neg"]),
        (", float16[N, 32] z", ALONE, "z = Neg (y)", ["Gelu", "Quantize", "Neg"]),
        ("", 'y = Gelu <approximate = "tanh"> (g)', "", ["Gelu", "Quantize"]),
        ("", "y = Relu (g)", "", ["Relu", "Quantize"]),
    ],
)
def test_other_gates_are_computed_apart(more, body, rest, ops):
    after = check_pass(CallKernels(), parse(GATE % (more, body, rest)), context=H100, **ONE_STEP)
    assert [n.op_type for n in after.graph] == ops


def test_rows_that_are_not_read_sixteen_bytes_at_a_time_stay():
    text = (GATE % ("", ALONE, "")).replace("32]", "24]")
    after = check_pass(CallKernels(), parse(text), context=H100, **ONE_STEP)
    assert [n.op_type for n in after.graph] == ["Gelu", "Cast", "QuantizeLinear"]


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.UINT8])
def test_a_call_with_another_grid_has_no_program(kind):
    text = GATE % ("", ALONE, "")
    (node,) = calls(check_pass(CallKernels(), parse(text), context=H100, **ONE_STEP))
    node.inputs[-1].type = ir.TensorType(kind)
    assert "no format" in KERNELS["gelu-quantize"]().problem(node)
