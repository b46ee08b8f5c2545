"""Dynamic quantization in floats gives the very numbers of the integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import verify, walk
from optkit.passes.base import Context
from optkit.passes.lowering.dynamic import DynamicToFloat
from optkit.passes.quantization.dynamic import QuantizeDynamic
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse, random_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 21%s]>\ng %s'
CONTEXT = Context(target=target("iphone15"))
GRID = [
    "ReduceMin", "Min", "ReduceMax", "Max", "Sub", "Equal", "Div", "Where", "Max", "Div", "Max", "Round", "Div", "Round", "Max", "Add", "Min", "Mul"
]  # fmt: skip
CONV = """(float[1, 3, 6, N] x) => (float[1, 4, 3, M] y) <float ws = {0.013}, uint8 wz = {%d}, float[1, 4, 1, 1] b = {1, -2, 3, 0.5}> {
  q, s, z = DynamicQuantizeLinear(x) f = Mul(%s)
  i = ConvInteger<strides = [2, 2], pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(q, w, z, wz)
  c = Cast<to = 1>(i) m = Mul(%s) y = Add(m, b) }"""
PRODUCT = """(float[N, 16] x) => (float[N, 4] y) <float[4] ws = {0.013, 0.2, 1e-3, 0.1}, uint8[4] wz = {3, 128, 200, 0}> {
  q, s, z = DynamicQuantizeLinear(x) f = Mul(s, ws) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) y = Mul(c, f) }"""


def _model(graph: str, *, contrib: bool = False, **weights: np.ndarray) -> ir.Model:
    return parse(HEAD % (', "com.microsoft" : 1' if contrib else "", graph), **weights)


def _bytes(*shape: int, low: int = 0, high: int = 256, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(low, high, shape).astype(kind)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def _exactly(model: ir.Model, ops: list[str] | None, **inputs: np.ndarray) -> ir.Model:
    """Bit for bit: powers of two round nothing, and so few products have 24 bits."""
    return check_pass(DynamicToFloat(), model, ops=ops, atol=0, rtol=0, context=CONTEXT, **inputs)


@pytest.mark.parametrize("factor", ["s, ws", "ws, s"])
@pytest.mark.parametrize("end", ["c, f", "f, c"])
@pytest.mark.parametrize("zero", [0, 77])
def test_a_convolution_of_integers_gives_the_same_bits(factor, end, zero):
    model = _model(CONV % (zero, factor, end), w=_bytes(4, 3, 3, 3))
    _exactly(model, [*GRID, "DequantizeLinear", "Conv", "Mul", "Mul", "Mul", "Add"])


def test_a_product_of_integers_with_zero_points_of_columns_gives_the_same_bits():
    _exactly(_model(PRODUCT, w=_bytes(16, 4)), [*GRID, "DequantizeLinear", "MatMul", "Mul", "Mul", "Mul"])


def test_a_product_of_two_activations_gives_the_same_bits():
    graph = """(float[2, N, 16] x, float[2, 16, 5] z) => (float[2, N, 5] y) {
      q, s, o = DynamicQuantizeLinear(x) r, t, p = DynamicQuantizeLinear(z) f = Mul(s, t)
      i = MatMulInteger(q, r, o, p) c = Cast<to = 1>(i) y = Mul(c, f) }"""
    _exactly(_model(graph), [*GRID, *GRID, "MatMul", "Mul", "Mul", "Mul", "Mul"])


def test_constants_on_the_left_may_have_zero_points_of_rows():
    graph = """(float[6, N] x) => (float[2, N] y) <float ws = {0.013}, uint8[2] wz = {3, 200}> {
      q, s, z = DynamicQuantizeLinear(x) f = Mul(s, ws) i = MatMulInteger(w, q, wz, z) c = Cast<to = 1>(i) y = Mul(c, f) }"""
    # NumPy, since ONNX Runtime has one zero point for all rows.
    w, x = _bytes(2, 6), _normal(6, 5)
    model = _model(graph, w=w)
    DynamicToFloat().run(model, CONTEXT)
    verify(model)
    low, high = x.min(), x.max()
    scale = (high - low) / np.float32(255)
    zero = np.round(-low / scale)
    q = (np.clip(np.round(x / scale) + zero, 0, 255) - zero).astype(np.int64)
    sums = (w.astype(np.int64) - np.array([[3], [200]])) @ q
    np.testing.assert_array_equal(
        ReferenceSession(model, optimize=False).run({"x": x})["y"],
        sums.astype(np.float32) * (scale * np.float32(0.013)),
    )


def test_a_factor_that_is_no_product_grows_as_a_whole():
    graph = """(float[N, 16] x, float f) => (float[N, 4] y) <uint8 wz = {9}> {
      q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) y = Mul(c, f) }"""
    _exactly(_model(graph, w=_bytes(16, 4)), [*GRID, "DequantizeLinear", "MatMul", "Mul", "Mul"])


def test_integers_that_are_added_are_added_on_the_grid():
    """As ONNX Runtime writes biases of convolutions: rounded down to whole steps, which are thousands of millions here."""
    graph = """(float[1, 3, N, 6] x) => (float[1, 4, N, 6] y) <float ws = {0.013}, uint8 wz = {121}, float[4] b = {100, -2, 3e-5, 0.5},
    int64[4] column = {1, -1, 1, 1}> {
      q, s, z = DynamicQuantizeLinear(x) f = Mul(s, ws) d = Div(b, f) l = Floor(d) k = Cast<to = 6>(l) r = Reshape(k, column)
      i = ConvInteger<kernel_shape = [1, 1]>(q, w, z, wz) a = Add(i, r) c = Cast<to = 1>(a) y = Mul(c, f) }"""
    model = _exactly(_model(graph, w=_bytes(4, 3, 1, 1)), None)
    assert [n.op_type for n in walk(model)].count("Cast") == 2


def test_an_activation_that_several_products_read_is_rounded_once():
    graph = """(float[N, 16] x) => (float[N, 4] y, float[N, 4] v) <float ws = {0.013}, uint8 wz = {9}> {
      q, s, z = DynamicQuantizeLinear(x) f = Mul(s, ws) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) y = Mul(c, f)
      g = Mul(s, ws) j = MatMulInteger(q, u, z, wz) d = Cast<to = 1>(j) v = Mul(d, g) }"""
    model = _exactly(_model(graph, w=_bytes(16, 4), u=_bytes(16, 4)[::-1].copy()), None)
    assert [n.op_type for n in walk(model)].count("ReduceMin") == 1


def test_a_tensor_of_zeros_gives_zeros():
    model = _model(PRODUCT, w=_bytes(16, 4))
    _exactly(model, None, x=np.zeros((3, 16), np.float32))


def test_values_of_one_sign_and_tiny_ones_give_the_same_bits():
    model = _model(PRODUCT, w=_bytes(16, 4))
    drawn = np.abs(_normal(3, 16))
    for x in (drawn + 1, -drawn - 1, drawn * np.float32(1e-30), drawn * np.float32(1e30)):
        _exactly(model, None, x=x)


def test_signed_weights_over_all_8_bits_give_the_exact_sums():
    """Against sums in NumPy: ONNX Runtime's saturate in 16 bits on some processors."""
    w = _bytes(16, 4, low=-128, high=128, kind=np.int8)
    model = _model(PRODUCT.replace(", uint8[4] wz = {3, 128, 200, 0}", "").replace("z, wz", "z"), w=w)
    DynamicToFloat().run(model, CONTEXT)
    x = _normal(3, 16)
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.round(-low / scale)
    sums = (np.clip(np.round(x / scale) + zero, 0, 255) - zero).astype(np.int64) @ w.astype(np.int64)
    expected = sums.astype(np.float32) * (scale * np.array([0.013, 0.2, 1e-3, 0.1], np.float32))
    found = ReferenceSession(model, optimize=False).run({"x": x})["y"]
    # The order in which scales and powers of two are multiplied.
    np.testing.assert_array_equal(found, expected)


def test_what_our_own_dynamic_quantization_writes_gives_the_same_bits():
    graph = "(float[N, 16] x) => (float[N, 4] y) <float[4] b = {1, 2, 3, 4}> { y = Gemm(x, w, b) }"
    # For a target whose sums saturate, weights that could let them are in 7 bits.
    w = _normal(16, 4)
    model = _model(graph, w=w)
    QuantizeDynamic(smallest=1).run(model, Context(target=target("x86-avx2")))
    _exactly(model, [*GRID, "DequantizeLinear", "MatMul", "Mul", "Mul", "Mul", "Add"])


def test_bodies_of_branches_are_entered():
    graph = """(float[N, 16] x, bool k) => (float[N, 4] y) <float ws = {0.013}, uint8 wz = {9}> {
      y = If(k) <then_branch = t () => (float[N, 4] a) {
          q, s, z = DynamicQuantizeLinear(x) f = Mul(s, ws) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) a = Mul(c, f) },
        else_branch = e () => (float[N, 4] o) { o = MatMul(x, u) }> }"""
    model = _model(graph, w=_bytes(16, 4), u=_normal(16, 4))
    after = _exactly(model, None, k=np.array(True))
    assert "MatMulInteger" not in [n.op_type for n in walk(after)]


# What is read by more than its scale, or is no 8-bit constant and no quantized activation.
LEFT = {
    "integers that are an output": PRODUCT.replace("=> (float[N, 4] y)", "=> (float[N, 4] y, int32[N, 4] i)"),
    "integers that are scaled twice": PRODUCT.replace("y = Mul(c, f)", "v = Mul(c, f) y = Add(v, c)"),
    "integers that are squared": PRODUCT.replace("y = Mul(c, f)", "y = Mul(c, c)"),
    "integers that become whole numbers of another type": PRODUCT.replace(
        "c = Cast<to = 1>(i)", "d = Cast<to = 7>(i) c = Cast<to = 1>(d)"
    ),
    "integers without a scale": PRODUCT.replace("y = Mul(c, f)", "y = Add(c, f)"),
    "an activation without its zero point": PRODUCT.replace("q, w, z, wz", "q, w"),
    "an activation that is an input": PRODUCT.replace("(float[N, 16] x)", "(float[N, 16] x, uint8[N, 16] p)").replace(
        "MatMulInteger(q", "MatMulInteger(p"
    ),
    "weights that are an input": PRODUCT.replace("(float[N, 16] x)", "(float[N, 16] x, uint8[16, 4] p)").replace(
        "(q, w", "(q, p"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_product_with_a_scale_of_each_run_stays(name):
    model = _model(LEFT[name], w=_bytes(16, 4))
    before = [n.op_type for n in walk(model)]
    _exactly(model, before)


def test_a_product_of_constants_stays():
    graph = """(float[4] s) => (float[3, 4] y) <uint8 z = {9}> {
      i = MatMulInteger(u, w, z, z) c = Cast<to = 1>(i) y = Mul(c, s) }"""
    model = _model(graph, w=_bytes(16, 4), u=_bytes(3, 16))
    _exactly(model, ["MatMulInteger", "Cast", "Mul"])


FUSED = {
    "MatMulIntegerToFloat": """(float[N, 16] x) => (float[N, 4] y) <float[4] ws = {0.01, 0.2, 1e-3, 0.1}, uint8[4] wz = {3, 128, 200, 0},
      float[4] b = {1, 2, 3, 4}> {
        q, s, z = DynamicQuantizeLinear(x) y = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz%s) }""",
    "DynamicQuantizeMatMul": """(float[N, 16] x) => (float[N, 4] y) <float[4] ws = {0.01, 0.2, 1e-3, 0.1}, uint8[4] wz = {3, 128, 200, 0},
      float[4] b = {1, 2, 3, 4}> { y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz%s) }""",
}  # fmt: skip


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_products_of_onnx_runtime_become_products_of_floats(name, bias):
    model = _model(FUSED[name] % bias, contrib=True, w=_bytes(16, 4))
    model.graph.outputs[0].shape, model.graph.outputs[0].type = (
        ir.Shape(["N", 4]),
        ir.TensorType(ir.DataType.FLOAT),
    )
    # One rounding of the scales' product, of what the bias adds, and ONNX Runtime's of both at once.
    after = check_pass(DynamicToFloat(), model, atol=1e-6, rtol=1e-6, context=CONTEXT)
    assert after.opset_imports == {"": 21} and {n.domain for n in walk(after)} == {""}


LSTM = """(float[5, 2, 8] x) => (float[5, %d, 2, 6] y, float[%d, 2, 6] h, float[%d, 2, 6] c) {
  y, h, c = com.microsoft.DynamicQuantizeLSTM<hidden_size = 6, direction = "%s">(x, w, r, b, , , , , ws, wz, rs, rz) }"""


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("rows", [False, True], ids=["one scale a direction", "one scale a row"])
def test_a_recurrent_layer_keeps_its_state_in_floats(direction, rows):
    ways = 2 if direction == "bidirectional" else 1
    scales = (ways, 24) if rows else (ways,)
    kind = np.int8 if rows else np.uint8
    middle = 0 if rows else 128
    model = _model(
        LSTM % (ways, ways, ways, direction), contrib=True,
        w=_bytes(ways, 8, 24, low=middle - 64, high=middle + 64, kind=kind),
        r=_bytes(ways, 6, 24, low=middle - 64, high=middle + 64, kind=kind),
        b=_normal(ways, 48),
        ws=0.02 + 0.004 * _normal(*scales), rs=0.02 + 0.004 * _normal(*scales)[::-1],
        wz=np.full(scales, middle, kind), rz=np.full(scales, middle, kind),
    )  # fmt: skip
    for value, shape in zip(model.graph.outputs, ([5, ways, 2, 6], [ways, 2, 6], [ways, 2, 6]), strict=True):
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    after = model.clone()
    assert len(DynamicToFloat().run(after, CONTEXT)) == 1
    verify(after)
    assert [n.op_type for n in walk(after)] == [*["DequantizeLinear"] * 2, *GRID, "Mul", "Mul", "LSTM"]
    feeds = random_feeds(model)
    expected, found = (ReferenceSession(m, optimize=False).run(feeds) for m in (model, after))
    for name, value in expected.items():
        # Half a step of a state between -1 and 1 is 0.004; six products of it with weights up to 1.5 move a gate by 0.035 at most,
        # and sigmoids by a quarter of that.
        np.testing.assert_allclose(found[name], value, atol=0.01)
        assert np.abs(value).max() > 0.8
