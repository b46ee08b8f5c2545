""".tflite files: integers, sizes, what is refused and how, against ONNX Runtime and the tables of the file."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import optkit
from optkit.cli.app import main
from optkit.data import CalibrationData
from optkit.errors import DataError, ModelError, UnsupportedOpError, UsageError
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.passes.quantization.static import QuantizeStatic
from optkit.passes.quantization.weights import QuantizeWeights
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets import target
from optkit.testing import parse, random_feeds

needs = pytest.mark.needs("ai_edge_litert")
pytestmark = needs

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng '
PHONE = target("android-cpu")
MOBILE = """(float[N, 3, 16, 16] x) => (float[N, 5] y) <int64[2] flat = {0, -1}, float zero = {0}, float six = {6}> {
  [a] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w0, b0) b = Clip(a, zero, six)
  [c] c = Conv<kernel_shape = [3, 3], pads = [0, 0, 1, 1], strides = [2, 2], group = 16>(b, w1, b1) d = Relu(c)
  [e] e = Conv<kernel_shape = [1, 1]>(d, w2) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b) f = Add(m, e)
  p = GlobalAveragePool(f) r = Reshape(p, flat) [g] g = Gemm<transB = 1>(r, w3, b3) y = Softmax(g) }"""
TEXT = """(int64[N, T] ids, int64[N, T] mask) => (float[N, 8] y) <int64[2] to = {0, -1}, int64[1] one = {1}, int64 shift = {-1}> {
  e = Gather(table, ids) [h] h = MatMul(e, w) n = LayerNormalization(h, s, t) k = Transpose<perm = [0, 2, 1]>(n) a = MatMul(n, k)
  p = Softmax(a) v = MatMul(p, n) f = Cast<to = 1>(mask) u = Unsqueeze(f, end) z = Mul(v, u) y = ReduceSum<keepdims = 0>(z, one) }"""


def _mobile():
    random = np.random.default_rng(0)
    shapes = {
        "w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 1, 3, 3), "b1": (16,), "w2": (16, 16, 1, 1), "w3": (5, 16), "b3": (5,),
    }  # fmt: skip
    return parse(
        HEAD + MOBILE, **{k: random.normal(size=s).astype(np.float32) * 0.4 for k, s in shapes.items()}
    )


def _text():
    random = np.random.default_rng(0)
    weights = {"table": (20, 8), "w": (8, 8), "s": (8,), "t": (8,)}
    text = TEXT.replace("int64 shift = {-1}", "int64[1] end = {-1}")
    return parse(HEAD + text, **{k: random.normal(size=s).astype(np.float32) for k, s in weights.items()})


def _words(n=1, t=6, seed=0):
    random = np.random.default_rng(seed)
    return {
        "ids": random.integers(0, 20, (n, t)),
        "mask": random.integers(0, 2, (n, t)),
    }


def _lowered(model, folder, **options):
    from optkit.backends.litert.lower import LiteRt

    backend = LiteRt()
    chosen = backend.options(**options)
    legalize(model, backend, PHONE, name="model")
    folder.mkdir(parents=True, exist_ok=True)
    backend.lower(model, PHONE, chosen, folder)
    return backend, chosen


def _opened(model, folder, **options):
    backend, chosen = _lowered(model, folder, **options)
    return backend.load(folder, PHONE, chosen, threads=1)


def _file(folder):
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs((folder / "model.tflite").read_bytes(), 0))
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if k.isupper()}
    ops = [
        [
            (names[model.operatorCodes[o.opcodeIndex].builtinCode], g.tensors[o.outputs[0]])
            for o in g.operators
        ]
        for g in model.subgraphs
    ]
    return model, ops


def _quantized(model, seed=0, n=4):
    from optkit.backends.litert.placement import PLACEMENTS

    batches = [random_feeds(model, size=2, seed=seed + i) for i in range(n)]
    context = Context(target=PHONE, data=CalibrationData(batches), placements=PLACEMENTS)
    QuantizeStatic(placement="default").run(model, context)
    return model


def test_integers_go_from_layer_to_layer(tmp_path):
    _lowered(_quantized(_mobile()), tmp_path)
    from ai_edge_litert.schema_py_generated import TensorType

    _, (ops,) = _file(tmp_path)
    kinds = [code for code, out in ops if out.type == TensorType.INT8]
    assert [code for code, out in ops if code in ("QUANTIZE", "DEQUANTIZE")] == ["QUANTIZE", "DEQUANTIZE"]
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "ADD", "MEAN", "FULLY_CONNECTED"} <= set(kinds)
    assert [code for code, out in ops if out.type == TensorType.FLOAT32] == ["DEQUANTIZE", "SOFTMAX"]


def test_integers_compute_what_the_pairs_do_to_a_step(tmp_path):
    model = _quantized(_mobile())
    reference = ReferenceSession(model, optimize=False)
    float_ = ReferenceSession(_mobile())
    session = _opened(model, tmp_path)
    for seed in range(5):
        feeds = random_feeds(model, size=1, seed=seed)
        (found,), (expected,), (exact,) = (list(s.run(feeds).values()) for s in (session, reference, float_))
        # Sums of integers are exact; each rounding may fall on the other side of a tie.
        assert np.abs(found - expected).max() < 0.02
        assert np.abs(expected - exact).max() > 1e-4


def test_padding_of_integers_is_zero_on_their_grid(tmp_path):
    text = (
        HEAD
        + "(float[1, 4, 6, 6] x) => (float[] y) { a = Conv<kernel_shape = [3, 3], pads = [2, 0, 1, 1], strides = [2, 2]>(x, w) y = Relu(a) }"
    )
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    # Values far from 0, so that the zero point is at the end of the grid.
    feeds = {"x": np.random.default_rng(1).uniform(3, 5, (1, 4, 6, 6)).astype(np.float32)}
    model = parse(text, w=weight)
    from optkit.backends.litert.placement import PLACEMENTS

    data = CalibrationData([feeds])
    QuantizeStatic(placement="default").run(model, Context(target=PHONE, data=data, placements=PLACEMENTS))
    expected = ReferenceSession(model, optimize=False).run(feeds)["y"]
    found = _opened(model, tmp_path).run(feeds)["y"]
    assert np.abs(found - expected).max() <= 1.01 * expected.max() / 255


def test_int8_weights_of_linear_layers_stay_so_and_their_kernels_round_activations(tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    model = _text()
    QuantizeWeights(smallest=1).run(model, Context(target=PHONE))
    session = _opened(model, tmp_path / "small", shapes={"T": 6})
    file, (ops,) = _file(tmp_path / "small")
    tensors = file.subgraphs[0].tensors
    linear = [o for o in file.subgraphs[0].operators if len(o.inputs) == 3]
    stored = [tensors[o.inputs[1]] for o in linear]
    assert [t.type for t in stored if tuple(t.shape) == (8, 8)] == [TensorType.INT8]
    assert all(
        len(t.quantization.scale) == 8 and t.quantization.quantizedDimension == 0
        for t in stored
        if tuple(t.shape) == (8, 8)
    )
    # Rows of the table are looked up as integers; the table itself never becomes floats.
    assert "DEQUANTIZE" not in [code for code, _ in ops]
    expected = ReferenceSession(model, optimize=False).run(_words())["y"]
    found = session.run(_words())["y"]
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


HALVED = """(float[1, 16, 6, 6] x, int64[2] i, float[3, 1, 16] z) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
  a = Conv<kernel_shape = [3, 3]>(x, k) b = ConvTranspose<kernel_shape = [3, 3]>(x, t) r = Gather(rows, i) c = MatMul(r, p)
  d = Gemm<transB = 1>(r, q) e = LSTM<hidden_size = 16>(z, w, u) }"""


def test_weights_that_float16_holds_are_stored_in_it_and_compute_the_same(tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    random = np.random.default_rng(0)
    shapes = {
        "k": (8, 16, 3, 3), "t": (16, 8, 3, 3), "rows": (40, 32), "p": (32, 40), "q": (36, 32), "w": (1, 64, 16), "u": (1, 64, 16),
    }  # fmt: skip
    weights = {n: random.normal(size=s).astype(np.float16).astype(np.float32) for n, s in shapes.items()}
    # What float16 does not hold stays whole, be it one element.
    weights["p"][3, 4] = 0.1
    model = parse(HEAD + HALVED, **weights)
    session = _opened(model, tmp_path)
    file, _ = _file(tmp_path)
    (graph,) = file.subgraphs
    halves = {t.name.decode() for t in graph.tensors if t.type == TensorType.FLOAT16}
    assert halves == {"k", "t", "rows", "q", "weights"}
    assert sum(t.type == TensorType.FLOAT16 for t in graph.tensors) == 6
    whole = {
        tuple(t.shape)
        for t in graph.tensors
        if t.type == TensorType.FLOAT32 and file.buffers[t.buffer].data is not None
    }
    assert (40, 32) in whole and max(map(np.prod, whole)) == 40 * 32
    feeds = random_feeds(model, seed=1)
    found, expected = session.run(feeds), ReferenceSession(model, optimize=False).run(feeds)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_a_model_in_half_precision_computes_in_float32_and_stays_as_small(tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    text = """(float16[1, 16, 6, 6] x) => (float16[1, 32, 4, 4] y, float16[1, 32] z) <int64[2] axes = {2, 3}> {
      c = Conv<kernel_shape = [3, 3]>(x, k) y = Tanh(c) z = ReduceMean<keepdims = 0>(c, axes) }"""
    weight = np.random.default_rng(0).normal(size=(32, 16, 3, 3)).astype(np.float16) / 8
    model = parse(HEAD + text, k=weight)
    whole = parse(HEAD + text.replace("float16", "float"), k=weight.astype(np.float32))
    session = _opened(model, tmp_path)
    assert [str(s.dtype) for s in (*session.inputs, *session.outputs)] == ["float16"] * 3
    file, _ = _file(tmp_path)
    assert {t.type for t in file.subgraphs[0].tensors if tuple(t.shape) == (32, 3, 3, 16)} == {
        TensorType.FLOAT16,
        TensorType.FLOAT32,
    }
    assert (tmp_path / "model.tflite").stat().st_size < 1.5 * weight.nbytes
    feeds = random_feeds(model, seed=1)
    expected = ReferenceSession(whole).run({"x": feeds["x"].astype(np.float32)})
    for key, value in session.run(feeds).items():
        # One rounding to 11 bits, at the end.
        np.testing.assert_allclose(value, expected[key], rtol=2**-11, atol=2**-24, err_msg=key)


def test_lists_of_sizes_become_signatures_that_share_the_weights(tmp_path):
    one = _opened(_text(), tmp_path / "one", shapes={"T": 6})
    session = _opened(_text(), tmp_path / "both", shapes={"T": [6, 9], "N": 2})
    file, _ = _file(tmp_path / "both")
    assert [s.signatureKey for s in file.signatureDefs] == [b"serving_default", b"sizes_1"]
    sizes = [(tmp_path / d / "model.tflite").stat().st_size for d in ("one", "both")]
    stored = sum(len(b.data) for b in file.buffers if b.data is not None)
    assert stored < 1.5 * (20 * 8 + 8 * 8 + 16) * 4 and sizes[1] < 2 * sizes[0]
    assert [str(s) for s in session.inputs[0].shape] == ["2", "None"]
    reference = ReferenceSession(_text())
    for length in (9, 6, 9):
        feeds = _words(2, length, seed=length)
        np.testing.assert_allclose(session.run(feeds)["y"], reference.run(feeds)["y"], rtol=1e-5, atol=1e-5)
    assert session.takes(_words(2, 6)) and not session.takes(_words(2, 7)) and not one.takes(_words(2, 6))
    with pytest.raises(
        DataError,
        match=r"ids \[2, 7\], mask \[2, 7\]: the file was made for ids \[2, 6\], mask \[2, 6\]; ids \[2, 9\]",
    ):
        session.run(_words(2, 7))


def test_what_stands_for_an_operator_at_its_sizes_is_written_once_they_are_known(tmp_path):
    graph = """(float[N, 2, H, W] x, float[N, 3, 4, 2] g) => (float[N, 2, 3, 4] y) {
      y = GridSample<mode = "linear", padding_mode = "border">(x, g) }"""
    model = parse(HEAD + graph)
    session = _opened(model, tmp_path, shapes={"N": [1, 2], "H": [5, 8], "W": [6, 7]})
    reference, random = ReferenceSession(model, optimize=False), np.random.default_rng(0)
    for n, h, w in ((1, 5, 6), (2, 8, 7)):
        feeds = {
            "x": random.normal(size=(n, 2, h, w)).astype(np.float32),
            "g": random.uniform(-1.2, 1.2, (n, 3, 4, 2)).astype(np.float32),
        }
        np.testing.assert_allclose(session.run(feeds)["y"], reference.run(feeds)["y"], rtol=1e-5, atol=1e-5)


def test_sizes_that_follow_from_computed_sizes_are_constants_of_the_file(tmp_path):
    graph = """(float[N, 9] x) => (float[M, 9] y) <int64 zero = {0}, int64[1] none = {0}, int64 two = {2}, float one = {1}> {
      s = Shape(x) n = Gather(s, zero) h = Div(n, two) e = Unsqueeze(h, none)
      part = Slice(x, none, e, none) sizes = Shape(part) ones = Expand(one, sizes) y = Add(part, ones) }"""
    model = parse(HEAD + graph)
    session = _opened(model, tmp_path, shapes={"N": [4, 7]})
    for n in (4, 7):
        x = np.random.default_rng(n).normal(size=(n, 9)).astype(np.float32)
        np.testing.assert_array_equal(session.run({"x": x})["y"], x[: n // 2] + 1)


def test_the_sizes_of_the_data_are_those_of_the_file(tmp_path):
    from optkit.backends.litert.lower import LiteRt, LiteRtOptions

    options = LiteRt().fit(LiteRtOptions(), {"ids": (1, 6), "mask": (1, 6)})
    assert LiteRt().fit(options, {"ids": (1, 9), "mask": (1, 9)}) == options
    session = _opened(_text(), tmp_path, **options.model_dump())
    assert session.takes(_words())


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "every axis needs a size, and T may have any"),
        ({"S": 3}, r"options.shapes.S: no free axis has this name"),
        ({"T": [3, 4], "N": [1, 2, 3]}, r"lists of sizes must be as long as one another \(T: 2, N: 3\)"),
    ],
)
def test_sizes_that_are_missing_or_unknown_are_named(tmp_path, shapes, said):
    with pytest.raises(UsageError, match=said):
        _lowered(_text(), tmp_path, shapes=shapes)


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"ids": np.zeros((1, 6), np.int64)}, "the inputs are ids, mask; given: ids"),
        (
            {"ids": np.zeros((1, 6), np.int32), "mask": np.zeros((1, 6), np.int64)},
            "input 'ids' is int32, the model takes int64",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path, feeds, said):
    session = _opened(_text(), tmp_path, shapes={"T": 6})
    with pytest.raises(DataError, match=said):
        session.run(feeds)


def test_float64_between_inputs_and_outputs_is_said_to_be_computed_in_float32(tmp_path):
    graph = "(float[1, 4] x) => (float[1, 4] y) { d = Cast<to = 11>(x) s = Sin(d) y = Cast<to = 1>(s) }"
    _, report = optkit.compile(parse(HEAD + graph), target="android-cpu", out=tmp_path / "out")
    assert "what it computes in float64 is computed in float32" in report.manifest.notes


LSTM = """(float[%s, 1, 1] x%s) => (float[] y) <float[1, 16, 1] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    float[1, 16, 4] r = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, int32[1] n = {3},
    float[1, 12] p = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}> { [name] y = LSTM<hidden_size = 4%s>(%s) }"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("(float[3, 3] x) => (float y) { [name] y = Det(x) }", r"name \(Det\): optkit has no translation of Det"),
        (
            """(float[3] x, bool c) => (float[3] y) { [name] y = If(c) <then_branch = t () => (float[3] a) { a = Neg(x) },
            else_branch = e () => (float[3] b) { b = Abs(x) }> }""",
            r"name \(If\): LiteRT gets If written out alone; which branch it takes depends on data",
        ),
        ("(double[3, 4] x) => (double[3, 4] y) { [name] y = Neg(x) }", r"name \(Neg\): 'x' is of type double"),
        ("(float[1, 2, 4, 4, 4] x) => (float[] y) <float[2, 1, 1, 1, 1] w = {1, 2}> { [name] y = ConvTranspose(x, w) }", "one or two axes"),
        ("(int64[4] x) => (int64[4] y) <int64 two = {2}> { [name] y = Mod<fmod = 1>(x, two) }", "the sign of the divisor alone"),
        ("(float[4] x, int64[1] k) => (float[k] y, int64[k] i) { [name] y, i = TopK(x, k) }", "how many are kept must be constant"),
        ("(float[2, 4] x, int64[2, 1] i) => (float[2] y) { [name] y = GatherND<batch_dims = 1>(x, i) }", "each sample of a batch"),
        ("(float[4] x, int64[2] i, float[2] u) => (float[4] y) { [name] y = ScatterElements<reduction = \"mul\">(x, i, u) }", "not their mul"),
        ("(int64[4] x, int64 d) => (int64[4, d] y) <int64[2] v = {0, 1}> { [name] y = OneHot(x, d, v) }", "depth and values must be constant"),
        ("(float[4, 4] x, int64 k) => (float[4, 4] y) { [name] y = Trilu(x, k) }", "which diagonal must be constant"),
        ("(float[4, 4] x, float v) => (float[4, 6] y) <int64[4] p = {0, 1, 0, 1}> { [name] y = Pad(x, p, v) }", "the value of pads must be constant"),
        ("(float[1, 2, 5, 5] x, float[2, 2, 3, 3] w) => (float[] y) { [name] y = Conv(x, w) }", "weights of a convolution to be constant"),
        (
            """(float[1, 2, 4, 4] x) => (float[] y) <float[4] f = {1, 1, 2, 2}, float[8] r = {0, 0, 0, 0, 1, 1, 1, 1}> {
            [name] y = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(x, r, f) }""",
            "coordinate_transformation_mode tf_crop_and_resize",
        ),
        ("(uint8[1, 1, 4, 4] x) => (uint8[] y) <float[4] f = {1, 1, 2, 2}> { [name] y = Resize<mode = \"linear\">(x, , f) }", "weighs floats alone"),
        ("(int64[4] x, int64[4] k) => (int64[4] y) { [name] y = Pow(x, k) }", r"name \(Pow\): LiteRT raises integers to constant powers"),
        ("(int64[4] x) => (int64[4] y) <int64 k = {3}> { [name] y = Pow(x, k) }", r"name \(Pow\): LiteRT's POW takes float32, int32, not int64"),
        (
            "(float[4] x) => (float[4] y) <float r = {0.5}, bool t = {1}> { [name] y = Dropout(x, r, t) }",
            r"name \(Dropout\): .* training_mode must be false",
        ),
        ("(float[1, 2, 4, 4] x) => (float[] y, int64[] i) { [name] y, i = MaxPool<kernel_shape = [2, 2]>(x) }", "no indices of a pool"),
        ("(float[1, 2, 9, 9] x) => (float[] y) { [name] y = AveragePool<kernel_shape = [2, 2], dilations = [2, 2]>(x) }", "pools with gaps"),
        ("(int64[4] x) => (int64[4] y) <int64 two = {2}> { [name] y = Div(x, two) }", "divides floats and integers of up to 32 bits"),
        (
            "(float[1, 2, 4, 4] x, float[1, 3, 3, 2] g) => (float[] y) { [name] y = GridSample<mode = \"cubic\">(x, g) }",
            "no translation of GridSample",
        ),
        ("(float[4, 3] x) => (int64[2, M] y) { [name] y = NonZero(x) }", "NonZero"),
        (LSTM % ("5", "", "", "x, w, r, , n"), "sequences of different lengths"),
        (LSTM % ("5", "", "", "x, w, r, , , , , p"), "peepholes"),
        (LSTM % ("5", "", ", clip = 1.0", "x, w, r"), "clip, input_forget or layout"),
        (LSTM % ("5", "", ", activations = [\"Affine\", \"Tanh\", \"Tanh\"]", "x, w, r"), "activations other than .*: Affine"),
        (LSTM % ("5", ", float[1, 16, 4] u", "", "x, w, u"), "weights that are computed"),
        (LSTM % ("1025", "", "", "x, w, r"), "1025 steps"),
    ],
)  # fmt: skip
def test_what_litert_cannot_express_is_named(tmp_path, body, said):
    with pytest.raises(UnsupportedOpError, match=said):
        _lowered(parse(HEAD + body), tmp_path)


def test_products_of_floats_are_refused_for_hardware_that_has_none_and_integers_are_not(tmp_path):
    from optkit.backends.litert.lower import LiteRt

    coral, backend = target("edge-tpu"), LiteRt()
    with pytest.raises(
        UnsupportedOpError,
        match="a product of floats: the Edge TPU computes in 8-bit",
    ):
        backend.lower(_mobile(), coral, backend.options(), tmp_path)
    backend.lower(_quantized(_mobile()), coral, backend.options(), tmp_path)
    assert (tmp_path / "model.tflite").is_file()


def test_a_shape_that_depends_on_data_is_named(tmp_path):
    body = "(float[3, 4] x, int64[2] to) => (float[2, 6] y) { a = Reshape(x, to) [name] y = Neg(a) }"
    with pytest.raises(ModelError, match=r"the shape of 'a' depends on data"):
        _lowered(parse(HEAD + body), tmp_path)


def test_an_empty_constant_is_named_with_the_node_that_reads_it_or_as_an_output(tmp_path):
    none, body = (
        np.zeros((0, 3), np.float32),
        "(float[2, 3] x) => (float[2, 3] y) { [name] y = Concat<axis = 0>(x, w) }",
    )
    with pytest.raises(UnsupportedOpError, match=r"name \(Concat\): 'w' is constant and empty"):
        _lowered(parse(HEAD + body, w=none), tmp_path)
    body = "(float[2, 3] x) => (float[2, 3] y, int64[0] z) { y = Neg(x) z = Shape<start = 1, end = 1>(x) }"
    model = parse(HEAD + body)
    run_passes(model, Recipe.load("cleanup").passes, Context(target=PHONE))
    with pytest.raises(ModelError, match="an output of the model: 'z' is constant and empty"):
        _lowered(model, tmp_path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    backend, options = _lowered(_mobile(), tmp_path)
    path = tmp_path / "model.tflite"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model.tflite: LiteRT cannot load it"):
        backend.load(tmp_path, PHONE, options)


def test_outputs_that_are_inputs_or_constants_are_copied(tmp_path):
    body = "(float[2, 3] x) => (float[2, 3] y, float[3] z) { y = Identity(x) z = Identity(w) }"
    model = parse(HEAD + body, w=np.arange(3, dtype=np.float32))
    feeds = random_feeds(model)
    found = _opened(model, tmp_path).run(feeds)
    np.testing.assert_array_equal(found["y"], feeds["x"])
    np.testing.assert_array_equal(found["z"], np.arange(3))


def test_opening_and_running_prints_nothing(tmp_path, capfd):
    session = _opened(_mobile(), tmp_path)
    session.run(random_feeds(_mobile(), size=1))
    assert capfd.readouterr() == ("", "")


def test_the_report_says_what_is_in_integers_and_what_is_left_to_do(tmp_path):
    artifact, report = optkit.compile(
        _mobile(),
        target="android-cpu",
        recipe="litert-int8",
        data=[random_feeds(_mobile(), size=1, seed=i) for i in range(4)],
        overrides=["limits.min_cosine=0.9"],
        out=tmp_path / "out",
    )
    achieved = report.manifest.achieved
    assert achieved.formats["int8"] == 1
    manifest = report.manifest
    assert manifest.evidence.executed_cpu and not manifest.evidence.ran_on_device
    assert any("benchmark_model" in step for step in manifest.deferred)
    again, _ = optkit.compile(
        _mobile(),
        target="android-cpu",
        recipe="litert-int8",
        data=[random_feeds(_mobile(), size=1, seed=i) for i in range(4)],
        overrides=["limits.min_cosine=0.9"],
        out=tmp_path / "again",
    )
    assert (artifact.folder / "model.tflite").read_bytes() == (again.folder / "model.tflite").read_bytes()


def test_half_precision_halves_the_weights_and_the_report_says_so(tmp_path):
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(64, 64)).astype(np.float32),
        "b": random.normal(size=64).astype(np.float32),
    }
    model = parse(HEAD + "(float[1, 64] x) => (float[1, 64] y) { h = MatMul(x, w) y = Add(h, b) }", **weights)
    _, report = optkit.compile(
        model, target="android-cpu", precision="fp16", data=[random_feeds(model)], out=tmp_path / "out"
    )
    found = report.manifest.achieved.weights
    assert found["float16"] == 2 * 64 * 64 and found["float"] == 4 * 64


def test_the_command_line_compiles_and_runs_it(tmp_path, capsys):
    save(_mobile(), tmp_path / "model.onnx")
    assert (
        main(
            [
                "compile",
                str(tmp_path / "model.onnx"),
                "-t",
                "raspberry-pi5",
                "-r",
                "litert-fp32",
                "-o",
                str(tmp_path / "out"),
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["manifest"]["backend"] == "litert"
    session = optkit.load(tmp_path / "out")
    feeds = random_feeds(_mobile(), size=1)
    expected = ReferenceSession(_mobile()).run(feeds)["y"]
    np.testing.assert_allclose(session.run(feeds)["y"], expected, rtol=1e-5, atol=1e-5)


MISSING = """
import json, sys
class Missing:
    def find_spec(self, name, *_):
        if name == "ai_edge_litert":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
from optkit.backends import BACKENDS
from optkit.errors import BackendUnavailableError
try:
    BACKENDS["litert"]
except BackendUnavailableError as error:
    print(json.dumps([str(error), error.hint, error.exit_code]))
"""


def test_without_the_package_it_is_refused_with_what_to_install():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=False)
    said = [
        "backend 'litert' needs the package 'ai_edge_litert', which is not installed",
        "pip install 'optkit[litert]'",
        4,
    ]
    assert json.loads(done.stdout) == said, done.stderr
