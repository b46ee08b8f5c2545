from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.reference import ReferenceSession, unsound
from optkit.testing import parse

QUANTIZED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x) => (float[4] y) {
  a = Neg(x)
  c = %s
  q = QuantizeLinear(c, s, z)
  y = DequantizeLinear(q, s, z)
}
"""


@pytest.mark.parametrize("activation", ["Clip(a, low, high)", "Relu(a)"])
@pytest.mark.parametrize("as_file", [False, True])
def test_what_lies_in_front_of_floats_of_8_bits_is_computed(activation, as_file, tmp_path):
    zero = np.zeros((), ml_dtypes.float8_e4m3fn)
    model = parse(QUANTIZED % activation, low=np.float32(0), high=np.float32(60), s=np.float32(0.5), z=zero)
    source = model
    if as_file:
        source = tmp_path / "model.onnx"
        onnx.save(ir.to_proto(model), source)
    found = ReferenceSession(source, disabled=unsound(model)).run({"x": np.array([1, -1, -5, 9], np.float32)})
    assert found["y"].tolist() == [0, 1, 5, 0]


def test_integers_keep_every_optimizer():
    model = parse(QUANTIZED % "Relu(a)", s=np.float32(0.5), z=np.int8(0))
    assert unsound(model) == ()
