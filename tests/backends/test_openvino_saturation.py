"""What OpenVINO saturates on processors without VNNI is what the emulation says, and quantization keeps it from happening."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends import BACKENDS
from optkit.backends.openvino.placement import PLACEMENTS
from optkit.data import CalibrationData
from optkit.graph import constant
from optkit.passes.base import Context
from optkit.passes.quantization.static import QuantizeStatic
from optkit.readback import saturation
from optkit.reference import ReferenceSession
from optkit.saturation import emulate, saturated
from optkit.targets import TARGETS, target
from optkit.testing import parse

# Layers on integers that store floats: operator, shape of what it reads, of its weights, and of what it makes.
LAYERS = (
    ("Conv", (2, 8, 6, 6), (8, 8, 1, 1), (2, 8, 6, 6)),
    ("Conv<pads = [1, 1, 1, 1]>", (2, 16, 6, 6), (8, 16, 3, 3), (2, 8, 6, 6)),
    ("Conv<pads = [1, 1, 1, 1], strides = [2, 2]>", (2, 3, 6, 6), (8, 3, 3, 3), (2, 8, 3, 3)),
    ("Conv<group = 4>", (2, 12, 6, 6), (16, 3, 3, 3), (2, 16, 4, 4)),
    ("Conv<group = 8>", (2, 8, 6, 6), (8, 1, 3, 3), (2, 8, 4, 4)),
    ("MatMul", (6, 64), (64, 16), (6, 16)),
    ("MatMul", (2, 6, 37), (37, 16), (2, 6, 16)),
)
LAYER = """
  xq{i} = QuantizeLinear(x{i}, sx, zx)
  xd{i} = DequantizeLinear(xq{i}, sx, zx)
  wd{i} = DequantizeLinear<axis = {axis}>(w{i}, sw{i})
  y{i} = {op}(xd{i}, wd{i})"""
# A convolution without a pair behind it: what it stores is added in float.
RESIDUAL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
  c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
  s = HardSwish(c)
  y = Add(s, x)
}
"""
AVX2 = TARGETS["x86-avx2"]


def _layers(zero: np.integer) -> ir.Model:
    random, weights, text = np.random.default_rng(0), {}, []
    for i, (op, _, w, _) in enumerate(LAYERS):
        axis = 0 if op.startswith("Conv") else 1
        text.append(LAYER.format(i=i, op=op, axis=axis))
        # Steps are powers of 2, so that floats hold every sum exactly.
        weights |= {
            f"w{i}": random.integers(-127, 128, w).astype(np.int8),
            f"sw{i}": np.full(w[axis], 2**-8, np.float32),
        }
    inputs, outputs = (
        ", ".join(f"float[{', '.join(map(str, layer[at]))}] {name}{i}" for i, layer in enumerate(LAYERS))
        for name, at in (("x", 1), ("y", 3))
    )
    head = f'<ir_version: 10, opset_import: ["" : 21]>\ng ({inputs}) => ({outputs}) {{'
    model = parse(head + "".join(text) + "\n}", sx=np.float32(2**-6), zx=np.asarray(zero), **weights)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("zero", [np.uint8(100), np.int8(-28)], ids=["unsigned", "signed"])
def test_layers_compute_what_the_emulation_says_to_the_last_bit(tmp_path, zero):
    model, cpu, backend = _layers(zero), target("cpu"), BACKENDS["openvino"]()
    options = backend.options(shapes={f"x{i}": layer[1] for i, layer in enumerate(LAYERS)})
    backend.lower(model, cpu, options, tmp_path)
    if cpu.saturates:
        # All but the depthwise one.
        assert emulate(model, "onednn") == ["y0", "y1", "y2", "y3", "y5", "y6"]
    random, ends = np.random.default_rng(1), np.iinfo(zero.dtype)
    feeds = {
        f"x{i}": ((random.integers(ends.min, ends.max + 1, layer[1]) - int(zero)) / 64).astype(np.float32)
        for i, layer in enumerate(LAYERS)
    }
    reference = ReferenceSession(model)
    expected = reference.run(feeds)
    reference.close()
    with backend.load(tmp_path, cpu, options, threads=1) as session:
        found = session.run(feeds)
    for name, wanted in expected.items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.uniform(0.5, 1, (4, 8, 6, 6)).astype(np.float32)} for _ in range(4)]


def _quantized(batches: list[dict[str, np.ndarray]], *, saturates: bool) -> ir.Model:
    """For OpenVINO. Half of the channels add up large weights of one sign."""
    w = np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype(np.float32)
    w[:4] = np.abs(w[:4]) + 1
    model = parse(RESIDUAL, w=w)
    for node in model.graph:
        node.name = node.outputs[0].name
    where = replace(AVX2, saturates=saturates)
    context = Context(target=where, data=CalibrationData(batches), placements=PLACEMENTS)
    QuantizeStatic().run(model, context)
    return model


def test_convolutions_that_store_floats_are_narrowed(batches):
    wide, narrow = (_quantized(batches, saturates=saturates) for saturates in (False, True))
    assert list(saturated(wide, batches, "onednn")) == ["c"]
    assert saturated(narrow, batches, "onednn") == {}
    arrays = [constant(value) for value in narrow.graph.initializers.values()]
    (stored,) = (a for a in arrays if a.ndim == 4)
    assert (np.abs(stored[:4].astype(int)) <= 63).all()


@pytest.mark.needs("openvino")
def test_the_record_counts_convolutions_that_store_floats(batches):
    engine = BACKENDS["openvino"]()
    wide, narrow = (
        saturation(_quantized(batches, saturates=saturates), AVX2, engine) for saturates in (False, True)
    )
    assert wide.layers == 1 and wide.at_risk == ("c",) and wide.narrowed == {}
    assert narrow.layers == 1 and narrow.at_risk == () and list(narrow.narrowed) == ["c"]


def test_all_placements_are_for_the_same_kernels():
    assert {p.library for p in PLACEMENTS.values()} == {"onednn"}
