from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.passes.quantization.equalize import EqualizeLayers
from optkit.testing import check_pass, parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CONVS = (
    HEAD
    + """g (float[1, 3, 8, 8] x) => (float[1, 5, 6, 6] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  r = %s
  y = Conv(r, v, c)
}"""
)
DEPTHWISE = (
    HEAD
    + """g (float[1, 3, 8, 8] x) => (float[1, 5, 8, 8] y) {
  a = Conv(x, w, b)
  r = Relu(a)
  d = Conv<group = 6, pads = [1, 1, 1, 1]>(r, u, e)
  s = LeakyRelu(d)
  y = Conv(s, v, c)
}"""
)
MATMULS = (
    HEAD
    + """g (float[2, 4, 6] x) => (float[2, 4, 5] y, float[2, 4, 5] z) {
  m = MatMul(x, w)
  a = Add(m, b)
  r = Relu(a)
  y = MatMul(r, v)
  z = MatMul(r, u)
}"""
)


def _arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Weights whose channels differ by factors of up to a hundred."""
    random = np.random.default_rng(0)
    return {
        name: (random.normal(size=shape) * 10.0 ** random.uniform(-1, 1, (shape[0], *(1,) * (len(shape) - 1)))).astype(np.float32)
        for name, shape in shapes.items()
    }  # fmt: skip


def _weight(model: ir.Model, name: str) -> np.ndarray:
    return np.abs(model.graph.initializers[name].const_value.numpy())


def _ratio(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.maximum(a / b, b / a)))


def _equal(model: str, weights: dict[str, np.ndarray]) -> ir.Model:
    return check_pass(EqualizeLayers(), parse(model, **weights), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "between", ["Relu(a)", "LeakyRelu<alpha = 0.2>(a)", "MaxPool<kernel_shape = [1, 1]>(a)"]
)
def test_both_layers_get_the_same_range_in_each_channel(between):
    weights = _arrays(w=(6, 3, 3, 3), b=(6,), v=(5, 6, 3, 3), c=(5,))
    after = _equal(CONVS % between, weights)
    made = _weight(after, "w").reshape(6, -1).max(1)
    read = _weight(after, "v").transpose(1, 0, 2, 3).reshape(6, -1).max(1)
    assert _ratio(made, read) <= 1.05**2
    # Nagel et al., eq. 11: the common range is the geometric mean of what the two were.
    before = np.sqrt(
        np.abs(weights["w"]).reshape(6, -1).max(1)
        * np.abs(weights["v"]).transpose(1, 0, 2, 3).reshape(6, -1).max(1)
    )
    assert _ratio(made, before) <= 1.05


def test_a_depthwise_layer_is_equalized_with_both_neighbours():
    weights = _arrays(w=(6, 3, 1, 1), b=(6,), u=(6, 1, 3, 3), e=(6,), v=(5, 6, 1, 1), c=(5,))
    after = _equal(DEPTHWISE, weights)
    first, middle = (_weight(after, n).reshape(6, -1).max(1) for n in ("w", "u"))
    last = _weight(after, "v").reshape(5, 6).max(0)
    assert _ratio(first, middle) <= 1.05**2
    assert _ratio(middle, last) <= 1.05**2


def test_a_vector_added_behind_a_product_is_scaled_with_it_and_all_readers_count():
    weights = _arrays(w=(6, 8), b=(8,), v=(8, 5), u=(8, 5))
    after = _equal(MATMULS, weights)
    made, read = _weight(after, "w").max(0), np.maximum(_weight(after, "v"), _weight(after, "u")).max(1)
    assert _ratio(made, read) <= 1.05**2


@pytest.mark.parametrize("trans", [0, 1])
def test_both_layouts_of_gemm(trans):
    model = (
        HEAD
        + f"""g (float[4, 6] x) => (float[4, 5] y) {{
      a = Gemm<transB = {trans}>(x, w, b)
      r = Relu(a)
      y = Gemm<transB = {trans}>(r, v, c)
    }}"""
    )
    weights = _arrays(w=(8, 6), b=(8,), v=(5, 8), c=(5,))
    if not trans:
        weights |= {k: np.ascontiguousarray(weights[k].T) for k in "wv"}
    after = _equal(model, weights)
    made, read = _weight(after, "w").max(trans), _weight(after, "v").max(1 - trans)
    assert _ratio(made, read) <= 1.05**2


def test_a_channel_that_is_zero_on_one_side_keeps_its_scale():
    weights = _arrays(w=(6, 3, 3, 3), b=(6,), v=(5, 6, 3, 3), c=(5,))
    weights["w"][2] = 0
    weights["v"][:, 4] = 0
    after = _equal(CONVS % "Relu(a)", weights)
    assert np.array_equal(_weight(after, "v")[:, 2], np.abs(weights["v"][:, 2]))
    assert np.array_equal(_weight(after, "w")[4], np.abs(weights["w"][4]))


@pytest.mark.parametrize(
    "between",
    [
        "Clip(a, low, high)",
        "Sigmoid(a)",
        "Add(a, a)",
        "Relu(a)  z = Sin(r)",
    ],
)
def test_near_misses_stay(between):
    model = CONVS % between
    weights = _arrays(w=(6, 3, 3, 3), b=(6,), v=(5, 6, 3, 3), c=(5,))
    if "z =" in between:
        model = model.replace("6, 6] y)", "6, 6] y, float[1, 6, 8, 8] z)")
    if "Clip" in between:
        weights |= {"low": np.float32(0), "high": np.float32(6)}
    after = check_pass(EqualizeLayers(), parse(model, **weights), atol=0, rtol=0)
    assert all(np.array_equal(_weight(after, k), np.abs(weights[k])) for k in "wbvc")


def test_weights_that_another_layer_reads_too_are_left_to_it():
    model = (
        HEAD
        + """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {
      a = Conv(x, w)
      r = Relu(a)
      y = Conv(r, v)
      z = Conv(x, v)
    }"""
    )
    weights = _arrays(w=(4, 4, 1, 1), v=(4, 4, 1, 1))
    after = _equal(model, weights)
    assert np.array_equal(_weight(after, "v"), np.abs(weights["v"]))
    assert len(after.graph.initializers) == 3


def test_weights_that_would_overflow_stay():
    weights = _arrays(w=(6, 3, 3, 3), b=(6,), v=(5, 6, 3, 3), c=(5,))
    weights["b"][0] = 3e38
    weights["w"][0], weights["v"][:, 0] = 1e-30, 1e30
    check_pass(
        EqualizeLayers(),
        parse(CONVS % "Relu(a)", **weights),
        atol=0,
        rtol=1e-4,
        x=np.zeros((1, 3, 8, 8), np.float32),
    )
