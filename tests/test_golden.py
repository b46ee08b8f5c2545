"""Golden batches, and how close a device has to come to them."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.closeness import batch, verify
from optkit.errors import ModelError
from optkit.golden import limit, write
from optkit.store import save
from optkit.testing import parse

PLAIN = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 8] x) => (float[N, 8] y) { y = Tanh(x) }'
# What is lost at the steps of a grid, of numbers that are rounded between operators or, fused, are not.
BORDER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 64] x) => (float16[N, 64] y) {
  h = MatMul (x, w)
  a = Div (h, root)
  e = Erf (a)
  o = Add (e, one)
  p = Mul (h, o)
  g = Mul (p, half)
  q = QuantizeLinear (g, s, z)
  d = DequantizeLinear (q, s, z)
  y = Sub (d, g)
}
"""


def written(tmp_path, text, sizes, **weights):
    model = parse(text, **weights)
    save(model, tmp_path / "model.onnx")
    return model, write(tmp_path / "model.onnx", tmp_path / "golden", model, sizes, seed=0)


def test_a_batch_for_each_size_with_what_onnx_runtime_computes(tmp_path):
    _, apart = written(tmp_path, PLAIN, [{"N": 3}, {"N": 1}])
    files = sorted((tmp_path / "golden").iterdir())
    assert [f.name for f in files] == ["000.npz", "001.npz"] and apart == pytest.approx(1)
    inputs, outputs = batch(files[0])
    assert inputs["x"].shape == (3, 8)
    np.testing.assert_allclose(outputs["y"], np.tanh(inputs["x"]), atol=1e-6)
    assert verify(lambda feeds: {"y": np.tanh(feeds["x"])}, tmp_path / "golden", 0.99999)["met"]
    assert not verify(lambda feeds: {"y": -feeds["x"]}, tmp_path / "golden", 0.9)["met"]
    assert not verify(lambda feeds: {}, tmp_path / "golden", 0.0)["met"]


def test_a_graph_that_rounding_alone_moves_is_asked_for_less(tmp_path):
    w = (np.random.default_rng(0).standard_normal((64, 64)) / 8).astype(np.float16)
    numbers = {"root": 1.414, "one": 1, "half": 0.5, "s": 0.05}
    _, apart = written(
        tmp_path, BORDER, [{"N": 200}], w=w, z=np.int8(0), **{k: np.float16(v) for k, v in numbers.items()}
    )
    assert 0.99 < apart < 0.9999
    assert limit(["fp16"], apart) == 1 - 4 * (1 - apart)


@pytest.mark.parametrize(
    ("formats", "apart", "least"),
    [
        (["fp32"], 1.0, 0.99999),
        (["fp32", "fp16"], 1.0, 0.999),
        (["int8"], 0.999, 0.99),
        (["int8"], 0.98, 0.92),
    ],
)
def test_the_limit_follows_from_formats_and_from_the_graph_itself(formats, apart, least):
    assert limit(formats, apart) == pytest.approx(least)


def test_sizes_that_do_not_run_are_named(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 8] x, float[M, 8] r) => (float[N, 8] y) { y = Add(x, r) }'
    with pytest.raises(ModelError, match=r"does not run with x \[2, 8\], r \[3, 8\]"):
        written(tmp_path, text, [{"N": 2, "M": 3}])


def test_outputs_without_a_number_are_no_golden_outputs(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 8] x) => (float[N, 8] y) { a = Abs(x) b = Neg(a) y = Log(b) }'
    with pytest.raises(ModelError, match="is NaN or infinite"):
        written(tmp_path, text, [{"N": 2}])


def test_a_mask_of_one_key_shows_it_whichever_boolean_does(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 4, K] s, bool[N, 1, K] m) => (float[N, 4, K] y) { w = Where (m, hidden, s) y = Softmax (w) }"""
    written(tmp_path, text, [{"N": 2, "K": 1}], hidden=np.float32(-np.inf))
    assert (batch(tmp_path / "golden" / "000.npz")[1]["y"] == 1).all()
