"""Operators that a backend lacks are written out in those that it has, and compute what ONNX Runtime does with the node."""

from __future__ import annotations

import contextlib
import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.backends import BACKENDS
from optkit.errors import UnsupportedOpError
from optkit.graph import text, verify, walk
from optkit.legalize import legalize
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds, same_numbers

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng %s'
PHONE, ANDROID = target("iphone15"), target("android-cpu")

# Operators that ONNX defines by a function. Name -> graph, and the backends that refuse it and can express the function.
FUNCTIONS: dict[str, tuple[str, str]] = {
    "CenterCropPad": (
        "(float[4, 7, 3] x) => (float[5, 5, 3] y) <int64[2] size = {5, 5}> { y = CenterCropPad<axes = [0, 1]>(x, size) }",
        "coreml",
    ),
    "CenterCropPad of all axes": (
        "(float[4, 7] x) => (float[5, 5] y) <int64[2] size = {5, 5}> { y = CenterCropPad(x, size) }",
        "coreml litert",
    ),
    "Shrink": ("(float[N, 5] x) => (float[N, 5] y) { y = Shrink<lambd = 0.4, bias = 0.1>(x) }", "coreml litert"),
    "HannWindow": (
        "(float[7] x) => (float[7] y) <int64 size = {7}> { w = HannWindow<periodic = 0>(size) y = Mul(x, w) }",
        "coreml litert",
    ),
    "HammingWindow": (
        "(float[7] x) => (float[7] y) <int64 size = {7}> { w = HammingWindow(size) y = Mul(x, w) }",
        "coreml litert",
    ),
    "BlackmanWindow": (
        "(float[7] x) => (float[7] y) <int64 size = {7}> { w = BlackmanWindow(size) y = Mul(x, w) }",
        "coreml litert",
    ),
    "NegativeLogLikelihoodLoss": (
        """(float[4, 3] x, int64[4] t) => (float y) <float[3] w = {0.5, 1, 2}> {
        y = NegativeLogLikelihoodLoss<reduction = "mean", ignore_index = 1>(x, t, w) }""",
        "coreml",
    ),
    "SoftmaxCrossEntropyLoss": (
        """(float[4, 3] x, int64[4] t) => (float[4] y, float[4, 3] p) {
        y, p = SoftmaxCrossEntropyLoss<reduction = "none">(x, t) }""",
        "coreml",
    ),
    "LayerNormalization": (
        """(float[2, 3, 4] x) => (float[2, 3, 4] y, float[2, 1, 1] m, float[2, 1, 1] i) <float[3, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
        y, m, i = LayerNormalization<axis = 1>(x, w) }""",
        "coreml litert",
    ),
    "LayerNormalization of which one output is read": (
        """(float[2, 3] x) => (float[2, 1] d) <float[3] w = {1, 2, 3}> { y, m, i = LayerNormalization(x, w) d = Neg(i) }""",
        "coreml litert",
    ),
    "Clip to what is computed": (
        "(float[3, 4] x, float z) => (float[3, 4] y) { y = Clip(x, z) }", "litert"
    ),
    "Celu": ("(float[N, 5] x) => (float[N, 5] y) { y = Celu<alpha = 2.0>(x) }", "litert"),
}  # fmt: skip

# Operators that have rules of ours.
RULES: dict[str, tuple[str, str]] = {
    **{
        f"GridSample {mode} {edge} {align}": (
            f"""(float[2, 3, 4, 5] x, float[2, 3, 6, 2] g) => (float[2, 3, 3, 6] y) {{
            y = GridSample<mode = "{mode}", padding_mode = "{edge}", align_corners = {align}>(x, g) }}""",
            "litert",
        )
        for mode in ("linear", "nearest")
        for edge in ("zeros", "border", "reflection")
        for align in (0, 1)
    },
    "Acosh": (
        "(float[N, 5] x) => (float[N, 5] y) <float one = {1}> { a = Abs(x) b = Add(a, one) y = Acosh(b) }",
        "coreml litert",
    ),
    "AffineGrid": (
        "(float[2, 2, 3] x) => (float[2, 3, 4, 2] y) <int64[4] size = {2, 1, 3, 4}> { y = AffineGrid<align_corners = 1>(x, size) }",
        "coreml litert",
    ),
    "AffineGrid of one picture": (
        "(float[1, 2, 3] x) => (float[1, 4, 5, 2] y) <int64[4] size = {1, 3, 4, 5}> { y = AffineGrid(x, size) }",
        "coreml litert",
    ),
    "AffineGrid of volumes": (
        "(float[1, 3, 4] x) => (float[1, 2, 3, 4, 3] y) <int64[5] size = {1, 1, 2, 3, 4}> { y = AffineGrid(x, size) }",
        "coreml litert",
    ),
    "Asinh": ("(float[N, 5] x) => (float[N, 5] y) { y = Asinh(x) }", "litert"),
    "Atanh": ("(float[N, 5] x) => (float[N, 5] y) { s = Sin(x) y = Atanh(s) }", "litert"),
    "LpPool": (
        "(float[1, 2, 7, 6] x) => (float[1, 2, 4, 3] y) { y = LpPool<kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 0]>(x) }",
        "coreml litert",
    ),
    "LpPool of another power": (
        """(float[1, 2, 7, 6] x) => (float[1, 2, 4, 3] y) {
        y = LpPool<kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER", p = 3>(x) }""",
        "coreml litert",
    ),
    "LpPool of magnitudes": (
        """(float[1, 2, 7] x) => (float[1, 2, 4] y) {
        y = LpPool<kernel_shape = [3], strides = [2], auto_pad = "SAME_LOWER", p = 1>(x) }""",
        "coreml litert",
    ),
    "GlobalLpPool": (
        "(float[2, 3, 4, 5] x) => (float[2, 3, 1, 1] y) { y = GlobalLpPool<p = 3>(x) }",
        "coreml litert",
    ),
    "Einsum of three": (
        """(float[2, 3] x, float[3, 4] a, float[4, 5] b) => (float[5, 2] y) { y = Einsum<equation = "ij,jk,kl->li">(x, a, b) }""",
        "coreml litert",
    ),
    "Einsum with an ellipsis": (
        """(float[6, 2, 3, 4] x, float[6, 2, 4, 5] a) => (float[6, 2, 3, 5] y) { y = Einsum<equation = "...ij,...jk->...ik">(x, a) }""",
        "coreml litert",
    ),
    "Einsum that repeats": (
        """(float[6, 1, 3, 4] x, float[1, 2, 4, 5] a) => (float[6, 2, 5, 3] y) { y = Einsum<equation = "...ij,...jk->...ki">(x, a) }""",
        "coreml litert",
    ),
    "Einsum without an arrow": (
        """(float[2, 3] x, float[3, 4] a) => (float[4, 2] y) { y = Einsum<equation = "bj,ja">(x, a) }""",
        "coreml litert",
    ),
    "Einsum that sums up an operand": (
        """(float[2, 3] x, float[4, 5] a) => (float[3, 2] y) { y = Einsum<equation = "ij,kl->ji">(x, a) }""",
        "coreml litert",
    ),
    "Einsum to a number": (
        """(float[2, 3] x, float[2, 3] a, float[3] b) => (float y) { y = Einsum<equation = "ij,ij,j->">(x, a, b) }""",
        "coreml litert",
    ),
    "Einsum by batches": (
        """(float[N, 2, 3] x, float[N, 3, 4] a) => (float[N, 4, 2] y) { y = Einsum<equation = "bij,bjk->bki">(x, a) }""",
        "litert",
    ),
    "Einsum outside": (
        """(float[2, 3] x, float[4] a) => (float[2, 4, 3] y) { y = Einsum<equation = "ij,k->ikj">(x, a) }""",
        "litert",
    ),
    "ArgMax": (
        "(float[3, 4] x) => (int64[3, 1] y) { r = Round(x) y = ArgMax<axis = -1, select_last_index = 1>(r) }",
        "coreml litert",
    ),
    "ArgMin": (
        "(float[3, 4] x) => (int64[4] y) { r = Round(x) y = ArgMin<axis = 0, keepdims = 0, select_last_index = 1>(r) }",
        "coreml litert",
    ),
    "Softplus": ("(float[N, 5] x) => (float[N, 5] y) { y = Softplus(x) }", "litert"),
    "ReduceLogSumExp": (
        """(float[2, 3, 4] x) => (float[2, 1, 4] y, float[3] z) <int64[1] one = {1}, int64[2] two = {0, -1}> {
        y = ReduceLogSumExp(x, one) z = ReduceLogSumExp<keepdims = 0>(x, two) }""",
        "litert",
    ),
    "ReduceLogSumExp of all": ("(float[2, 3] x) => (float y) { y = ReduceLogSumExp<keepdims = 0>(x) }", "litert"),
    "MatMul of vectors": (
        """(float[4] x, float[2, 4, 3] a, float[5, 4] b) => (float[2, 3] y, float[5] z, float d) {
        y = MatMul(x, a) z = MatMul(b, x) d = MatMul(x, x) }""",
        "litert",
    ),
    "Gemm with factors": (
        """(float[4, 2] x, float[3, 4] w, float[3] b, float[2, 1] c) => (float[2, 3] y, float[2, 3] z, float[2, 3] n) {
        y = Gemm<transA = 1, transB = 1, alpha = 0.5, beta = 2.0>(x, w, b) z = Gemm<transA = 1, transB = 1, beta = 0.5>(x, w, c)
        n = Gemm<transA = 1, transB = 1, alpha = 3.0>(x, w) }""",
        "litert",
    ),
    "QLinearMatMul": (
        """(float[3, 2] x) => (float[3, 4] y) <float s = {0.1}, uint8 z = {120}, uint8[2, 4] w = {1, 200, 30, 4, 50, 6, 7, 255},
        float[1] v = {0.02}, uint8[1] u = {100}, float t = {0.05}, uint8 k = {128}> {
        a = QuantizeLinear(x, s, z) b = QLinearMatMul(a, s, z, w, v, u, t, k) y = DequantizeLinear(b, t, k) }""",
        "coreml",
    ),
    "QLinearConv": (
        """(float[1, 1, 4, 4] x) => (float[1, 2, 3, 3] y) <float s = {0.1}, uint8 z = {120},
        int8[2, 1, 2, 2] w = {1, -100, 30, 4, 50, 6, 7, 127}, float[2] v = {0.02, 0.01}, int8[2] u = {0, 0}, float t = {0.05},
        uint8 k = {128}, int32[2] bias = {300, -200}> {
        a = QuantizeLinear(x, s, z) b = QLinearConv(a, s, z, w, v, u, t, k, bias) y = DequantizeLinear(b, t, k) }""",
        "coreml",
    ),
    "MatMulInteger behind DynamicQuantizeLinear": (
        """(float[N, 6] x) => (float[N, 2] y) <uint8[6, 2] w = {1, 2, 3, 40, 50, 255, 0, 99, 7, 128, 200, 31}, uint8[2] wz = {7, 130},
        float[2] ws = {0.01, 0.2}> {
        q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) f = Mul(s, ws) y = Mul(c, f) }""",
        "coreml",
    ),
    "ConvInteger behind DynamicQuantizeLinear": (
        """(float[2, 1, 5, 5] x) => (float[2, 2, 3, 3] y) <uint8[2, 1, 2, 2] w = {1, 2, 3, 40, 50, 255, 0, 99}, uint8 wz = {7},
        float ws = {0.01}> {
        q, s, z = DynamicQuantizeLinear(x)
        i = ConvInteger<kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 0, 0]>(q, w, z, wz)
        c = Cast<to = 1>(i) f = Mul(s, ws) y = Mul(c, f) }""",
        "coreml litert",
    ),
    "MaxPool of volumes": (
        """(float[2, 3, 6, 7, 8] x) => (float[2, 3, 3, 3, 8] y) {
        y = MaxPool<kernel_shape = [2, 3, 2], strides = [2, 2, 1], pads = [0, 0, 1, 0, 0, 0]>(x) }""",
        "litert",
    ),
    "AveragePool of volumes": (
        """(float[2, 3, 6, 7, 8] x) => (float[] y) {
        y = AveragePool<kernel_shape = [3, 3, 2], strides = [2, 2, 1], pads = [1, 0, 1, 1, 2, 0]>(x) }""",
        "litert",
    ),
    "AveragePool of volumes with what pads add, rounded up": (
        """(float[2, 3, 6, 7, 8] x) => (float[] y) {
        y = AveragePool<kernel_shape = [3, 3, 2], strides = [2, 2, 3], pads = [1, 0, 1, 1, 0, 1], count_include_pad = 1, ceil_mode = 1>(x) }""",
        "litert",
    ),
    "Conv of volumes": (
        """(float[2, 2, 5, 6, 7] x) => (float[2, 4, 3, 4, 3] y) <float[4] b = {0.1, -0.2, 0.3, 0.4},
        float[4, 1, 2, 3, 3] w = {"""
        + ", ".join(f"{np.sin(i):.3f}" for i in range(72))
        + """}> {
        y = Conv<strides = [2, 1, 2], pads = [1, 0, 0, 2, 0, 1], dilations = [2, 1, 1], group = 2>(x, w, b) }""",
        "litert",
    ),
    "Sum": ("(float[3, 1] x, float[1, 4] a, float[4] b) => (float[3, 4] y) { y = Sum(x, a, b) }", "litert"),
    "Sum of one": ("(float[3, 4] x) => (float[3, 4] y) { s = Sum(x) y = Neg(s) }", "litert"),
    "Mean": ("(float[3, 1] x, float[1, 4] a, float[4] b) => (float[3, 4] y) { y = Mean(x, a, b) }", "litert"),
    "Erf": ("(float[3, 5] x) => (float[3, 5] y) { y = Erf(x) }", "litert"),
    "LpNormalization": ("(float[3, 4] x) => (float[3, 4] y) { y = LpNormalization<axis = 0>(x) }", "litert"),
    "LpNormalization of magnitudes": (
        "(float[2, 3, 4] x) => (float[2, 3, 4] y) <float none = {0}> { r = Max(x, none) y = LpNormalization<p = 1>(r) }",
        "litert",
    ),
    "LRN": (
        "(float[2, 7, 4, 5] x) => (float[2, 7, 4, 5] y) { y = LRN<size = 5, alpha = 0.3, beta = 0.6, bias = 1.5>(x) }",
        "litert",
    ),
    "STFT": (
        """(float[N, 40, 1] x) => (float[N, frames, 5, 2] y) <int64 step = {3}, float[8] w = {0, 0.1, 0.5, 0.9, 1, 0.9, 0.5, 0.1}> {
        y = STFT(x, step, w) }""",
        "coreml litert",
    ),
    "STFT of both sides": (
        """(float[N, 40] x) => (float[N, frames, 6, 2] y) <int64 step = {5}, int64 length = {6}> {
        y = STFT<onesided = 0>(x, step, "", length) }""",
        "coreml litert",
    ),
}  # fmt: skip
CASES = {**FUNCTIONS, **RULES}


def _written(name: str, backend: str) -> tuple[ir.Model, ir.Model]:
    """A model before and after."""
    model = parse(HEAD % CASES[name][0])
    after = model.clone()
    legalize(after, BACKENDS[backend](), PHONE if backend == "coreml" else ANDROID, name="m")
    verify(after)
    return model, after


def _with(backend: str) -> list[str]:
    return [name for name, (_, backends) in CASES.items() if backend in backends.split()]


@pytest.mark.needs("coremltools")
@pytest.mark.parametrize("name", _with("coreml"))
def test_core_ml_computes_what_onnx_runtime_does(name, tmp_path):
    _compare(name, "coreml", tmp_path)


@pytest.mark.needs("ai_edge_litert")
@pytest.mark.parametrize("name", _with("litert"))
def test_lite_rt_computes_what_onnx_runtime_does(name, tmp_path):
    _compare(name, "litert", tmp_path)


def _compare(name: str, backend: str, folder) -> None:
    model, after = _written(name, backend)
    assert text(after) != text(model)
    feeds = random_feeds(model)
    # The rewritten graph is ONNX like any other.
    same_numbers(model, after, feeds)
    engine, where = BACKENDS[backend](), PHONE if backend == "coreml" else ANDROID
    options = engine.options(shapes={"N": 3}) if "[N" in CASES[name][0] else engine.options()
    engine.lower(after, where, options, folder)
    expected = ReferenceSession(model, optimize=False).run(feeds)
    with engine.load(folder, where, options) as session:
        found = session.run(feeds)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("operator", ["Acosh", "Asinh", "Atanh"])
def test_inverse_hyperbolic_functions_are_exact_near_their_zeros_and_far_out(operator):
    small = np.geomspace(1e-30, 0.5, 400).astype(np.float32)
    x = {
        "Acosh": np.concatenate([1 + small, [2e3, 1e18, 3e38, np.inf]]),
        "Asinh": np.concatenate([small, -small, [0, 1, 1e4, 1.2e4, 1e19, -3e38, np.inf]]),
        "Atanh": np.concatenate([small, -small, [0, 0.51, 1 - 1e-7, -1]]),
    }[operator].astype(np.float32)
    model = parse(HEAD % f"(float[N] x) => (float[N] y) {{ y = {operator}(x) }}")
    legalize(model, _Without(operator), ANDROID, name="m")
    found = ReferenceSession(model, optimize=False).run({"x": x})["y"]
    with np.errstate(divide="ignore"):
        exact = getattr(np, f"arc{operator[1:]}")(x.astype(np.float64))
    # Two logarithms, a root and some quotients, each rounded to half a step of 1.2e-7.
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_the_error_function_is_exact_at_zero_and_far_out():
    small = np.geomspace(1e-30, 0.5, 400).astype(np.float32)
    x = np.concatenate([small, -small, np.linspace(-6, 6, 4001), [0, 3e38, -np.inf, np.inf]]).astype(
        np.float32
    )
    model = parse(HEAD % "(float[N] x) => (float[N] y) { y = Erf(x) }")
    legalize(model, _Without("Erf"), ANDROID, name="m")
    found = ReferenceSession(model, optimize=False).run({"x": x})["y"]
    exact = np.array([math.erf(v) for v in x.astype(np.float64)])
    assert np.abs(found).max() == 1
    # Three steps of float32.
    np.testing.assert_allclose(found, exact, rtol=4e-7)


def test_exponentials_do_not_overflow_where_they_are_written_out():
    """A kernel of LiteRT takes e to no more than the 88.38th power: softplus of 100 came out as that."""
    x = np.array(
        [[-1e4, -100, -1, 0, 20], [88, 89, 100, 1e4, 3e38], [-np.inf] * 5, [0, 1, 2, 3, np.inf]], np.float32
    )
    graph = """(float[N, 5] x) => (float[N, 5] y, float[N, 1] z) <int64[1] last = {-1}> {
      y = Softplus(x) z = ReduceLogSumExp(x, last) }"""
    model = parse(HEAD % graph)
    legalize(model, _Without("Softplus", "ReduceLogSumExp"), ANDROID, name="m")
    assert all(v.dtype != ir.DataType.DOUBLE for n in walk(model) for v in n.outputs)
    found = ReferenceSession(model, optimize=False).run({"x": x})
    exact, total = np.logaddexp(0, x.astype(np.float64)), np.logaddexp.reduce(x.astype(np.float64), axis=1)
    # Half a step of float32 at 1, twice.
    np.testing.assert_allclose(found["y"], exact, rtol=1.2e-7, atol=1.2e-7)
    np.testing.assert_allclose(found["z"][:, 0], total, rtol=2.4e-7)


class _Without(BACKENDS["onnxruntime"]):  # type: ignore[misc]
    """ONNX Runtime, if it lacked some operators."""

    def __init__(self, *missing: str) -> None:
        self.missing = missing

    def unsupported(self, node, target):
        return f"no {node.op_type}" if node.op_type in self.missing else None


def test_what_the_backend_runs_stays_as_it_is():
    model = parse(HEAD % "(float[N] x) => (float[N] y) { g = Gelu(x) y = Celu(g) }")
    before = text(model)
    legalize(model, _Without(), ANDROID, name="m")
    assert text(model) == before


def test_definitions_are_written_out_until_the_backend_runs_all():
    model = parse(HEAD % "(float[4, 3] x, int64[4] t) => (float y) { y = SoftmaxCrossEntropyLoss(x, t) }")
    after = model.clone()
    missing = ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss", "LogSoftmax", "CastLike")
    legalize(after, _Without(*missing), ANDROID, name="m")
    assert not {n.op_type for n in walk(after)} & set(missing)
    same_numbers(model, after, random_feeds(model))


def test_new_nodes_are_named_after_the_node_and_have_its_origin():
    model = parse(HEAD % "(float[N] x) => (float[N] y) { y = Shrink(x) }")
    (node,) = model.graph
    node.name = "gate"
    node.metadata_props.update({"optkit.module": "net.gate", "optkit.source": "net.py:12"})
    legalize(model, _Without("Shrink"), ANDROID, name="m")
    assert len(list(walk(model))) > 1
    for new in walk(model):
        assert str(new.name).startswith("gate/")
        assert new.metadata_props["optkit.source"] == "net.py:12"
    assert [str(v.name) for v in model.graph.outputs] == ["y"]


def test_the_same_node_twice_and_in_a_body_is_written_out_each_time():
    model = parse(
        HEAD
        % """(float[N] x, bool c) => (float[N] y) {
        a = Shrink(x) b = Shrink(a)
        y = If(c) <then_branch = t () => (float[N] u) { u = Shrink(b) }, else_branch = e () => (float[N] v) { v = Celu(x) }> }"""
    )
    after = model.clone()
    legalize(after, _Without("Shrink", "Celu"), ANDROID, name="m")
    verify(after)
    assert {n.op_type for n in walk(after)}.isdisjoint({"Shrink", "Celu"})
    for c in (True, False):
        same_numbers(model, after, {"x": random_feeds(model)["x"], "c": np.array(c)})


def test_what_cannot_be_written_out_is_listed_with_the_inner_reason_and_nothing_changes():
    model = parse(
        HEAD % "(float[N] x, float[N] z) => (float[N] y, float[N] d) { a = Shrink(x) y = Celu(a) d = Sin(z) }"
    )
    before = text(model)
    with pytest.raises(UnsupportedOpError) as found:
        legalize(model, _Without("Shrink", "Celu", "Elu", "Sin", "Exp"), ANDROID, name="m")
    assert [reason for _, reason in found.value.problems] == [
        "no Celu; written out it needs Elu: no Elu; written out it needs Exp: no Exp",
        "no Sin",
    ]
    assert text(model) == before


@pytest.mark.needs("coremltools")
def test_reasons_name_values_as_the_model_does():
    model = parse(HEAD % "(float[1, 2, 2, 2, 2, 2, 2] x) => (float[1, 2, 2, 2, 2, 2, 2] y) { y = Shrink(x) }")
    with pytest.raises(UnsupportedOpError, match=r"written out it needs .*: 'x' has 7 axes"):
        legalize(model, BACKENDS["coreml"](), PHONE, name="m")


class _InFloats(_Without):
    """The same, where dynamic quantization may be written out."""

    dynamic_in_floats = True


_INTEGERS = ("DynamicQuantizeLinear", "MatMulInteger")
_DYNAMIC = """(float[N, 3] x) => (float[N, 2] y) <uint8[3, 2] w = {1, 2, 3, 40, 50, 255}, uint8 wz = {7}, float ws = {0.01}> {
  q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z, wz) c = Cast<to = 1>(i) f = Mul(s, ws) m = Mul(c, f) y = %s(m) }"""


def test_dynamic_quantization_is_written_out_where_the_backend_says_so():
    model = parse(HEAD % _DYNAMIC % "Relu")
    after = model.clone()
    legalize(after, _InFloats(*_INTEGERS), ANDROID, name="m")
    assert not {n.op_type for n in walk(after)} & set(_INTEGERS)
    # The factors of the scale of the weights are one constant.
    assert [v.name for v in after.graph.outputs] == ["y"] and [n.op_type for n in walk(after)][-4:] == [
        "Mul", "Mul", "Mul", "Relu"
    ]  # fmt: skip
    same_numbers(model, after, random_feeds(model), atol=0, rtol=0)


class _Single(_Without):
    """A backend that computes in float32 alone."""

    halves_in_floats = True


def test_float16_is_widened_where_the_backend_says_so_and_stays_where_a_node_is_refused():
    source = HEAD % "(float16[N, 3] x) => (float16[N, 3] y) { e = Exp(x) y = Sin(e) }"
    model = parse(source)
    legalize(model, _Single(), ANDROID, name="m")
    assert [n.op_type for n in walk(model)] == ["Cast", "Exp", "Sin", "Cast"]
    assert model.graph.outputs[0].dtype == model.graph.inputs[0].dtype == ir.DataType.FLOAT16
    for backend in (_Without(), _Single("Sin")):
        model = parse(source)
        before = text(model)
        with contextlib.suppress(UnsupportedOpError):
            legalize(model, backend, ANDROID, name="m")
        assert text(model) == before


class _NoDoubles(_Without):
    doubles_in_floats = True

    def unsupported(self, node, target):
        double = any(v.dtype == ir.DataType.DOUBLE for v in (*node.inputs, *node.outputs))
        return "float64" if double else super().unsupported(node, target)


def test_float64_is_narrowed_between_inputs_and_outputs_alone():
    model = parse(
        HEAD % "(float[N] x) => (float[N] y) { d = Cast<to = 11>(x) s = Sin(d) y = Cast<to = 1>(s) }"
    )
    legalize(model, _NoDoubles(), ANDROID, name="m")
    assert [n.op_type for n in walk(model)] == ["Sin"]
    model = parse(HEAD % "(double[N] x) => (float[N] y) { s = Sin(x) y = Cast<to = 1>(s) }")
    before = text(model)
    with pytest.raises(UnsupportedOpError):
        legalize(model, _NoDoubles(), ANDROID, name="m")
    assert text(model) == before


def test_dynamic_quantization_stays_where_the_backend_does_not_say_so():
    model = parse(HEAD % _DYNAMIC % "Relu")
    before = text(model)
    with pytest.raises(UnsupportedOpError, match="no MatMulInteger"):
        legalize(model, _Without(*_INTEGERS), ANDROID, name="m")
    assert text(model) == before


def test_dynamic_quantization_stays_as_it_is_where_another_node_is_refused():
    model = parse(HEAD % _DYNAMIC % "Sin")
    before = text(model)
    with pytest.raises(UnsupportedOpError) as found:
        legalize(model, _InFloats(*_INTEGERS, "Sin"), ANDROID, name="m")
    assert [reason for _, reason in found.value.problems] == ["no Sin"] and text(model) == before


class _Apart(_Without):
    """The same, where zero points of 4 bits are refused, and may be taken out of products."""

    zero_points_apart = True

    def unsupported(self, node, target):
        moved = node.op_type == "DequantizeLinear" and len(node.inputs) > 2
        return "zero points" if moved else super().unsupported(node, target)


_FOUR_BITS = """(float[N, 32] x) => (float[N, 4] y) {
  w = DequantizeLinear<axis = 0, block_size = 16>(q, s, z) m = MatMul(x, w) y = %s(m) }"""


def _four_bits(end: str) -> ir.Model:
    random = np.random.default_rng(0)
    numbers = {"q": random.integers(0, 16, (32, 4)), "z": random.integers(0, 16, (2, 4))}
    stored = {k: v.astype(ml_dtypes.uint4) for k, v in numbers.items()}
    return parse(HEAD % _FOUR_BITS % end, s=random.uniform(0.1, 0.2, (2, 4)).astype(np.float32), **stored)


def test_zero_points_of_4_bits_are_taken_out_of_products_where_the_backend_says_so():
    model = _four_bits("Relu")
    after = model.clone()
    legalize(after, _Apart(), ANDROID, name="m")
    assert [n.op_type for n in walk(after)] == [
        "DequantizeLinear", "Reshape", "ReduceMean", "MatMul", "MatMul", "Add", "Relu"
    ]  # fmt: skip
    same_numbers(model, after, random_feeds(model), rtol=1e-4)


def test_zero_points_of_4_bits_stay_where_another_node_is_refused_or_the_backend_does_not_say_so():
    for backend, end, why in (
        (_Apart("Sin"), "Sin", "no Sin"),
        (_Without("DequantizeLinear"), "Relu", "no Deq"),
    ):
        model = _four_bits(end)
        before = text(model)
        with pytest.raises(UnsupportedOpError, match=why):
            legalize(model, backend, ANDROID, name="m")
        assert text(model) == before


def test_constants_of_the_node_are_folded_and_shared_ones_stay():
    model = parse(
        HEAD
        % """(float[4, 7, 3] x) => (float[5, 5, 3] y, int64[2] s) <int64[2] size = {5, 5}> {
        y = CenterCropPad<axes = [0, 1]>(x, size) s = Identity(size) }"""
    )
    after = model.clone()
    legalize(after, _Without("CenterCropPad"), ANDROID, name="m")
    assert {n.op_type for n in walk(after)} <= {"Pad", "Slice", "Identity"}
    same_numbers(model, after, random_feeds(model))
