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
