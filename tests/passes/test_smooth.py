from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.data import CalibrationData
from optkit.errors import DataError
from optkit.passes.base import Context
from optkit.passes.quantization.smooth import SmoothActivations
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
NORM = (
    HEAD
    + """g (float[2, 4, 6] x) => (float[2, 4, 5] q, float[2, 4, 5] k%s) {
  n = LayerNormalization(x, gamma, beta)
  q = MatMul(n, w)
  k = MatMul(n, v)%s
}"""
)


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    gamma = np.array([1, 1, 100, 1, 0.01, 1], np.float32)
    return {
        "gamma": gamma, "beta": gamma * 0.1, "w": random.normal(size=(6, 5)).astype(np.float32),
        "v": random.normal(size=(6, 5)).astype(np.float32) * 2,
    }  # fmt: skip


def _context(n: int = 3) -> Context:
    random = np.random.default_rng(1)
    return Context(
        target=target("cpu"),
        data=CalibrationData([{"x": random.normal(size=(2, 4, 6)).astype(np.float32)} for _ in range(n)]),
    )


def _largest(model: ir.Model, name: str, context: Context) -> np.ndarray:
    session = ReferenceSession(model, outputs=[name])
    return np.max([np.abs(session.run(b)[name]).max((0, 1)) for b in context.data], axis=0)


def _array(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_a_norm_divides_what_its_products_multiply(alpha):
    weights, context = _weights(), _context()
    model = parse(NORM % ("", ""), **weights)
    after = check_pass(
        SmoothActivations(alpha=alpha), model, ops=["LayerNormalization", "MatMul", "MatMul"], atol=1e-4, context=context
    )  # fmt: skip
    # Xiao et al., eq. 4, over all that the value is multiplied with.
    x = _largest(model, "n", context).astype(np.float64)
    w = np.maximum(np.abs(weights["w"]), np.abs(weights["v"])).max(1).astype(np.float64)
    scale = x**alpha / w ** (1 - alpha)
    assert _array(after, "gamma") == pytest.approx(weights["gamma"] / scale, rel=1e-5)
    assert _array(after, "beta") == pytest.approx(weights["beta"] / scale, rel=1e-5)
    assert _array(after, "w") == pytest.approx(weights["w"] * scale[:, None], rel=1e-5)
    spread = _largest(after, "n", context)
    if alpha == 0.5:
        assert spread.max() / spread.min() < 0.1 * x.max() / x.min()


@pytest.mark.parametrize(
    ("output", "more"),
    [
        (", float[2, 4, 6] z", "\n z = Add(n, x)"),
        (", float[2, 4, 6] n", ""),
    ],
    ids=["a residual reads it", "an output"],
)
def test_what_something_else_reads_too_stays_unless_a_factor_is_inserted(output, more):
    weights, context = _weights(), _context()
    model = parse(NORM % (output, more), **weights)
    after = check_pass(SmoothActivations(), model, atol=1e-4, context=context)
    assert np.array_equal(_array(after, "w"), weights["w"])
    ops = ["LayerNormalization", "Mul", "MatMul", "MatMul", *(["Add"] if more else [])]
    after = check_pass(SmoothActivations(insert=True), model, ops=ops, atol=1e-4, context=context)
    assert not np.array_equal(_array(after, "w"), weights["w"])


def test_an_activation_that_is_not_homogeneous_stays():
    model = (
        (NORM % ("", ""))
        .replace("q = MatMul(n, w)", "h = Gelu(n)\n q = MatMul(h, w)")
        .replace("k = MatMul(n, v)", "k = MatMul(h, v)")
    )
    weights, context = _weights(), _context()
    after = check_pass(SmoothActivations(), parse(model, **weights), atol=0, rtol=0, context=context)
    assert np.array_equal(_array(after, "w"), weights["w"])


def test_convolutions_are_smoothed_through_relu_also_when_they_are_source_and_reader():
    model = (
        HEAD
        + """g (float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y) {
      a = Conv(x, w, b)
      r = Relu(a)
      d = Conv<group = 4, pads = [1, 1, 1, 1]>(r, u)
      s = Relu(d)
      y = Conv(s, v)
    }"""
    )
    random = np.random.default_rng(0)
    shapes = {"w": (4, 4, 1, 1), "b": (4,), "u": (4, 1, 3, 3), "v": (4, 4, 1, 1)}
    weights = {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    weights["w"][1] *= 100
    weights["u"][2] *= 100
    data = CalibrationData([{"x": random.normal(size=(2, 4, 6, 6)).astype(np.float32)} for _ in range(3)])
    context = Context(target=target("cpu"), data=data)
    check_pass(
        SmoothActivations(),
        parse(model, **weights),
        ops=["Conv", "Relu", "Conv", "Relu", "Conv"],
        atol=1e-3,
        context=context,
    )


def test_without_data_the_hint_names_calib():
    with pytest.raises(DataError, match="calibration data") as raised:
        SmoothActivations().run(parse(NORM % ("", ""), **_weights()), Context(target=target("cpu")))
    assert "--calib" in str(raised.value.hint)


def test_without_anything_to_smooth_no_data_is_needed():
    model = HEAD + "g (float[2] x) => (float[2] y) { y = Relu(x) }"
    assert SmoothActivations().run(parse(model), Context(target=target("cpu"))) == []
