"""The model that rounds its sums once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from optkit.benchmarks.exact_sums import with_exact_sums
from optkit.reference import ReferenceSession
from optkit.testing import parse


def test_sums_in_float64_are_those_of_numpy(tmp_path: Path) -> None:
    """The mean of squares of values around 1000 has 7 digits left; one after the other fewer come out."""
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
