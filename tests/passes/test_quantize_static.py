from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime import OnnxRuntime
from optkit.backends.onnxruntime.lower import OnnxRuntimeOptions
from optkit.backends.onnxruntime.placement import PLACEMENTS
from optkit.data import CalibrationData
from optkit.errors import BackendUnavailableError, DataError, PassError, UnknownNameError
from optkit.graph import text, verify, walk
from optkit.passes.base import Context
from optkit.passes.quantization import calibrate
from optkit.passes.quantization.static import QuantizeStatic
from optkit.placement import Placement, Row, rows
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LARGEST = float(np.finfo(np.float32).max)


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


def _batches(model: ir.Model, n: int = 4) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [
        {
            str(v.name): random.normal(size=v.shape.numpy()).astype(np.float32)
            if v.dtype == ir.DataType.FLOAT
            else np.ones(v.shape.numpy(), v.dtype.numpy())
            for v in model.graph.inputs
        }
        for _ in range(n)
    ]


def _context(batches, placements=PLACEMENTS, **more) -> Context:
    return Context(target=target("x86-vnni"), data=CalibrationData(batches), placements=placements, **more)


def _interface(model: ir.Model) -> list[tuple[object, ...]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def _quantized(model: ir.Model, batches=None, *, context: Context | None = None, **options) -> ir.Model:
    """The model after the pass, with what holds for every pass checked."""
    context = context or _context(batches or _batches(model))
    after = model.clone()
    changes = QuantizeStatic(**options).run(after, context)
    verify(after)
    assert _interface(after) == _interface(model)
    assert bool(changes) == (text(after) != text(model))
    once = text(after)
    assert QuantizeStatic(**options).run(after, _context(batches or _batches(model))) == []
    assert text(after) == once
    return after


def _ops(model: ir.Model) -> list[str]:
    short = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
    return [
        short.get(node.op_type, node.op_type)
        for node in walk(model)
        if node.op_type != "DequantizeLinear" or not node.inputs[0].is_initializer()
    ]


def _executed(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The kernels that ONNX Runtime ran on the written file, without copies; and its outputs."""
    backend, options = OnnxRuntime(), OnnxRuntimeOptions()
    with tempfile.TemporaryDirectory() as folder:
        backend.lower(model, target("x86-vnni"), options, Path(folder))
        ran = backend.executed(Path(folder), target("x86-vnni"), options, feeds)
        with backend.predict(Path(folder), target("x86-vnni"), options, threads=1) as session:
            return [e.op for e in ran if e.op != "Transpose"], session.run(feeds)


def _observed(model: ir.Model, batches, name: str) -> np.ndarray:
    """All that a value was on the batches."""
    session = ReferenceSession(model, outputs=[name])
    return np.concatenate([session.run(b)[name].ravel() for b in batches])


def _scales(model: ir.Model) -> dict[str, tuple[float, int]]:
    """Scale and zero point of each activation by the name of what is quantized."""
    return {
        str(node.inputs[0].name): tuple(v.const_value.numpy().item() for v in node.inputs[1:])
        for node in model.graph
        if node.op_type == "QuantizeLinear"
    }


# An independent reference: the graph with its pairs in float64 NumPy.


def _windows(x, kernel, strides, pads, fill):
    h, w = kernel
    x = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])), constant_values=fill)
    rows, columns = (x.shape[2] - h) // strides[0] + 1, (x.shape[3] - w) // strides[1] + 1
    return np.stack(
        [
            x[:, :, i : i + rows * strides[0] : strides[0], j : j + columns * strides[1] : strides[1]]
            for i in range(h)
            for j in range(w)
        ],
        axis=-1,
    )


def _conv(x, w, b, group, strides, pads):
    parts = []
    for xs, ws in zip(np.split(x, group, 1), np.split(w, group, 0), strict=True):
        windows = _windows(xs, w.shape[2:], strides, pads, 0.0)
        parts.append(np.einsum("nchwk,ock->nohw", windows, ws.reshape(*ws.shape[:2], -1)))
    return np.concatenate(parts, 1) + (0 if b is None else b.reshape(1, -1, 1, 1))


def _channels(vector, axis, rank):
    return vector if vector.ndim == 0 else vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def _numpy(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = {v: feeds[v.name].astype(np.float64) for v in model.graph.inputs}
    values |= {v: np.asarray(v.const_value.numpy(), np.float64) for v in model.graph.initializers.values()}
    for node in model.graph:
        x = [None if v is None else values[v] for v in node.inputs]
        a = {name: attribute.value for name, attribute in node.attributes.items()}
        strides, pads = a.get("strides", (1, 1)), a.get("pads", (0, 0, 0, 0))
        match node.op_type:
            case "QuantizeLinear":
                info = np.iinfo(node.outputs[0].dtype.numpy())
                y = np.clip(np.round(x[0] / x[1]) + x[2], info.min, info.max)
            case "DequantizeLinear":
                scale, zero = (_channels(v, a.get("axis", 1), x[0].ndim) for v in x[1:])
                y = (x[0] - zero) * scale
            case "Conv":
                y = _conv(x[0], x[1], x[2] if len(x) > 2 else None, a.get("group", 1), strides, pads)
            case "Gemm":
                y = x[0] @ (x[1].T if a.get("transB") else x[1]) + (x[2] if len(x) > 2 else 0)
            case "MatMul":
                y = x[0] @ x[1]
            case "Add":
                y = x[0] + x[1]
            case "Mul":
                y = x[0] * x[1]
            case "Relu":
                y = np.maximum(x[0], 0)
            case "Clip":
                y = np.clip(x[0], x[1], x[2])
            case "LeakyRelu":
                y = np.where(x[0] < 0, x[0] * a.get("alpha", 0.01), x[0])
            case "HardSwish":
                y = x[0] * np.clip(x[0] / 6 + 0.5, 0, 1)
            case "Concat":
                y = np.concatenate(x, a["axis"])
            case "MaxPool":
                y = _windows(x[0], a["kernel_shape"], strides, pads, -np.inf).max(-1)
            case "AveragePool":
                y = _windows(x[0], a["kernel_shape"], strides, pads, 0.0).mean(-1)
            case "GlobalAveragePool":
                y = x[0].mean((2, 3), keepdims=True)
            case "Flatten":
                y = x[0].reshape(x[0].shape[0], -1)
            case "Resize":
                y = x[0].repeat(2, 2).repeat(2, 3)
            case "Transpose":
                y = x[0].transpose(a["perm"])
            case "Sigmoid":
                y = 1 / (1 + np.exp(-x[0]))
            case "Split":
                y = np.split(x[0], np.cumsum(x[1])[:-1].astype(int), a["axis"])
            case other:
                raise NotImplementedError(other)
        values |= dict(zip(node.outputs, y if len(node.outputs) > 1 else [y], strict=True))
    return {v.name: values[v] for v in model.graph.outputs}


CHAIN = """
g (float[1, 4, 8, 8] x, float[8, 4, 3, 3] w, float[8] b, float[6, 8, 1, 1] v, float[6] c) => (float[1, 6, 8, 8] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  r = Relu(a)
  d = Conv(r, v, c)
  y = Relu(d)
}
"""
RESIDUAL = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[8, 8, 3, 3] v) => (float[1, 8, 8, 8] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  r = Relu(a)
  d = Conv<pads = [1, 1, 1, 1]>(r, v)
  s = Add(d, r)
  t = Relu(s)
  y = Conv<pads = [1, 1, 1, 1]>(t, w, b)
}
"""
# The second sum reads what is behind the first one's activation, which is its own value only if the first sum is taken.
RESIDUALS = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[8, 8, 3, 3] v) => (float[1, 8, 8, 8] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  r = Relu(a)
  d = Conv<pads = [1, 1, 1, 1]>(r, v)
  s = Add(d, r)
  t = Relu(s)
  e = Conv<pads = [1, 1, 1, 1]>(t, v)
  u = Add(e, t)
  o = Relu(u)
  y = Conv<pads = [1, 1, 1, 1]>(o, w, b)
}
"""
DEPTHWISE = """
g (float[1, 8, 8, 8] x, float[8, 1, 3, 3] w, float[8] b, float[4, 8, 1, 1] v, float low, float high)
  => (float[1, 4, 8, 8] y) {
  a = Conv<pads = [1, 1, 1, 1], group = 8>(x, w, b)
  r = Clip(a, low, high)
  y = Conv(r, v)
}
"""
POOLS = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[8, 16, 3, 3] v) => (float[1, 8, 2, 2] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  r = Relu(a)
  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
  q = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(r)
  t = Concat<axis = 1>(p, q)
  y = Conv(t, v)
}
"""
HEAD_OF_A_CNN = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[10, 8] v, float[10] c) => (float[1, 10] y) {
  a = Conv(x, w, b)
  r = Relu(a)
  p = GlobalAveragePool(r)
  f = Flatten(p)
  y = Gemm<transB = 1>(f, v, c)
}
"""
GEMM = "g (float[4, 16] x, float[16, 10] v, float[10] c) => (float[4, 10] y) { y = Gemm(x, v, c) }"
MATMUL = "g (float[2, 4, 16] x, float[16, 10] v) => (float[2, 4, 10] y) { y = MatMul(x, v) }"
HARD_SWISH = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[4, 8, 1, 1] v) => (float[1, 4, 6, 6] y) {
  a = Conv(x, w, b)
  h = HardSwish(a)
  y = Conv(h, v)
}
"""
NEAREST = """
g (float[1, 4, 4, 4] x, float[8, 4, 1, 1] w, float[4, 8, 3, 3] v, float[4] scales) => (float[1, 4, 6, 6] y) {
  a = Conv(x, w)
  u = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(a, , scales)
  y = Conv(u, v)
}
"""
PRODUCT = """
g (float[1, 8, 8, 8] x, float[8, 8, 1, 1] w, float[8] b, float[8, 8, 1, 1] v) => (float[1, 8, 8, 8] y) {
  a = Conv(x, w, b)
  d = Conv(x, v)
  m = Mul(a, d)
  l = LeakyRelu(m)
  y = Conv(l, w, b)
}
"""
SPLIT = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[4, 4, 3, 3] v, float[8, 12, 1, 1] u, int64[2] sizes)
  => (float[1, 8, 6, 6] y) {
  a = Conv(x, w, b)
  p, q = Split<axis = 1>(a, sizes)
  d = Conv<pads = [1, 1, 1, 1]>(q, v)
  t = Concat<axis = 1>(p, q, d)
  y = Conv(t, u)
}
"""
SWISH = """
g (float[1, 8, 8, 8] x, float[8, 8, 3, 3] w, float[8] b, float[4, 8, 1, 1] v) => (float[1, 4, 6, 6] y) {
  a = Conv(x, w, b)
  e = Sigmoid(a)
  h = Mul(a, e)
  y = Conv(h, v)
}
"""
CASES = {
    "split": (
        SPLIT,
        {"sizes": [4, 4]},
        ["QLinearConv", "Split", "QLinearConv", "QLinearConcat", "QLinearConv"],
        3,
    ),
    "chain": (CHAIN, {}, ["QLinearConv"] * 2, 2),
    "residual": (RESIDUAL, {}, ["QLinearConv", "QLinearConv", "QLinearAdd", "QLinearConv"], 4),
    "residuals": (
        RESIDUALS,
        {},
        ["QLinearConv", "QLinearConv", "QLinearAdd", "QLinearConv", "QLinearAdd", "QLinearConv"],
        8,
    ),
    "depthwise": (DEPTHWISE, {"low": 0, "high": 1.1}, ["QLinearConv"] * 2, 2),
    "pools": (
        POOLS,
        {},
        ["QLinearConv", "NhwcMaxPool", "QLinearAveragePool", "QLinearConcat", "QLinearConv"],
        3,
    ),
    "head": (HEAD_OF_A_CNN, {}, ["QLinearConv", "QLinearGlobalAveragePool", "Flatten", "QGemm"], 0),
    "gemm": (GEMM, {}, ["QGemm"], 0),
    "gemm, bias for all": (GEMM.replace("[10] c", "[1] c"), {}, ["QGemm"], 0),
    "matmul": (MATMUL, {}, ["MatMulIntegerToFloat"], 0),
    "nearest": (NEAREST, {"scales": [1, 1, 2, 2]}, ["QLinearConv", "Resize", "QLinearConv"], 2),
    "product": (
        PRODUCT,
        {},
        ["QLinearConv", "QLinearConv", "QLinearMul", "QLinearLeakyRelu", "QLinearConv"],
        3,
    ),
}


@pytest.mark.parametrize(("source", "weights", "kernels", "steps"), CASES.values(), ids=CASES)
def test_integer_kernels_run_and_give_what_the_pairs_say(source, weights, kernels, steps):
    model = _model(source, **weights)
    batches = _batches(model)
    after = _quantized(model, batches)
    ran, found = _executed(after, batches[0])
    assert sorted(op for op in ran if op not in ("QuantizeLinear", "DequantizeLinear")) == sorted(kernels)
    expected = _numpy(after, batches[0])["y"]
    # An integer kernel rounds where the pairs do, but a sum that float32 rounds the other way moves one value by a
    # step, and each integer kernel behind it may again. Kernels that give float only add float32 rounding.
    scales = _scales(after)
    behind = scales.get("y/float")
    allowed = (
        steps * behind[0]
        if behind
        else 1e-5 * np.abs(expected).max() + max(s for s, _ in scales.values()) * (len(scales) > 1)
    )
    assert np.abs(found["y"] - expected).max() <= allowed * (1 + 1e-6)
    # Most values are not near a tie.
    if behind:
        assert np.mean(np.abs(found["y"] - expected) < behind[0] / 2) > 0.9


@pytest.mark.parametrize(("source", "weights", "kernels", "steps"), CASES.values(), ids=CASES)
def test_eight_bits_stay_close_to_float(source, weights, kernels, steps):
    model = _model(source, **weights)
    batches = _batches(model)
    after = _quantized(model, batches)
    for feeds in batches:
        expected, found = _numpy(model, feeds)["y"], ReferenceSession(after).run(feeds)["y"]
        signal, noise = np.sum(expected**2), np.sum((expected - found) ** 2)
        # 8 bits over a normal distribution cut at its extremes: some 40 dB a tensor, less what a few layers add.
        assert 10 * np.log10(signal / noise) > 27


def test_pairs_go_behind_the_activation_that_the_kernel_absorbs():
    after = _quantized(_model(CHAIN))
    assert _ops(after) == ["Q", "DQ", "Conv", "Relu", "Q", "DQ", "Conv", "Relu", "Q", "DQ"]


def test_scales_come_from_the_extremes_of_the_data():
    model = _model(CHAIN)
    batches = _batches(model)
    scales = _scales(_quantized(model, batches))
    x = np.concatenate([b["x"] for b in batches]).astype(np.float64)
    y = np.concatenate([_numpy(model, b)["y"] for b in batches])
    assert list(scales) == ["x", "r", "y/float"]
    step = (x.max() - x.min()) / 255
    assert scales["x"] == (pytest.approx(step, rel=1e-6), round(-x.min() / step))
    # A Relu's range starts at 0. ONNX Runtime computed it in float32.
    assert scales["y/float"] == (pytest.approx(y.max() / 255, rel=1e-5), 0)


def test_weights_have_a_scale_for_each_output_channel_and_biases_that_of_the_products():
    model = _model(CHAIN)
    after = _quantized(model)
    w, b = (model.graph.initializers[n].const_value.numpy().astype(np.float64) for n in "wb")
    stored = {n: v.const_value.numpy() for n, v in after.graph.initializers.items()}
    step = np.abs(w).max((1, 2, 3)) / 127
    assert stored["w/scale"] == pytest.approx(step, rel=1e-6)
    assert stored["w/q"].dtype == np.int8
    assert np.abs(stored["w/q"] * step.reshape(-1, 1, 1, 1) - w).max() <= step.max() / 2 * (1 + 1e-6)
    bias = next(n for n in stored if n.endswith("bias/q"))
    product = step * _scales(after)["x"][0]
    assert stored[bias].dtype == np.int32
    assert np.abs(stored[bias] * product - b).max() <= product.max() / 2 * (1 + 1e-4)


def test_float_weights_that_nothing_reads_any_more_go():
    after = _quantized(_model(CHAIN))
    assert not {"w", "b", "v", "c"} & set(after.graph.initializers)


def test_weights_that_two_nodes_read_are_stored_once():
    after = _quantized(_model(RESIDUAL))
    assert [n for n in after.graph.initializers if n[0] in "wv" and n.endswith("/q")] == ["w/q", "v/q"]


def test_a_residual_add_and_its_activation_share_one_grid():
    model = _model(RESIDUAL)
    after = _quantized(model)
    assert _ops(after).count("Q") == 5  # x, r, d, t, y: nothing between Add and Relu
    assert _scales(after)["t"][1] == 0


def test_a_depthwise_weight_has_as_many_scales_as_channels():
    after = _quantized(_model(DEPTHWISE, low=0, high=1.1))
    assert after.graph.initializers["w/scale"].shape.numpy() == (8,)
    # The clip is reached, and the grid ends there: not one step beyond, where a Clip would have to be computed.
    scale, zero = _scales(after)["r"]
    assert zero == 0
    assert np.float32(1.1) - 1e-5 < np.float32(scale) * np.float32(255) <= np.float32(1.1)


def test_what_max_pooling_gives_lies_on_the_grid_of_what_it_takes():
    scales = _scales(_quantized(_model(POOLS), method="mse"))
    assert scales["p"] == scales["r"]
    assert scales["q"] != scales["r"]


def test_repeated_pixels_lie_on_the_grid_of_the_pixels():
    scales = _scales(_quantized(_model(NEAREST, scales=[1, 1, 2, 2]), method="percentile", percentile=90))
    assert scales["u"] == scales["a"]


def test_interpolated_pixels_get_a_grid_of_their_own():
    model = _model(
        NEAREST.replace("nearest", "linear", 1).replace('nearest_mode = "floor"', "antialias = 0"),
        scales=[1, 1, 2, 2],
    )
    scales = _scales(_quantized(model, method="percentile", percentile=90))
    assert scales["u"] != scales["a"]


def test_a_linear_layer_gets_no_pair_behind_it():
    for source in (GEMM, MATMUL):
        assert _ops(_quantized(_model(source)))[-1] in ("Gemm", "MatMul")


def test_what_a_split_gives_lies_on_the_grid_of_what_it_takes():
    scales = _scales(_quantized(_model(SPLIT, sizes=[4, 4])))
    assert scales["p"] == scales["q"] == scales["a"] != scales["d"]


def test_a_sigmoid_is_computed_on_integers_where_the_placement_says_so():
    model = _model(SWISH)
    batches = _batches(model)
    ran, found = _executed(_quantized(model, batches, placement="all"), batches[0])
    assert {"QLinearSigmoid", "QLinearMul"} <= set(ran)
    expected = _numpy(model, batches[0])["y"]
    assert 10 * np.log10(np.sum(expected**2) / np.sum((expected - found["y"]) ** 2)) > 27
    ran, _ = _executed(_quantized(model, batches), batches[0])
    assert "QLinearSigmoid" not in ran


def test_hard_swish_between_convolutions_stays_whole():
    model = _model(HARD_SWISH)
    after = _quantized(model)
    assert _ops(after) == ["Q", "DQ", "Conv", "Q", "DQ", "HardSwish", "Q", "DQ", "Conv", "Q", "DQ"]
    assert _executed(after, _batches(model)[0])[0].count("QLinearConv") == 2


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse"])
def test_a_grid_before_an_activation_ends_where_that_is_flat(method):
    model = _model(HARD_SWISH)
    batches = [{"x": 8 * b["x"]} for b in _batches(model)]
    a = _observed(model, batches, "a")
    assert a.min() < -10
    scale, zero = _scales(_quantized(model, batches, method=method))["a"]
    assert -3.5 < -zero * scale < -2.5
    assert (255 - zero) * scale > 0.8 * a.max()


def test_a_grid_that_more_than_the_activation_reads_is_whole():
    model = _model(HARD_SWISH)
    a = next(n for n in model.graph if n.op_type == "Conv").outputs[0]
    model.graph.outputs.append(a)
    batches = [{"x": 8 * b["x"]} for b in _batches(model)]
    lowest = _observed(model, batches, "a").min()
    grids = _scales(_quantized(model, batches)).values()
    assert min(-zero * scale for scale, zero in grids) == pytest.approx(lowest, rel=0.02)


def test_a_grid_before_a_swish_ends_where_little_is_left():
    model = _model(SWISH)
    batches = [{"x": 8 * b["x"]} for b in _batches(model)]
    scale, zero = _scales(_quantized(model, batches, method="mse"))["a"]
    assert -zero * scale > _observed(model, batches, "a").min() / 2


@pytest.mark.parametrize(
    ("low", "high", "absorbed"), [(0, 6, True), (0, 0.37, True), (-1, 1, False), (0.5, 2, False)]
)
def test_a_clip_is_absorbed_where_saturation_does_the_same(low, high, absorbed):
    model = _model(DEPTHWISE, low=low, high=high)
    batches = _batches(model)
    after = _quantized(model, batches)
    assert (_ops(after)[:4] == ["Q", "DQ", "Conv", "Clip"]) == absorbed
    ran, _ = _executed(after, batches[0])
    # Either way both convolutions run in integers.
    assert ran.count("QLinearConv") == 2
    assert "FusedConv" not in ran


def test_a_convolution_whose_clip_has_bounds_from_outside_keeps_it():
    source = DEPTHWISE.replace("float low, float high", "float x_low, float x_high").replace(
        "low, high)", "x_low, x_high)"
    )
    model = _model(source)
    batches = [{**b, "x_low": np.float32(-1), "x_high": np.float32(1)} for b in _batches(model)]
    assert _ops(_quantized(model, batches))[:5] == ["Q", "DQ", "Conv", "Q", "DQ"]


def test_the_constant_of_a_mask_never_enters_a_range():
    model = _model(
        """
        g (float[1, 6, 8] x, float[1, 1, 6] x_mask, float[8, 8] q, float[8, 8] k, float[8, 8] v, float[8, 8] o, float one,
           float huge, float scale) => (float[1, 6, 8] y) {
          qx = MatMul(x, q)
          kx = MatMul(x, k)
          vx = MatMul(x, v)
          kt = Transpose<perm = [0, 2, 1]>(kx)
          qk = MatMul(qx, kt)
          scaled = Mul(qk, scale)
          off = Sub(one, x_mask)
          bias = Mul(off, huge)
          masked = Add(scaled, bias)
          p = Softmax(masked)
          c = MatMul(p, vx)
          y = MatMul(c, o)
        }
        """,
        one=1, huge=-LARGEST, scale=0.3,
    )  # fmt: skip
    batches = [{**b, "x_mask": np.float32([[[1, 1, 1, 1, 0, 0]]])} for b in _batches(model)]
    after = _quantized(model, batches)
    assert sorted(_scales(after)) == ["c", "x"]
    assert max(scale for scale, _ in _scales(after).values()) < 0.1
    expected, found = (ReferenceSession(m).run(batches[0])["y"] for m in (model, after))
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_bias_far_larger_than_its_weights_does_not_overflow():
    model = _model(CHAIN)
    w = model.graph.initializers["w"].const_value.numpy().copy()
    w[0], w[1], w[2] = 0, 1e-12, 1e-30
    b = np.zeros(8)
    b[:3] = 50, -3000, 0
    model = _model(CHAIN, w=w, b=b)
    batches = _batches(model)
    after = _quantized(model, batches)
    for name, value in after.graph.initializers.items():
        if name.endswith("bias/q"):
            assert np.abs(value.const_value.numpy().astype(np.int64)).max() <= 2**30 * (1 + 1e-6)
    ran, found = _executed(after, batches[0])
    assert "FusedConv" not in ran
    expected = _numpy(model, batches[0])["y"]
    assert 10 * np.log10(np.sum(expected**2) / np.sum((expected - found["y"]) ** 2)) > 27


IF = """
g (float[1, 4, 8, 8] x, bool[1] x_b, float[4, 4, 1, 1] w, float[4, 4, 1, 1] v) => (float[1, 4, 8, 8] y) {
  a = Conv(x, w)
  y = If (x_b) <
    then_branch = yes () => (float[1, 4, 8, 8] t) { t = Conv(a, v) },
    else_branch = no () => (float[1, 4, 8, 8] e) { e = Conv(a, w) }
  >
}
"""


def test_bodies_of_conditionals_stay_in_float_and_read_the_dequantized_value():
    model = _model(IF)
    after = _quantized(model)
    assert _ops(after) == ["Q", "DQ", "Conv", "Q", "DQ", "If", "Conv", "Conv"]
    body = next(g for g in after.graph.subgraphs())
    assert next(iter(body)).inputs[0].producer().op_type == "DequantizeLinear"
    feeds = {**_batches(model)[0], "x_b": np.array([True])}
    expected, found = (ReferenceSession(m).run(feeds)["y"] for m in (model, after))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_outputs_straight_from_a_convolution_keep_their_names_and_order():
    model = _model("""
    g (float[1, 4, 8, 8] x, float[4, 4, 1, 1] w) => (float[1, 4, 8, 8] z, float[1, 4, 8, 8] y, float[1, 4, 8, 8] r) {
      y = Conv(x, w)
      z = Neg(y)
      r = Relu(y)
    }
    """)
    after = _quantized(model)
    assert [v.name for v in after.graph.outputs] == ["z", "y", "r"]
    feeds = _batches(model)[0]
    found = ReferenceSession(after).run(feeds)
    assert np.array_equal(found["z"], -found["y"])
    assert np.array_equal(found["r"], np.maximum(found["y"], 0))
    assert len(np.unique(found["y"])) <= 256


# What is chosen

NAMED = [("targets", "Conv", [0, 1]), ("targets", "a_*", [0]), ("targets", "re:^d_", [1]), ("targets", "re:onv", [0, 1]),
         ("ignore", "d_conv", [0]), ("ignore", "Conv", []), ("ignore", "re:(a|d)_conv", []), ("ignore", "block.1.*", [0]),
         ("targets", "nothing", []), ("ignore", "A_CONV", [0, 1]), ("targets", "=a_conv", [0]), ("ignore", "=Conv", [0, 1])]  # fmt: skip


@pytest.mark.parametrize(("option", "pattern", "expected"), NAMED)
def test_targets_and_ignore_select_by_name_operator_and_module(option, pattern, expected):
    model = _model(CHAIN)
    nodes = [n for n in model.graph if n.op_type == "Conv"]
    for index, (node, name) in enumerate(zip(nodes, ("a_conv", "d_conv"), strict=True)):
        node.name = name
        node.metadata_props["optkit.module"] = f"block.{index}.conv"
    after = _quantized(model, **{option: (pattern,)})
    quantized = [n.inputs[1].producer() is not None for n in after.graph if n.op_type == "Conv"]
    assert [i for i, yes in enumerate(quantized) if yes] == expected


def test_a_second_run_with_fewer_exceptions_quantizes_the_rest():
    model = _model("""
    g (float[1, 4, 8, 8] x, float[4, 4, 1, 1] w, float[4, 4, 1, 1] v) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {
      y = Conv(x, w)
      z = Conv(x, v)
    }
    """)
    first, second = (n for n in model.graph if n.op_type == "Conv")
    first.name, second.name = "first", "second"
    batches = _batches(model)
    once = _quantized(model, batches, ignore=("second",))
    twice = once.clone()
    changes = QuantizeStatic().run(twice, _context(batches))
    verify(twice)
    assert [c.node for c in changes] == ["second"]
    assert _executed(twice, batches[0])[0].count("QLinearConv") == 2


def test_nothing_to_quantize_changes_nothing_and_needs_no_data():
    model = parse(HEAD + "g (float[2] x) => (float[2] y) { y = Exp(x) }")
    context = Context(target=target("x86-vnni"), placements=PLACEMENTS)
    assert QuantizeStatic().run(model, context) == []


@pytest.mark.parametrize(
    "source",
    [
        "g (float[2, 4] x, float[4, 4] x2) => (float[2, 4] y) { y = MatMul(x, x2) }",
        "g (float[2, 4] x, float[4] w) => (float[2] y) { y = MatMul(x, w) }",
        "g (float[4, 2] x, float[4, 3] w) => (float[2, 3] y) { y = Gemm<transA = 1>(x, w) }",
        "g (float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { y = Gemm<alpha = 0.5>(x, w) }",
        "g (float[2, 4] x, float[4, 3] w, float[2, 3] b) => (float[2, 3] y) { y = Gemm(x, w, b) }",
        "g (float[4, 5] x, float[3, 4] a, float[4, 5] w) => (float[3, 5] y, float[4, 5] z) "
        "{ y = MatMul(a, w) z = Neg(x) }",
        "g (double[2, 4] x, double[4, 3] w) => (double[2, 3] y) { y = MatMul(x, w) }",
        "g (float[2, 3, 4] x, float[2, 4, 3] w) => (float[2, 3, 3] y) { y = MatMul(x, w) }",
    ],
    ids=["two inputs", "vector", "transA", "alpha", "matrix bias", "constants", "double", "stack"],
)  # fmt: skip
def test_products_without_an_integer_kernel_stay(source):
    model = _model(source)
    batches = [
        {k: v.astype(model.graph.inputs[0].dtype.numpy()) for k, v in b.items()} for b in _batches(model)
    ]
    if "double" in source:
        batches = [{"x": np.ones((2, 4))}]
    after = _quantized(model, batches)
    assert not {"Q", "DQ"} & set(_ops(after))


# Numbers that are not finite


def test_a_node_around_a_value_that_is_not_finite_stays_in_float(caplog):
    model = _model("""
    g (float[1, 4, 8, 8] x, float[4, 4, 1, 1] w, float[4, 4, 1, 1] v) => (float[1, 4, 8, 8] y) {
      a = Conv(x, w)
      l = Log(a)
      d = Conv(l, v)
      y = Conv(x, v)
      z = Add(d, y)
    }
    """)
    batches = _batches(model)
    with caplog.at_level(logging.WARNING):
        after = _quantized(model, batches)
    assert "l is infinite or NaN on the calibration data" in caplog.text
    weights = [n.inputs[1].producer() for n in after.graph if n.op_type == "Conv"]
    assert [w is not None for w in weights] == [True, False, True]
    assert all(np.isfinite(scale) for scale, _ in _scales(after).values())


def test_an_absorbed_activation_that_is_not_finite_leaves_its_convolution_in_float():
    model = _model(
        """
        g (float[1, 4, 8, 8] x, float[4, 4, 1, 1] w, float[4, 4, 1, 1] v) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] z) {
          a = Conv(x, w)
          y = Relu(a)
          z = Conv(x, v)
        }
        """,
        w=np.full((4, 4, 1, 1), LARGEST),
    )
    after = _quantized(model)
    assert _ops(after) == ["Q", "DQ", "Conv", "Relu", "Conv", "Q", "DQ"]


@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay_in_float(name, bad, caplog):
    shape = {"w": (8, 4, 3, 3), "b": (8,)}[name]
    array = np.zeros(shape, np.float32)
    array.flat[5] = bad
    model = _model(CHAIN, **{name: array})
    with caplog.at_level(logging.WARNING):
        after = _quantized(model)
    assert "weights are infinite or NaN" in caplog.text
    assert set(_ops(after)) == {"Conv", "Relu"}  # what comes behind is not finite either


def test_inputs_that_are_always_zero_get_a_grid():
    model = _model(CHAIN)
    batches = [{"x": np.zeros((1, 4, 8, 8), np.float32)}] * 2
    after = _quantized(model, batches)
    assert _scales(after)["x"] == (1.0, 0)
    expected, found = (ReferenceSession(m).run(batches[0])["y"] for m in (model, after))
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 50


# Data and context


def test_without_data_the_hint_names_calib():
    context = Context(target=target("x86-vnni"), placements=PLACEMENTS)
    with pytest.raises(DataError, match="needs calibration data") as caught:
        QuantizeStatic().run(_model(CHAIN), context)
    assert "--calib" in caught.value.hint


def test_an_unknown_placement_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown placement 'linaer'") as caught:
        QuantizeStatic(placement="linaer").run(_model(CHAIN), _context(_batches(_model(CHAIN))))
    assert caught.value.hint == "did you mean 'linear'?"


@pytest.mark.parametrize("method", ["min-max", "percentile", "mse", "entropy"])
def test_every_method_quantizes(method):
    model = _model(RESIDUAL)
    batches = _batches(model)
    after = _quantized(model, batches, method=method)
    expected, found = (ReferenceSession(m).run(batches[0])["y"] for m in (model, after))
    # Entropy has 2,000 values for its 2,048 bins here, and cuts where few are.
    assert 10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2)) > 15


FP8 = {
    "fp8": Placement(
        name="fp8", activation="e4m3", weight="e4m3", bias=False, rows=rows(Row(op="MatMul", output=False))
    )
}


def test_floats_of_8_bits_are_stored_for_each_channel_and_stay_close():
    model = _model("g (float[8, 16] x, float[16, 4] w) => (float[8, 4] y) { y = MatMul(x, w) }")
    batches = _batches(model)
    after = model.clone()
    QuantizeStatic(placement="fp8").run(after, _context(batches, FP8))
    weight = next(v for v in after.graph.initializers.values() if v.shape == (16, 4))
    assert weight.dtype == ir.DataType.FLOAT8E4M3FN
    assert {n.op_type for n in walk(after)} == {"QuantizeLinear", "DequantizeLinear", "MatMul"}
    exact, found = (ReferenceSession(m).run(batches[0])["y"] for m in (model, after))
    # Each factor is off by at most 2^-4 of itself, errors of 16 terms mostly cancel.
    x, w = np.abs(batches[0]["x"]), np.abs(model.graph.initializers["w"].const_value.numpy())
    assert (np.abs(found - exact) <= 2 * 2.0**-4 * 1.05 * (x @ w)).all()
    assert np.linalg.norm(found - exact) < 0.06 * np.linalg.norm(exact)
    assert not np.array_equal(found, exact)


def test_a_format_that_the_hardware_lacks_is_refused_before_anything_is_observed():
    model = _model("g (float[8, 16] x, float[16, 4] w) => (float[8, 4] y) { y = MatMul(x, w) }")
    for name, allowed in (("a10", False), ("l4", True)):
        context = Context(target=target(name), data=None, placements=FP8)
        with pytest.raises(DataError if allowed else BackendUnavailableError) as error:
            QuantizeStatic(placement="fp8").run(model.clone(), context)
        assert allowed or "fp8 starts with sm_89; a10 is sm_86" in str(error.value)


def test_entropy_has_no_meaning_without_even_steps():
    model = _model("g (float[8, 16] x, float[16, 4] w) => (float[8, 4] y) { y = MatMul(x, w) }")
    with pytest.raises(PassError, match="even steps"):
        QuantizeStatic(placement="fp8", method="entropy").run(model, _context(_batches(model), FP8))


def test_values_are_observed_a_window_at_a_time_with_the_same_result(monkeypatch):
    model = _model(RESIDUAL)
    batches = _batches(model)
    quantizer = QuantizeStatic(method="mse")
    once = model.clone()
    quantizer.run(once, _context(batches))
    asked = []
    run = ReferenceSession.run

    def counted(self, feeds):
        found = run(self, feeds)
        asked.append(sum(v.nbytes for v in found.values()))
        return found

    size = 8 * 8 * 8 * 4
    monkeypatch.setattr(calibrate, "WINDOW", 2 * size)
    monkeypatch.setattr(ReferenceSession, "run", counted)
    after = model.clone()
    quantizer.run(after, _context(batches))
    assert text(after) == text(once)
    assert max(asked) == 2 * size


def test_channel_maxima_give_the_range_of_the_whole_map():
    model = _model(RESIDUAL)
    batches = _batches(model)
    names = [str(n.outputs[0].name) for n in model.graph if n.op_type == "Relu"]
    assert names
    exact = ReferenceSession(model, outputs=names)
    found = calibrate.observe(model, names, "min-max", 99.99, _context(batches))
    for name in names:
        maps = [exact.run(batch)[name] for batch in batches]
        assert (found[name].low, found[name].high) == (0.0, max(m.max() for m in maps))


def test_what_was_observed_on_a_graph_is_not_observed_again():
    model = _model(RESIDUAL)
    batches, reads = _batches(model), []

    def read():
        reads.append(1)
        return iter(batches)

    context = Context(target=target("x86-vnni"), data=CalibrationData(read), placements=PLACEMENTS, memo={})
    first, second, third = model.clone(), model.clone(), model.clone()
    QuantizeStatic(method="mse").run(first, context)
    before = len(reads)
    QuantizeStatic(method="mse").run(second, context)
    QuantizeStatic(method="min-max", ignore=(str(model.graph[0].name),)).run(third, context)
    assert len(reads) == before
    assert text(first) == text(second)
    # The range of a histogram is exact.
    alone = model.clone()
    QuantizeStatic(method="min-max", ignore=(str(model.graph[0].name),)).run(alone, _context(batches))
    assert _scales(third) == _scales(alone)


def test_the_placement_is_data_and_may_name_other_formats():
    placement = Placement(
        name="mine",
        rows=rows(Row(op="MatMul")),
        activation="s8-asym",
        weight="s8",
        per_channel=False,
    )
    model = _model(MATMUL)
    after = model.clone()
    QuantizeStatic(placement="mine").run(after, _context(_batches(model), {"mine": placement}))
    verify(after)
    assert _ops(after) == ["Q", "DQ", "MatMul", "Q", "DQ"]
    kinds = {n.outputs[0].dtype for n in after.graph if n.op_type == "QuantizeLinear"}
    assert kinds == {ir.DataType.INT8}
    assert after.graph.initializers["v/scale"].shape.numpy() == ()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_row_of_every_placement_names_a_known_operator(placement):
    from optkit.ops import OPS

    for op, row in PLACEMENTS[placement].rows.items():
        assert op == row.op
        assert op in OPS
        assert row.role != "compute" or OPS[op].weight is not None
        assert all(OPS[absorbed].activation for absorbed in row.absorbs)


# Graphs as they come


def _random_graph(random: np.random.Generator) -> ir.Model:
    """Up to a dozen operators of a CNN, each on one of the last values made."""
    made, lines, weights = [("x", 4, 8)], [], {}
    for i in range(random.integers(3, 13)):
        value, channels, size = made[random.integers(max(0, len(made) - 4), len(made))]
        op = str(random.choice(["Conv", "Conv", "Depthwise", "Relu", "Clip", "Add", "Mul", "Concat", "MaxPool", "AveragePool",
                                "Resize", "Transpose", "Sigmoid", "HardSwish", "LeakyRelu"]))  # fmt: skip
        out, options, operands = channels, "", [value]
        if op in ("Conv", "Depthwise"):
            out = channels if op == "Depthwise" else int(random.integers(1, 9))
            weights[f"w{i}"] = random.normal(size=(out, 1 if op == "Depthwise" else channels, 3, 3)) * 0.3
            weights[f"b{i}"] = random.normal(size=out) * random.choice([0, 0.1, 10])
            options = f"<pads = [1, 1, 1, 1], group = {channels if op == 'Depthwise' else 1}>"
            op, operands = "Conv", [value, f"w{i}", f"b{i}"]
        elif op == "Clip":
            weights[f"l{i}"], weights[f"h{i}"] = random.choice([0.0, -0.5]), random.choice([6.0, 1.0, 0.3])
            operands = [value, f"l{i}", f"h{i}"]
        elif op in ("Add", "Mul", "Concat"):
            others = [v for v in made if v[2] == size and (op == "Concat" or v[1] == channels)]
            other = others[random.integers(len(others))]
            operands.append(other[0])
            out, options = (channels + other[1], "<axis = 1>") if op == "Concat" else (channels, "")
        elif op in ("MaxPool", "AveragePool") and size > 2:
            size, options = size // 2, "<kernel_shape = [2, 2], strides = [2, 2]>"
        elif op in ("MaxPool", "AveragePool"):
            options = "<kernel_shape = [1, 1]>"
        elif op == "Resize":
            weights[f"s{i}"] = np.array([1, 1, 1, 1]) if size > 8 else np.array([1, 1, 2, 2])
            options, operands = f'<mode = "{random.choice(["nearest", "linear"])}">', [value, "", f"s{i}"]
            size *= 1 if size > 8 else 2
        elif op == "Transpose":
            options = "<perm = [0, 1, 3, 2]>"
        lines.append(f"v{i} = {op}{options}({', '.join(operands)})")
        made.append((f"v{i}", out, size))
    outputs = dict.fromkeys([made[-1], made[random.integers(1, len(made))]])
    declared = "".join(f", float{list(np.shape(w)) or ''} {n}" for n, w in weights.items())
    results = ", ".join(f"float[1, {c}, {s}, {s}] {n}" for n, c, s in outputs)
    return _model(
        f"g (float[1, 4, 8, 8] x{declared}) => ({results}) {{\n" + "\n".join(lines) + "\n}", **weights
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_graph_stays_valid_and_runs_the_same_optimized_or_not(seed):
    model = _random_graph(np.random.default_rng(seed))
    batches = _batches(model, 3)
    after = _quantized(model, batches, method=["min-max", "mse"][seed % 2])
    plain, fused = ReferenceSession(after, optimize=False), ReferenceSession(after)
    for feeds in batches:
        expected, found = plain.run(feeds), fused.run(feeds)
        for name, y in expected.items():
            # A value next to a tie may go to the other neighbour in an integer kernel: few do.
            assert np.sqrt(np.mean((y - found[name]) ** 2)) <= 0.01 * np.sqrt(np.mean(y**2)) + 1e-6


def test_channels_that_saturate_are_those_of_their_own_node_also_without_names():
    model = _model(
        """
        g (float[2, 4, 6, 6] x, float[8, 4, 3, 3] w, float[5, 8, 3, 3] v) => (float[2, 5, 2, 2] y) {
          c = Conv(x, w) r = Relu(c) y = Conv(r, v)
        }
        """,
        w=np.full((8, 4, 3, 3), 0.3),
        v=np.full((5, 8, 3, 3), 0.3),
    )
    batches = [{"x": np.full((2, 4, 6, 6), 1.0, np.float32)}]
    context = Context(target=target("x86-avx2"), data=CalibrationData(batches), placements=PLACEMENTS)
    changes = QuantizeStatic().run(model, context)
    assert [c.detail.rpartition(", ")[2] for c in changes if "Conv" in c.detail] == [
        "8 of 8 channels in 7 bits", "5 of 5 channels in 7 bits",
    ]  # fmt: skip
