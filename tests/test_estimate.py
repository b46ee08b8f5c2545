"""Times from data sheets: the floor by hand, and a range that lies above it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.inference import at_shapes
from optkit.planning import estimate
from optkit.targets import TARGETS, Target
from optkit.testing import parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
LINEAR = HEADER + "g (float[N, 64] x) => (float[N, 32] y) { [m] h = MatMul(x, w)\n [r] y = Relu(h) }"
FAR = Target(
    name="faraway", vendor="any", arch="any", backends=("onnxruntime",), formats=frozenset({"fp32"}),
    peak={"fp32": 1e9}, bandwidth=1e9,
)  # fmt: skip


def _linear():
    return parse(LINEAR, w=np.ones((64, 32), np.float32))


def test_the_floor_is_operations_at_the_peak_or_bytes_at_the_bandwidth():
    found = estimate(_linear(), FAR, {"x": (100, 64)})
    assert found.floor == pytest.approx(2 * 100 * 64 * 32 / 1e9)
    assert found.bound == "compute"
    slow = estimate(_linear(), replace(FAR, bandwidth=1e6), {"x": (1, 64)})
    assert slow.floor == pytest.approx(4 * (64 * 32 + 64 + 32) / 1e6)
    assert slow.bound == "memory"


def test_weights_that_the_last_cache_holds_are_not_read_from_memory():
    found = estimate(_linear(), replace(FAR, bandwidth=1e6, l2=1 << 20), {"x": (1, 64)})
    assert found.floor == pytest.approx(2 * 64 * 32 / 1e9)


def test_the_range_lies_above_the_floor_and_grows_with_the_batch():
    before = 0.0
    for batch in (1, 16, 256, 4096):
        found = estimate(_linear(), TARGETS["h100"], {"x": (batch, 64)})
        assert 0 < found.floor <= found.low <= found.high
        assert found.high >= before
        before = found.high


def test_small_graphs_take_at_least_one_launch_a_product():
    found = estimate(_linear(), TARGETS["h100"], {"x": (1, 64)})
    assert found.low == pytest.approx(1e-6)
    assert found.high >= 2 * 5e-6


@pytest.mark.parametrize(
    "target", [replace(FAR, peak={}), replace(FAR, bandwidth=None), replace(FAR, peak={"fp16": 1.0})]
)
def test_nothing_is_estimated_for_hardware_of_unknown_peaks(target):
    assert estimate(_linear(), target, {"x": (1, 64)}) is None


def test_nothing_is_estimated_where_sizes_depend_on_data():
    text = (
        HEADER
        + "g (float[N, 4] x) => (float[K, 4] y) { [a] a = MatMul(x, w)\n [i] i = NonZero(a)\n [y] y = Cast<to = 1>(i) }"
    )
    assert estimate(parse(text, w=np.ones((4, 4), np.float32)), FAR, {"x": (3, 4)}) is None


def test_quantization_in_front_of_a_product_counts_as_part_of_it():
    text = (
        HEADER
        + """g (float[N, 64] x) => (float[N, 32] y) {
      [q] q = QuantizeLinear(x, s, z)
      [d] d = DequantizeLinear(q, s, z)
      [e] e = DequantizeLinear(w, s)
      [m] y = MatMul(d, e)
    }"""
    )
    grid = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((64, 32), np.int8)}
    both = replace(FAR, peak={"fp32": 1e9, "int8": 4e9})
    quantized, plain = (estimate(m, both, {"x": (100, 64)}) for m in (parse(text, **grid), _linear()))
    assert quantized.floor == pytest.approx(plain.floor / 4)
    assert quantized.high < plain.high


def test_shapes_follow_from_those_of_the_inputs_where_the_graph_computes_them():
    text = (
        HEADER
        + """g (float[N, 6] x) => (float[A, B] y) <int64[1] rest = {-1}> {
      s = Shape<start = 0, end = 1>(x)
      t = Concat<axis = 0>(s, rest)
      r = Relu(x)
      y = Reshape(r, t)
    }"""
    )
    model = parse(text)
    fixed = at_shapes(model, {"x": (5, 6)})
    assert [list(v.shape.numpy()) for v in (*fixed.graph.inputs, *fixed.graph.outputs)] == [[5, 6], [5, 6]]
    assert not model.graph.inputs[0].shape.is_static()
