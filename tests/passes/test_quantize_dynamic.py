from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime import OnnxRuntime
from optkit.backends.onnxruntime.lower import OnnxRuntimeOptions
from optkit.graph import text, verify, walk
from optkit.passes.base import Context
from optkit.passes.quantization.dynamic import QuantizeDynamic
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
PRODUCT = ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]
CONTEXT = Context(target=target("x86-vnni"))


def _model(source: str, **weights: object) -> ir.Model:
    """Text whose inputs other than x, x2 … are weights: normal numbers, or those that are given."""
    model, random = parse(HEAD + source), np.random.default_rng(0)
    for value in list(model.graph.inputs):
        name = str(value.name)
        if name.startswith("x"):
            continue
        array = np.asarray(weights.get(name, random.normal(size=value.shape.numpy()) * 0.3))
        value.const_value = ir.tensor(array.astype(value.dtype.numpy()), name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def _quantized(model: ir.Model, **options) -> ir.Model:
    after = model.clone()
    options.setdefault("smallest", 1)
    changes = QuantizeDynamic(**options).run(after, CONTEXT)
    verify(after)
    assert [(v.name, v.dtype, str(v.shape)) for v in (*after.graph.inputs, *after.graph.outputs)] == [
        (v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)
    ]
    assert bool(changes) == (text(after) != text(model))
    assert QuantizeDynamic(**options).run(after, CONTEXT) == []
    return after


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in walk(model)]


def _executed(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[str]:
    backend, options = OnnxRuntime(), OnnxRuntimeOptions()
    with tempfile.TemporaryDirectory() as folder:
        backend.lower(model, target("x86-vnni"), options, Path(folder))
        return [e.op for e in backend.executed(Path(folder), target("x86-vnni"), options, feeds)]


def _x(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _by_hand(x: np.ndarray, w: np.ndarray, bias: float | np.ndarray = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 with u8 activations and s8 weights per column, and the error that rounding allows."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    low, high = min(x.min(), 0), max(x.max(), 0)
    s_x = (high - low) / 255 or 1.0
    zero = np.clip(np.round(-low / s_x), 0, 255)
    q = np.clip(np.round(x / s_x) + zero, 0, 255)
    s_w = np.abs(w).max(0) / 127
    s_w[s_w == 0] = 1
    on_grid = np.round(w / s_w) * s_w
    # A quotient next to a tie may go the other way in float32: one step of x times the weights, for one in a row.
    return (q - zero) * s_x @ on_grid + bias, np.full(w.shape[1], s_x * np.abs(w).max() * 2)


GEMM = "g (float[4, 16] x, float[16, 10] w, float[10] b) => (float[4, 10] y) { y = Gemm(x, w, b) }"
TURNED = GEMM.replace("[16, 10] w", "[10, 16] w").replace("Gemm(", "Gemm<transB = 1>(")
MATMUL = "g (float[2, 4, 16] x, float[16, 10] w) => (float[2, 4, 10] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize("source", [GEMM, TURNED, MATMUL], ids=["gemm", "transposed", "matmul"])
def test_products_become_integer_products_and_give_what_the_formula_says(source):
    model = _model(source)
    after = _quantized(model)
    assert _ops(after) == PRODUCT + ["Add"] * (source is not MATMUL)
    w = model.graph.initializers["w"].const_value.numpy()
    b = model.graph.initializers["b"].const_value.numpy() if "b" in model.graph.initializers else 0.0
    x = _x(*model.graph.inputs[0].shape.numpy())
    expected, allowed = _by_hand(x, w.T if source is TURNED else w, b)
    found = ReferenceSession(after).run({"x": x})["y"]
    assert (np.abs(found - expected) <= allowed).all()
    assert np.median(np.abs(found - expected)) < allowed[0] / 100


@pytest.mark.parametrize("source", [GEMM, TURNED, MATMUL], ids=["gemm", "transposed", "matmul"])
def test_onnx_runtime_fuses_them_into_one_kernel(source):
    model = _model(source)
    ran = _executed(_quantized(model), {"x": _x(*model.graph.inputs[0].shape.numpy())})
    assert [op for op in ran if op != "Add"] == ["DynamicQuantizeMatMul"]


def test_products_of_one_value_share_its_quantization():
    model = _model("""
    g (float[2, 4, 16] x, float[16, 10] q, float[16, 10] k) => (float[2, 4, 10] y, float[2, 4, 10] z) {
      y = MatMul(x, q)
      z = MatMul(x, k)
    }
    """)
    assert _ops(_quantized(model)).count("DynamicQuantizeLinear") == 1


def test_products_with_one_weight_share_its_integers():
    model = _model("""
    g (float[4, 16] x, float[4, 16] x2, float[16, 10] w) => (float[4, 10] y, float[4, 10] z) {
      y = MatMul(x, w)
      z = Gemm(x2, w)
    }
    """)
    after = _quantized(model)
    stored = [n for n, v in after.graph.initializers.items() if v.const_value.dtype == ir.DataType.INT8]
    assert [n for n in stored if n.endswith("/q")] == ["w/q"]
    assert "w" not in after.graph.initializers


IF = """
g (float[4, 16] x, bool x_b, float[16, 10] w, float[16, 10] v) => (float[4, 10] y) {
  y = If (x_b) <
    then_branch = yes () => (float[4, 10] t) { t = MatMul(x, w) },
    else_branch = no () => (float[4, 10] e) { m = MatMul(x, v) e = Neg(m) }
  >
}
"""


def test_bodies_of_conditionals_are_entered_also_where_both_read_one_value():
    model = _model(IF)
    after = _quantized(model)
    assert _ops(after) == ["If", *PRODUCT, *PRODUCT, "Neg"]
    for b in (True, False):
        feeds = {"x": _x(4, 16), "x_b": np.array(b)}
        expected, found = (ReferenceSession(m).run(feeds)["y"] for m in (model, after))
        assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_bodies_of_loops_are_entered():
    model = _model("""
    g (float[4, 16] x, int64 n, bool go, float[16, 16] w) => (float[4, 16] y) {
      y = Loop (n, go, x) <
        body = step (int64 i, bool c, float[4, 16] s) => (bool d, float[4, 16] t) { d = Identity(c) t = MatMul(s, w) }
      >
    }
    """.replace("int64 n", "int64 x_n").replace("bool go", "bool x_go").replace("(n, go", "(x_n, x_go"))  # fmt: skip
    after = _quantized(model)
    assert "MatMul" not in _ops(after)
    feeds = {"x": _x(4, 16), "x_n": np.array(2, np.int64), "x_go": np.array(True)}
    expected, found = (ReferenceSession(m).run(feeds)["y"] for m in (model, after))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_product_inside_a_body_that_is_its_output_keeps_the_name():
    after = _quantized(_model(IF))
    assert [[v.name for v in body.outputs] for body in after.graph.subgraphs()] == [["t"], ["e"]]


def test_inputs_that_are_zero_give_the_bias():
    model = _model(GEMM)
    found = ReferenceSession(_quantized(model)).run({"x": np.zeros((4, 16), np.float32)})["y"]
    bias = model.graph.initializers["b"].const_value.numpy()
    assert np.array_equal(found, np.broadcast_to(bias, (4, 10)))


def test_dead_columns_stay_zero():
    w = np.random.default_rng(0).normal(size=(16, 10))
    w[:, 3] = 0
    found = ReferenceSession(_quantized(_model(MATMUL, w=w))).run({"x": _x(2, 4, 16)})["y"]
    assert not found[..., 3].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay_in_float(bad, caplog):
    w = np.ones((16, 10))
    w[3, 4] = bad
    with caplog.at_level(logging.WARNING):
        after = _quantized(_model(MATMUL, w=w))
    assert _ops(after) == ["MatMul"]
    assert "its weights are infinite or NaN" in caplog.text


@pytest.mark.parametrize(
    "source",
    [
        "g (float[2, 4] x, float[4, 4] x2) => (float[2, 4] y) { y = MatMul(x, x2) }",
        "g (float[2, 4] x, float[4] w) => (float[2] y) { y = MatMul(x, w) }",
        "g (float[4, 2] x, float[4, 3] w) => (float[2, 3] y) { y = Gemm<transA = 1>(x, w) }",
        "g (float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { y = Gemm<alpha = 0.5>(x, w) }",
        "g (float[2, 4] x, float[4, 3] w, float[3] b) => (float[2, 3] y) { y = Gemm<beta = 2.0>(x, w, b) }",
        "g (double[2, 4] x, double[4, 3] w) => (double[2, 3] y) { y = MatMul(x, w) }",
        "g (float[2, 3, 4] x, float[2, 4, 3] w) => (float[2, 3, 3] y) { y = MatMul(x, w) }",
        "g (float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, 6, 6] y) { y = Conv(x, w) }",
        "g (float[4, 3] w, float[3, 5] x) => (float[4, 5] y) { y = MatMul(w, x) }",
    ],
    ids=["two inputs", "vector", "transA", "alpha", "beta", "double", "stack", "conv", "weight first"],
)
def test_other_products_stay(source):
    model = _model(source)
    assert text(_quantized(model)) == text(model)


@pytest.mark.parametrize(("elements", "taken"), [(160, True), (161, False)])
def test_small_weights_stay_in_float(elements, taken):
    assert ("MatMulInteger" in _ops(_quantized(_model(MATMUL), smallest=elements))) == taken


@pytest.mark.parametrize(
    ("option", "pattern", "expected"),
    [
        ("targets", "first", ["first"]),
        ("ignore", "first", ["second"]),
        ("ignore", "re:^s", ["first"]),
        ("targets", "Gemm", ["second"]),
        ("targets", "layer.*", ["first", "second"]),
        ("ignore", "layer.1", ["first"]),
    ],
)
def test_targets_and_ignore_select_by_name_operator_and_module(option, pattern, expected):
    model = _model("""
    g (float[4, 16] x, float[16, 10] w, float[16, 10] v) => (float[4, 10] y, float[4, 10] z) {
      y = MatMul(x, w)
      z = Gemm(x, v)
    }
    """)
    for index, (node, name) in enumerate(zip(model.graph, ("first", "second"), strict=True)):
        node.name = name
        node.metadata_props["optkit.module"] = f"layer.{index}"
    changes = QuantizeDynamic(smallest=1, **{option: (pattern,)}).run(model, CONTEXT)
    assert [c.node for c in changes] == expected


def test_names_that_are_taken_get_a_number():
    model = _model("""
    g (float[4, 16] x, float[16, 10] w) => (float[4, 10] y) {
      "x/dynamic/q" = Identity(x)
      "w/q" = MatMul("x/dynamic/q", w)
      z = MatMul(x, w)
      y = Add("w/q", z)
    }
    """)
    after = _quantized(model)
    assert _ops(after).count("MatMulInteger") == 2


def test_weights_become_a_quarter():
    model = _model(GEMM.replace("16", "256").replace("[10]", "[256]").replace(" 10]", " 256]"))
    after = _quantized(model)
    size = sum(v.const_value.nbytes for v in after.graph.initializers.values())
    assert size < 0.27 * sum(v.const_value.nbytes for v in model.graph.initializers.values())
