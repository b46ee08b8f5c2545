"""What ONNX Runtime is given in other words."""

from __future__ import annotations

import numpy as np

from optkit.backends.onnxruntime.lower import OnnxRuntime, OnnxRuntimeOptions
from optkit.backends.onnxruntime.spelling import spelled
from optkit.graph import text
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (%s[N] x) => (%s[N] y) { m = Mish (x) y = Neg (m) }
"""


def _ops(model):
    return [node.op_type for node in model.graph]


def test_mish_is_written_out_and_exact():
    model = parse(MODEL % ("float", "float"))
    before = text(model)
    after = spelled(model)
    assert text(model) == before
    assert "Mish" not in _ops(after)
    x = np.concatenate([np.linspace(-90, 90, 18001), [-1e30, -1e-30, 0, 1e-30, 1e30]]).astype(np.float32)
    (y,) = ReferenceSession(after, optimize=False).run({"x": x}).values()
    wide = x.astype(np.float64)
    expected = -wide * np.tanh(np.log1p(np.exp(np.minimum(wide, 700))))
    # Exp is good to 2 units in the last place; six more roundings. Below 1e-37 float32 has fewer digits.
    np.testing.assert_allclose(y, expected, rtol=8 * 2.0**-23, atol=1e-36)


def test_infinities_and_nan_are_what_they_were():
    x = np.array([np.inf, np.nan], np.float32)
    (y,) = ReferenceSession(spelled(parse(MODEL % ("float", "float")))).run({"x": x}).values()
    np.testing.assert_array_equal(y, [-np.inf, np.nan])


def test_half_precision_and_other_graphs_stay():
    half = parse(MODEL % ("float16", "float16"))
    assert _ops(spelled(half)) == ["Mish", "Neg"]
    plain = parse((MODEL % ("float", "float")).replace("Mish", "Relu"))
    assert spelled(plain) is plain


def test_the_artifact_holds_the_spelling(tmp_path):
    OnnxRuntime().lower(parse(MODEL % ("float", "float")), target("cpu"), OnnxRuntimeOptions(), tmp_path)
    import onnx

    assert "Mish" not in [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]


PAIR = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 2, 3] x) => (float[1, 3, 2] y%s) {
  q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(q, s, z) t = Transpose<perm = [0, 2, 1]>(d)
  u = Transpose<perm = [0, 2, 1]>(e) y = Add(t, u) %s }
"""


def test_pairs_of_int8_that_onnx_runtime_stops_at_are_unsigned_and_exact(tmp_path):
    import onnxruntime as ort

    model = parse(PAIR % ("", ""), s=np.float32(0.5), z=np.int8(-3))
    OnnxRuntime().lower(model, target("cpu"), OnnxRuntimeOptions(), tmp_path)
    x = np.array([[[-90, -0.3, 0.4], [1, 2.5, 90]]], np.float32)
    (found,) = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    np.testing.assert_array_equal(found, ReferenceSession(model, optimize=False).run({"x": x})["y"])


def test_integers_that_are_given_away_keep_their_type():
    model = parse(PAIR % (", int8[1, 2, 3] q", ""), s=np.float32(0.5), z=np.int8(-3))
    assert model.graph.outputs[1].dtype == spelled(model).graph.outputs[1].dtype
