"""What exporters put into attention, as torch 2.13 writes it for transformers 5 (both exporters)."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.cleanup.shapes import FoldShapes
from optkit.passes.fusion.affine import FoldAffine
from optkit.passes.fusion.attention import CleanAttention
from optkit.testing import check_pass, parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
GUARDED = (
    HEADER
    + """
g (float[2, 4, T, 8] q, float[2, 4, 8, T] k, float[2, 4, T, 8] v, %s) => (float[2, 4, T, 8] y)
<float zero = {0}, float low = {%s}, float half = {0.5}> {
  %s
  p = Softmax <axis = -1> (a)
  n = IsNaN (p)
  w = Where (n, zero, p)
  y = MatMul (w, v)
}
"""
)
PLAIN = "s = MatMul (q, k) a = Mul (s, half)"
BOOLEAN = "s = MatMul (q, k) f = Where (m, zero, low) a = Add (s, f)"
# Of three rows, the second is masked altogether; so is every row of the second batch.
ROWS = np.array([[[[1, 0, 1], [0, 0, 0], [0, 1, 1]]], [[[0, 0, 0]] * 3]], bool)


def test_a_guard_without_a_mask_goes():
    model = GUARDED % ("bool[2, 1, T, T] m", "0.0", PLAIN)
    check_pass(CleanAttention(), model, ops=["MatMul", "Mul", "Softmax", "MatMul"])


def test_a_guard_behind_a_finite_mask_goes():
    model = GUARDED % ("bool[2, 1, T, T] m", "-3.4028235e38", BOOLEAN)
    check_pass(CleanAttention(), model, ops=["MatMul", "Where", "Add", "Softmax", "MatMul"], m=ROWS)


def test_rows_that_an_infinite_mask_hides_still_give_zero():
    model = parse((GUARDED % ("bool[2, 1, T, T] m", "1.0", BOOLEAN)).replace("low = {1.0}", "low = {0}"))
    model.graph.initializers["low"].const_value = _scalar(-np.inf)
    ops = ["MatMul", "Where", "Add", "Softmax", "MatMul", "ReduceMax", "Equal", "Where"]
    check_pass(CleanAttention(), model, ops=ops, m=ROWS)


def _scalar(x):
    import onnx_ir as ir

    return ir.tensor(np.array(x, np.float32), name="low")


def test_a_mask_from_outside_is_asked_for_its_rows():
    body = "s = MatMul (q, k) a = Add (s, m)"
    mask = np.where(ROWS, 0, -np.inf).astype(np.float32)
    ops = ["MatMul", "Add", "Softmax", "MatMul", "ReduceMax", "Equal", "Where"]
    check_pass(CleanAttention(), GUARDED % ("float[2, 1, T, T] m", "0.0", body), ops=ops, m=mask)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("axis = -1> (a)", "axis = 2> (a)"),
        ("Where (n, zero, p)", "Where (n, half, p)"),
        ("y = MatMul (w, v)", "y = MatMul (w, v) z = Identity (w)"),
        ("s = MatMul (q, k)", "u = MatMul (q, k) s = Exp (u)"),
    ],
)
def test_guards_that_are_something_else_stay(before, after):
    source = GUARDED % ("bool[2, 1, T, T] m", "0.0", PLAIN)
    assert before in source
    source = source.replace(before, after)
    if "z =" in after:
        source = source.replace("(float[2, 4, T, 8] y)", "(float[2, 4, T, 8] y, float[2, 4, T, T] z)")
    after_ = check_pass(CleanAttention(), source)
    assert any(node.op_type == "IsNaN" for node in after_.graph)


ZERO_MASK = (
    HEADER
    + """
g (float[2, 4, T, 8] q, float[2, 4, 8, T] k, float[2, 4, T, 8] v, int64[4] shape) => (float[2, 4, T, 8] y)
<bool yes = {%s}, float zero = {0}, float low = {-1e9}> {
  c = Expand (yes, shape)
  f = Where (c, zero, low)
  s = MatMul (q, k)
  a = Add (s, f)
  p = Softmax <axis = -1> (a)
  y = MatMul (p, v)
}
"""
)


def _unwidened(yes):
    model = parse(ZERO_MASK % yes)
    (a,) = (n.outputs[0] for n in model.graph if n.op_type == "Add")
    (s,) = (n.outputs[0] for n in model.graph if n.op_type == "MatMul" and n.outputs[0].name == "s")
    a.shape = s.shape
    return model


def test_a_mask_that_is_zero_everywhere_goes():
    shape = np.array([2, 1, 3, 3], np.int64)
    check_pass(
        CleanAttention(), _unwidened("1"), ops=["MatMul", "Identity", "Softmax", "MatMul"],
        **_qkv(3), shape=shape,
    )  # fmt: skip


def test_a_mask_that_hides_stays():
    check_pass(
        CleanAttention(), _unwidened("0"), ops=["Expand", "Where", "MatMul", "Add", "Softmax", "MatMul"],
        **_qkv(3), shape=np.array([2, 1, 3, 3], np.int64),
    )  # fmt: skip


def test_a_zero_mask_that_may_widen_the_scores_stays():
    check_pass(
        CleanAttention(), ZERO_MASK % "1", ops=["Expand", "Where", "MatMul", "Add", "Softmax", "MatMul"],
        **_qkv(3), shape=np.array([2, 1, 3, 3], np.int64),
    )  # fmt: skip


def _qkv(t):
    random = np.random.default_rng(0)
    shapes = {"q": (2, 4, t, 8), "k": (2, 4, 8, t), "v": (2, 4, t, 8)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


DETOUR = (
    HEADER
    + """
g (float[B, T, 32] x) => (float[B, 4, 8, T] y)
<int64[4] heads = {0, 0, 4, 8}, int64[1] all = {-1}, int64[1] size = {8}, int64[1] four = {4}> {
  r = Reshape (x, heads)
  k = Transpose <perm = [0, 2, 1, 3]> (r)
  b = Shape <start = 0, end = 1> (x)
  t = Shape <start = 1, end = 2> (x)
  flat = Concat <axis = 0> (all, t, size)
  f = Reshape (k, flat)
  e = Transpose <perm = [%s]> (f)
  whole = Concat <axis = 0> (b, four, size, t)
  y = Reshape (e, whole)
}
"""
)


def _folded(source):
    from optkit.passes.base import Context
    from optkit.targets import target

    model = parse(source)
    FoldShapes().run(model, Context(target=target("cpu")))
    return model


def test_keys_transposed_as_three_axes_are_transposed_as_four():
    after = check_pass(
        CleanAttention(), _folded(DETOUR % "0, 2, 1"), ops=["Reshape", "Transpose", "Transpose"]
    )
    assert list(after.graph[-1].attributes["perm"].value) == [0, 1, 3, 2]


def test_another_order_of_three_axes_stays():
    source = (DETOUR % "2, 0, 1").replace("y = Reshape (e, whole)", "u = Reshape (e, whole) y = Identity (u)")
    after = check_pass(CleanAttention(), _folded(source))
    assert sum(node.op_type == "Reshape" for node in after.graph) == 3


SCALES = (
    HEADER
    + """
g (float[B, T, 32] x, float[B, T, 32] z) => (float[B, 4, T, T] y)
<float[32, 32] w, float[32] bias, int64[4] heads = {0, 0, 4, 8}, float a = {0.25}, float b = {%s}> {
  l = MatMul (x, w)
  lb = Add (l, bias)
  r = Reshape (lb, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (r)
  m = Reshape (z, heads)
  k = Transpose <perm = [0, 2, 3, 1]> (m)
  %s
  y = Softmax <axis = -1> (s)
}
"""
)
_RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": _RANDOM.standard_normal((32, 32)).astype(np.float32) / 8,
    "bias": _RANDOM.standard_normal(32).astype(np.float32),
}
BOTH = "qa = Mul (q, a) kb = Mul (k, b) s = MatMul (qa, kb)"
LINEAR = ["MatMul", "Add"]


@pytest.mark.parametrize(
    "body", [BOTH, "p = MatMul (q, k) s = Mul (p, a)", "p = MatMul (q, k) s = Div (p, a)"]
)
def test_scales_go_in_front_of_the_heads_and_into_the_weights(body):
    model = parse(SCALES % ("0.5", body), **WEIGHTS)
    keys = ["Reshape", "Transpose"]
    after = check_pass(
        CleanAttention(), model, ops=[*LINEAR, *keys, "Mul", *keys, "MatMul", "Softmax"], atol=2e-5
    )
    folded = ["MatMul", *keys, "Add", *keys, "MatMul", "Softmax"]
    check_pass(FoldAffine(), after, ops=folded, atol=2e-5)


def test_a_scale_that_is_no_single_number_stays():
    source = (SCALES % ("0.5", BOTH)).replace("float b = {0.5}", "float[8, 1] b = {1, 2, 3, 4, 5, 6, 7, 8}")
    model = parse(source, **WEIGHTS)
    ops = [*LINEAR, "Reshape", "Transpose", "Reshape", "Transpose", "Mul", "Mul", "MatMul", "Softmax"]
    check_pass(CleanAttention(), model, ops=ops, atol=2e-5)


def test_a_scale_stays_where_no_layer_can_take_it_in():
    body = "qc = Cos (q) p = MatMul (qc, k) s = Mul (p, a)"
    ops = [*LINEAR, "Reshape", "Transpose", "Reshape", "Transpose", "Cos", "MatMul", "Mul", "Softmax"]
    check_pass(CleanAttention(), parse(SCALES % ("0.5", body), **WEIGHTS), ops=ops, atol=2e-5)


def test_scales_whose_product_is_nothing_stay():
    ops = [*LINEAR, "Reshape", "Transpose", "Reshape", "Transpose", "Mul", "Mul", "MatMul", "Softmax"]
    check_pass(CleanAttention(), parse(SCALES % ("0", BOTH), **WEIGHTS), ops=ops, atol=2e-5)
