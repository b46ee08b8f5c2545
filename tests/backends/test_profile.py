from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime import OnnxRuntime
from optkit.backends.onnxruntime.lower import OnnxRuntimeOptions
from optkit.backends.onnxruntime.placement import PLACEMENTS
from optkit.backends.onnxruntime.profile import read_profile
from optkit.data import CalibrationData
from optkit.passes.base import Context
from optkit.passes.quantization.dynamic import QuantizeDynamic
from optkit.passes.quantization.static import QuantizeStatic
from optkit.targets import target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
CPU = target("cpu")


def _model(source: str) -> ir.Model:
    """Text whose inputs other than x, x2 … are weights."""
    model, random = parse(HEAD + source), np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if not str(value.name).startswith("x"):
            model.graph.inputs.remove(value)
            array = random.normal(size=value.shape.numpy()).astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)
    return model


def _feeds(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {str(v.name): random.normal(size=v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}


def _executed(model: ir.Model, feeds=None):
    backend, options = OnnxRuntime(), OnnxRuntimeOptions()
    with tempfile.TemporaryDirectory() as folder:
        backend.lower(model, CPU, options, Path(folder))
        return backend.executed(Path(folder), CPU, options, feeds or _feeds(model))


# (model, multiply-accumulates by hand)
PRODUCTS = {
    # Odd channels: ONNX Runtime's own layout pads them to its vectors, which must not count.
    "conv": ("g (float[2, 3, 9, 7] x, float[10, 3, 3, 2] w) => (float[2, 10, 7, 6] y) { y = Conv(x, w) }", 2 * 10 * 7 * 6 * 3 * 3 * 2),
    "conv with padding": (
        "g (float[1, 3, 9, 9] x, float[16, 3, 3, 3] w, float[16] b) => (float[1, 16, 5, 5] y) "
        "{ y = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, b) }", 16 * 5 * 5 * 3 * 9),
    "grouped conv": ("g (float[1, 12, 5, 5] x, float[8, 3, 3, 3] w) => (float[1, 8, 3, 3] y) { y = Conv<group = 4>(x, w) }", 8 * 3 * 3 * 3 * 9),
    "depthwise conv": ("g (float[1, 16, 5, 5] x, float[16, 1, 3, 3] w) => (float[1, 16, 3, 3] y) { y = Conv<group = 16>(x, w) }", 16 * 3 * 3 * 9),
    "conv and relu": ("g (float[1, 3, 5, 5] x, float[8, 3, 3, 3] w) => (float[1, 8, 3, 3] y) { a = Conv(x, w) y = Relu(a) }", 8 * 3 * 3 * 3 * 9),
    "odd channels inside": (
        "g (float[1, 3, 9, 9] x, float[10, 3, 3, 3] w, float[10, 10, 1, 1] u, float[7, 10, 3, 3] v) => (float[1, 7, 5, 5] y) "
        "{ a = Conv(x, w) r = Relu(a) d = Conv(r, u) s = Add(d, r) t = Relu(s) y = Conv(t, v) }",
        10 * 7 * 7 * 3 * 9 + 10 * 7 * 7 * 10 + 7 * 5 * 5 * 10 * 9),
    "conv of a line": ("g (float[1, 3, 9] x, float[8, 3, 3] w) => (float[1, 8, 7] y) { y = Conv(x, w) }", 8 * 7 * 3 * 3),
    "transposed conv": ("g (float[1, 6, 4, 4] x, float[6, 5, 3, 3] w) => (float[1, 10, 6, 6] y) { y = ConvTranspose<group = 2>(x, w) }", 6 * 4 * 4 * 5 * 9),
    "gemm": ("g (float[5, 7] x, float[7, 11] w, float[11] b) => (float[5, 11] y) { y = Gemm(x, w, b) }", 5 * 7 * 11),
    "gemm, weights transposed": ("g (float[5, 7] x, float[11, 7] w) => (float[5, 11] y) { y = Gemm<transB = 1>(x, w) }", 5 * 7 * 11),
    "gemm, input transposed": ("g (float[7, 5] x, float[7, 11] w) => (float[5, 11] y) { y = Gemm<transA = 1>(x, w) }", 5 * 7 * 11),
    "matmul": ("g (float[2, 5, 7] x, float[7, 11] w) => (float[2, 5, 11] y) { y = MatMul(x, w) }", 2 * 5 * 7 * 11),
    "matmul of two inputs": ("g (float[2, 3, 5, 7] x, float[2, 3, 7, 4] x2) => (float[2, 3, 5, 4] y) { y = MatMul(x, x2) }", 6 * 5 * 7 * 4),
    "matmul of a transposed input": (
        "g (float[2, 5, 7] x, float[2, 4, 7] x2) => (float[2, 5, 4] y) { t = Transpose<perm = [0, 2, 1]>(x2) y = MatMul(x, t) }", 2 * 5 * 7 * 4),
    "matmul of a transposed first input": (
        "g (float[2, 7, 5] x, float[2, 7, 4] x2) => (float[2, 5, 4] y) { t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(t, x2) }", 2 * 5 * 7 * 4),
    "broadcast matmul": ("g (float[5, 7] x, float[2, 3, 7, 4] x2) => (float[2, 3, 5, 4] y) { y = MatMul(x, x2) }", 6 * 5 * 7 * 4),
    "matrix and vector": ("g (float[5, 7] x, float[7] x2) => (float[5] y) { y = MatMul(x, x2) }", 5 * 7),
    "lstm": (
        "g (float[6, 2, 3] x, float[1, 16, 3] w, float[1, 16, 4] r) => (float[6, 1, 2, 4] y) { y = LSTM<hidden_size = 4>(x, w, r) }",
        6 * 2 * (16 * 3 + 16 * 4)),
    "gru": (
        "g (float[6, 2, 3] x, float[2, 12, 3] w, float[2, 12, 4] r) => (float[6, 2, 2, 4] y) "
        '{ y = GRU<hidden_size = 4, direction = "bidirectional">(x, w, r) }', 6 * 2 * 2 * (12 * 3 + 12 * 4)),
    "no product": ("g (float[5, 7] x) => (float[5, 7] y) { y = Exp(x) }", 0),
}  # fmt: skip


@pytest.mark.parametrize(("source", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_multiply_accumulates_are_those_counted_by_hand(source, macs):
    found = _executed(_model(source))
    assert sum(e.macs for e in found) == macs
    assert {e.format for e in found if e.macs} <= {"fp32"}
    assert {e.where for e in found} == {"cpu"}
    assert all(e.seconds >= 0 and e.name for e in found)


STATIC = [
    n
    for n in PRODUCTS
    if n.startswith(("conv", "grouped", "depthwise", "gemm", "matmul")) and "input" not in n
]


@pytest.mark.parametrize("name", STATIC)
def test_the_same_product_in_integers_counts_the_same(name):
    source, macs = PRODUCTS[name]
    model = _model(source)
    data = CalibrationData([_feeds(model)])
    assert QuantizeStatic().run(model, Context(target=CPU, data=data, placements=PLACEMENTS))
    found = _executed(model)
    assert [(e.format, e.macs) for e in found if e.macs] == [("int8", macs)]


@pytest.mark.parametrize("name", ["gemm", "gemm, weights transposed", "matmul"])
def test_the_same_product_with_dynamic_scales_counts_the_same(name):
    source, macs = PRODUCTS[name]
    model = _model(source)
    assert QuantizeDynamic(smallest=1).run(model, Context(target=CPU))
    assert [(e.format, e.macs) for e in _executed(model) if e.macs] == [("int8", macs)]


def test_nodes_inside_the_branch_that_ran_are_counted():
    model = _model("""
    g (float[5, 7] x, float[1] x2, float[7, 3] w, float[7, 3] v) => (float[5, 3] y) {
      b = Cast<to = 9>(x2)
      y = If (b) <
        then_branch = yes () => (float[5, 3] t) { p = MatMul(x, w) t = Neg(p) },
        else_branch = no () => (float[5, 3] e) { e = MatMul(x, v) }
      >
    }
    """)
    for b, ops in ((1.0, ["MatMul", "Neg"]), (0.0, ["MatMul"])):
        found = _executed(model, {**_feeds(model), "x2": np.float32([b])})
        assert sum(e.macs for e in found) == 5 * 7 * 3
        assert sorted(e.op for e in found if e.op in ("MatMul", "Neg")) == ops


def test_other_events_of_a_profile_are_left_out():
    node = {
        "cat": "Node",
        "name": "a_kernel_time",
        "dur": 5,
        "args": {"op_name": "Exp", "provider": "CPUExecutionProvider"},
    }
    events = [
        {"cat": "Session", "name": "model_run", "dur": 7},
        {**node, "name": "a_fence_before"},
        node,
        {"cat": "Node", "name": "b"},
    ]
    (found,) = read_profile(events)
    assert (found.name, found.op, found.where, found.macs, found.seconds) == ("a", "Exp", "cpu", 0, 5e-6)
    assert read_profile([]) == []
