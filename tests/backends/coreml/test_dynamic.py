"""Files that ONNX Runtime's dynamic quantization wrote: their numbers in floats, their weights in 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends import BACKENDS
from optkit.legalize import legalize
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\ng %s'
PHONE = target("iphone15")
# Two convolutions, the first with the integers of a bias, and a product.
NET = """(float[1, 8, 6, N] x) => (float[1, 16] y) <float vs = {0.004}, float us = {0.003}, float ws = {0.002}, uint8 zero = {121},
int64[4] column = {1, -1, 1, 1}, int64[2] row = {1, -1}> {
  q0, s0, z0 = DynamicQuantizeLinear(x) f0 = Mul(s0, vs) d = Div(b, f0) l = Floor(d) k = Cast<to = 6>(l) r = Reshape(k, column)
  i0 = ConvInteger<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(q0, v, z0, zero) a = Add(i0, r) c0 = Cast<to = 1>(a) m0 = Mul(c0, f0)
  p = Relu(m0)
  q1, s1, z1 = DynamicQuantizeLinear(p) f1 = Mul(s1, us)
  i1 = ConvInteger<kernel_shape = [3, 3], strides = [2, 2]>(q1, u, z1, zero) c1 = Cast<to = 1>(i1) m1 = Mul(c1, f1)
  g = GlobalAveragePool(m1) e = Reshape(g, row)
  q2, s2, z2 = DynamicQuantizeLinear(e) f2 = Mul(s2, ws)
  i2 = MatMulInteger(q2, w, z2, zero) c2 = Cast<to = 1>(i2) y = Mul(c2, f2) }"""
SHAPES = {"v": (64, 8, 3, 3), "u": (64, 64, 3, 3), "w": (64, 16)}
RECURRENT = """(float[5, 1, 32] x) => (float[5, 2, 1, 64] y) {
  y = com.microsoft.DynamicQuantizeLSTM<hidden_size = 64, direction = "bidirectional">(x, w, r, , , , , , ws, wz, rs, rz) }"""


def _bytes(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def _net(bias: float = 1.0) -> ir.Model:
    weights = {name: _bytes(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    return parse(HEAD % NET, b=bias * np.linspace(-1, 1, 64, dtype=np.float32), **weights)


def _lowered(model: ir.Model, folder: Path, **options):
    """A session of the package, and the bytes of its weights."""
    backend = BACKENDS.get("coreml")()
    chosen = backend.options.model_validate(options)
    after = model.clone()
    legalize(after, backend, PHONE, name="model")
    backend.lower(after, PHONE, chosen, folder)
    size = (folder / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    return backend.load(folder, PHONE, chosen), size


def _sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    error = np.square(expected.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / error))


@pytest.mark.parametrize("deployment", ["iOS16", "iOS17", "iOS18"])
def test_products_with_scales_of_each_run_give_the_numbers_of_the_integers(deployment, tmp_path):
    model = _net()
    session, size = _lowered(model, tmp_path, deployment=deployment)
    feeds = random_feeds(model, size=7)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    with session:
        # Sums are exact; a few roundings of scales, which coremltools multiplies where ONNX divides.
        np.testing.assert_allclose(
            session.run(feeds)["y"], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max()
        )
    # A byte each, the bias in float32, and what is written about each.
    assert size < 1.1 * sum(np.prod(s) for s in SHAPES.values())


@pytest.mark.parametrize("bias", [1.0, 1000.0])
def test_sums_and_biases_of_integers_do_not_overflow_in_half_precision(bias, tmp_path):
    """Sums reach hundreds of thousands, a bias of 1000 has two hundred millions of steps, and float16 ends at 65504."""
    model = _net(bias)
    session, size = _lowered(model, tmp_path, precision="fp16")
    feeds = random_feeds(model, size=7)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    with session:
        # Activations of 11 bits fall on another of 256 steps now and then, which is a fraction of the noise of 8 bits, 40 dB and more.
        assert _sqnr(expected, session.run(feeds)["y"]) > 40
    assert size < 1.1 * sum(np.prod(s) for s in SHAPES.values())


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_of_small_activations_the_bias_is_left_in_half_precision(spread, tmp_path):
    model = _net()
    session, _ = _lowered(model, tmp_path, precision="fp16")
    feeds = {"x": np.float32(spread) * random_feeds(model, size=7)["x"]}
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    with session:
        assert _sqnr(expected, session.run(feeds)["y"]) > 40


@pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-4])
def test_activations_that_float16_hardly_holds_give_numbers(spread, tmp_path):
    graph = """(float[3, 16] x) => (float[3, 4] y) <float ws = {0.01}, uint8 wz = {121}> {
      q, s, z = DynamicQuantizeLinear(x) f = Mul(s, ws) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) y = Mul(c, f) }"""
    model = parse(HEAD % graph, w=_bytes(0, 16, 4))
    session, _ = _lowered(model, tmp_path, precision="fp16")
    feeds = {"x": np.float32(spread) * random_feeds(model)["x"]}
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    with session:
        # The least step is 6e-8, of which each of sixteen activations is off by half, and a scale of 4e-7 by 8 %.
        np.testing.assert_allclose(
            session.run(feeds)["y"], expected, rtol=0, atol=16 * 1.3 * 6e-8 + 0.08 * np.abs(expected).max()
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_of_a_recurrent_layer_are_kept_in_8_bits(precision, tmp_path):
    scales = np.array([0.002, 0.003], np.float32)
    model = parse(
        HEAD % RECURRENT, w=_bytes(0, 2, 32, 256), r=_bytes(1, 2, 64, 256), ws=scales, rs=scales,
        wz=np.array([121, 130], np.uint8), rz=np.array([128, 119], np.uint8),
    )  # fmt: skip
    session, size = _lowered(model, tmp_path, precision=precision)
    feeds = random_feeds(model)
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    with session:
        # ONNX Runtime rounds the state to 8 bits in each step, which leaves 40 to 50 dB.
        assert _sqnr(expected, session.run(feeds)["y"]) > 40
    assert size < 1.15 * 2 * 256 * (32 + 64)
