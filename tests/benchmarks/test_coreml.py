from __future__ import annotations

import numpy as np
import pytest

from optkit.reference import ReferenceSession

pytestmark = [pytest.mark.needs("coremltools"), pytest.mark.needs("torch")]


@pytest.mark.parametrize("name", ["crnn_shaped", "decoder_shaped, with state"])
def test_sequences_come_out_as_in_onnx_runtime(name):
    from optkit.benchmarks.coreml import MADE, measure_made

    assert name in MADE
    row = measure_made(name)
    for form in ("fp32", "fp16"):
        assert row["forms"][form]["passed"], row["forms"][form]
    assert row["forms"]["fp16"]["bytes"] < 0.52 * row["bytes"]


def test_sums_in_float64_are_those_of_numpy(tmp_path):
    """The mean of squares of values around 1000 has 7 digits left; one after the other fewer come out."""
    import onnx_ir as ir

    from optkit.benchmarks.coreml import with_exact_sums
    from optkit.testing import parse

    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 4096, 8] x) => (float[1, 8] y, float[1, 8] z) <int64[1] axis = {1}> {
          y = ReduceSum<keepdims = 0>(x, axis)
          m = ReduceMean<keepdims = 0>(x, axis)
          z = Neg(m)
        }"""
    )
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    x = (1000 + np.random.default_rng(0).normal(size=(1, 4096, 8))).astype(np.float32)
    found = ReferenceSession(with_exact_sums(path), optimize=False).run({"x": x})
    np.testing.assert_array_equal(found["y"], x.sum(1, dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(found["z"], -x.mean(1, dtype=np.float64).astype(np.float32))
