"""Products of u8 by u8 are those of u8 by s8, exactly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from optkit.graph import verify, walk
from optkit.reference import ReferenceSession
from optkit.testing import parse
from optkit.unsigned import signed, unsigned

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\ng %s'
TWO = """(uint8[3, 64] x) => (int32[3, 8] y, int32[3, 8] z) <uint8 a = {7}, int8 b = {3}> {
  y = MatMulInteger(x, w, a%s) z = MatMulInteger(x, w, a%s) }"""
CONV = """(uint8[1, 4, 5, 5] x) => (int32[1, 8, 5, 5] y) <uint8 a = {7}, int8 b = {-3}> {
  y = ConvInteger<pads = [1, 1, 1, 1]>(x, w, a%s) }"""
SCALED = """(uint8[3, 64] x) => (uint8[3, 8] y) <float s = {0.02}, float t = {30.0}, uint8 a = {7}, int8 b = {0}, uint8 o = {128}> {
  y = QLinearMatMul(x, s, a, w, s, b, t, o) }"""
INSIDE = """(uint8[3, 64] x, bool c) => (int32[3, 8] y) {
  y = If (c) <
    then_branch = yes () => (int32[3, 8] t) { t = MatMulInteger(x, w) },
    else_branch = no () => (int32[3, 8] e) { e = MatMulInteger(x, w) }
  > }"""


def _bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(96, 128, shape).astype(np.int8)


def _matmul(x: np.ndarray, w: np.ndarray, x_zero: int = 0, w_zero: int = 0) -> np.ndarray:
    return (x.astype(np.int64) - x_zero) @ (w.astype(np.int64) - w_zero)


@pytest.mark.parametrize(
    ("source", "shape", "x"),
    [
        (TWO % ("", ""), (64, 8), (3, 64)),
        (TWO % (", b", ", b"), (64, 8), (3, 64)),
        (CONV % "", (8, 4, 3, 3), (1, 4, 5, 5)),
        (CONV % ", b", (8, 4, 3, 3), (1, 4, 5, 5)),
        (SCALED, (64, 8), (3, 64)),
    ],
    ids=["product", "shared zero point", "convolution", "zero point", "scaled"],
)
@pytest.mark.parametrize("optimize", [True, False])
def test_sums_are_those_that_onnx_defines(source, shape, x, optimize):
    model = parse(HEAD % source, w=_bytes(*shape))
    feeds = {"x": np.random.default_rng(1).integers(200, 256, x).astype(np.uint8)}
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    assert signed(model)
    found = ReferenceSession(model, optimize=optimize).run(feeds)
    unsigned(model)
    verify(model)
    assert not signed(model)
    again = ReferenceSession(model, optimize=optimize).run(feeds)
    for name, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(found[name], wanted)
        np.testing.assert_array_equal(again[name], wanted)


def test_products_inside_bodies_are_exact():
    model, x = parse(HEAD % INSIDE, w=_bytes(64, 8)), np.full((3, 64), 255, np.uint8)
    for branch in (True, False):
        found = ReferenceSession(model).run({"x": x, "c": np.array(branch)})["y"]
        np.testing.assert_array_equal(found, _matmul(x, _bytes(64, 8)))


def test_weights_that_are_computed_or_unsigned_stay_as_they_are():
    computed = parse(HEAD % "(uint8[3, 4] x, int8[4, 2] w) => (int32[3, 2] y) { y = MatMulInteger(x, w) }")
    plain = parse(
        HEAD % "(uint8[3, 4] x) => (int32[3, 2] y) { y = MatMulInteger(x, w) }", w=np.ones((4, 2), np.uint8)
    )
    for model in (computed, plain):
        before = [str(v) for node in walk(model) for v in node.inputs]
        unsigned(model)
        assert [str(v) for node in walk(model) for v in node.inputs] == before
