"""Each operator as a Core ML package in the reference evaluator, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import UnsupportedOpError
from optkit.graph import walk
from optkit.legalize import legalize
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : %d]>\ng %s'
PHONE = target("iphone15")

# Operators of one input on values around 0, on values above 0 and on values between -1 and 1.
UNARY = (
    "Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "LogSoftmax", "Mish", "Neg", "Relu", "Round", "Selu", "Celu", "Sigmoid", "Sign", "Sin",
    "Sinh", "Cosh", "Softmax", "Softplus", "Softsign", "Tan", "Tanh", "Asinh", "ThresholdedRelu", "Hardmax", "IsNaN", "Dropout",
)  # fmt: skip
POSITIVE = ("Log", "Sqrt", "Reciprocal")
INSIDE = ("Acos", "Asin", "Atan", "Atanh")


def _each(operators: tuple[str, ...], of: str, constant: str = "none = {0}", before: str = "") -> str:
    """A graph with an output for each operator of one input."""
    outputs = ", ".join(
        f"{'bool' if op == 'IsNaN' else 'float'}[N, 7] y{i}" for i, op in enumerate(operators)
    )
    nodes = " ".join(f"y{i} = {op}({of})" for i, op in enumerate(operators))
    return f"(float[N, 7] x) => ({outputs}) <float {constant}> {{ {before} {nodes} }}"


# Name -> graph, and the shapes of its weights. Every operator of the emitters is in one of them, see the last test.
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "unary": (_each(UNARY, "x"), {}),
    "above zero": (_each(POSITIVE, "p", "small = {0.25}", "a = Abs(x) p = Add(a, small)"), {}),
    "inside one": (_each(INSIDE, "p", "most = {0.9}", "t = Sin(x) p = Mul(t, most)"), {}),
    "attributes": (
        """(float[N, 7] x) => (float[N, 7] a, float[N, 7] b, float[N, 7] c, float[N, 7] d, float[N, 7] e, float[N, 7] f) {
        a = LeakyRelu<alpha = 0.3>(x) b = Elu<alpha = 0.7>(x) c = HardSigmoid<alpha = 0.4, beta = 0.3>(x)
        d = Gelu<approximate = "tanh">(x) e = ThresholdedRelu<alpha = 0.2>(x) f = Celu<alpha = 2.0>(x) }""",
        {},
    ),
    "binary": (
        """(float[N, 4] x, float[4] z) => (float[N, 4] a, float[N, 4] b, float[N, 4] c, float[N, 4] d, float[N, 4] e,
        float[N, 4] f, float[N, 4] g, float[N, 4] h) {
        a = Add(x, z) b = Sub(x, z) c = Mul(x, z) d = Div(x, z) e = Max(x, z) f = Min(x, z) g = Sum(x, z, x) h = Mean(x, z) }""",
        {},
    ),
    "compared": (
        """(float[N, 4] x, float[4] z) => (bool[N, 4] a, bool[N, 4] b, bool[N, 4] c, bool[N, 4] d, bool[N, 4] e, bool[N, 4] f,
        bool[N, 4] g, bool[N, 4] h, bool[N, 4] i) {
        a = Greater(x, z) b = GreaterOrEqual(x, z) c = Less(x, z) d = LessOrEqual(x, z) e = Equal(x, x)
        f = And(a, b) g = Or(a, c) h = Xor(b, e) i = Not(a) }""",
        {},
    ),
    "infinite": (
        """(float[N, 4] x) => (bool[N, 4] a, bool[N, 4] b, bool[N, 4] c) <float zero = {0}> {
        r = Div(x, zero) a = IsInf(r) b = IsInf<detect_negative = 0>(r) c = IsInf<detect_positive = 0>(r) }""",
        {},
    ),
    "integers divided": (
        """(int64[4] x) => (int64[4] a, int64[4] b, int64[4] c, int64[4] d)
        <int64 two = {2}, int64 three = {3}> {
        n = Neg(x) t = Mul(n, three) a = Div(t, two) b = Mod(t, two) c = Mod<fmod = 1>(t, two) d = Div(x, two) }""",
        {},
    ),
    "powers": (
        """(float[N, 4] x) => (float[N, 4] a, float[N, 4] b, float[N, 4] c) <float two = {2}, float half = {0.5}, float three = {3}> {
        a = Pow(x, two) p = Abs(x) b = Pow(p, half) c = Pow(x, three) }""",
        {},
    ),
    "clipped": (
        """(float[N, 4] x) => (float[N, 4] a, float[N, 4] b, float[N, 4] c, float[N, 4] d)
        <float low = {-0.5}, float zero = {0}, float six = {6}, float high = {0.25}> {
        a = Clip(x, low, high) b = Clip(x, zero, six) c = Clip(x, zero) d = Clip(x, , high) }""",
        {},
    ),
    "slopes": ("(float[N, 4, 5] x) => (float[N, 4, 5] y) { y = PRelu(x, w) }", {"w": (4, 1)}),
    "slopes of planes": (
        "(float[N, 4, 5, 3] x) => (float[N, 4, 5, 3] y, float[N, 4, 5, 3] z) { y = PRelu(x, w) z = PRelu(x, v) }",
        {"w": (4, 1, 1), "v": (1,)},
    ),
    "slopes along the last axis": ("(float[N, 4, 5] x) => (float[N, 4, 5] y) { y = PRelu(x, w) }", {"w": (5,)}),
    "chosen": (
        "(float[N, 4] x, bool[N, 4] c, int64[N, 4] i) => (float[N, 4] y, int64[N, 4] z) { s = Neg(x) y = Where(c, x, s) j = Add(i, i) z = Where(c, i, j) }",
        {},
    ),
    "chosen by a larger condition": (
        """(bool[N, 3, 1, 5] c, float[N, 1, 4, 1] x, int64[5] i) => (float[] a, float[] b, float[] d, int64[] e)
        <float zero = {0}, float most = {-1e30}, int64 one = {1}> {
        a = Where(c, zero, most) b = Where(c, x, zero) d = Where(c, most, x) e = Where(c, one, i) }""",
        {},
    ),
    "cast": (
        """(float[N, 4] x, int64[N] i) => (int32[N, 4] a, bool[N, 4] b, float[N] c, float[N, 4] d) {
        a = Cast<to = 6>(x) b = Cast<to = 9>(x) c = Cast<to = 1>(i) h = Cast<to = 10>(x) d = Cast<to = 1>(h) }""",
        {},
    ),
    "cast to small integers": (
        """(float[N, 4] x, int64[N] i, bool[N] b) => (uint8[N, 4] a, int8[N, 4] c, int16[N, 4] d, uint8[N] e, uint16[N] f, uint8[N] g) {
        p = Abs(x) a = Cast<to = 2>(p) c = Cast<to = 3>(x) d = Cast<to = 5>(x) e = Cast<to = 2>(i) f = Cast<to = 4>(i) g = Cast<to = 2>(b) }""",
        {},
    ),
    "resized as TensorFlow once did": (
        """(float[1, 2, 3, 4] x) => (float[] y, float[] z) <float[4] f = {1, 1, 2, 1.5}> {
        y = Resize<mode = "nearest", coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "floor">(x, , f)
        z = Resize<mode = "linear", coordinate_transformation_mode = "tf_half_pixel_for_nn">(x, , f) }""",
        {},
    ),
    "reduced along no axis": (
        """(float[N, 4] x, bool[N, 4] b) => (float[N, 4] a, float[N, 4] c, float[N, 4] d, float[N, 4] e, float[N, 4] f, float[N, 4] g,
        bool[N, 4] h) {
        a = ReduceL1<noop_with_empty_axes = 1>(x) c = ReduceL2<noop_with_empty_axes = 1>(x)
        d = ReduceSumSquare<noop_with_empty_axes = 1>(x) p = Exp(x) e = ReduceLogSum<noop_with_empty_axes = 1>(p)
        f = ReduceLogSumExp<noop_with_empty_axes = 1>(x) g = ReduceSum<noop_with_empty_axes = 1>(x)
        h = ReduceMax<noop_with_empty_axes = 1>(b) }""",
        {},
    ),
    "triangles": (
        """(float[4, 5] x) => (float[4, 5] a, float[4, 5] b, float[4, 5] c, float[4, 5] d) <int64 k = {1}> {
        a = Trilu<upper = 1>(x) b = Trilu<upper = 0>(x) c = Trilu<upper = 1>(x, k) d = EyeLike<k = 1>(x) }""",
        {},
    ),
    "triangles of free sizes": (
        """(float[2, N, M] x) => (float[2, N, M] a, float[2, N, M] b, float[2, N, M] d, bool[2, N, M] e) <int64 k = {-1}> {
        a = Trilu<upper = 1>(x) b = Trilu<upper = 0>(x) d = Trilu<upper = 1>(x, k) t = Cast<to = 9>(x) e = Trilu<upper = 0>(t, k) }""",
        {},
    ),
    "swish": ("(float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Swish(x) z = Swish<alpha = 1.7>(x) }", {}),
    "convolution": (
        """(float[N, 4, 9, 7] x) => (float[] a, float[] b, float[] c, float[] d) {
        a = Conv<kernel_shape = [3, 3], pads = [1, 0, 2, 1], strides = [2, 1]>(x, w, v)
        b = Conv<kernel_shape = [3, 3], dilations = [2, 1]>(x, w)
        c = Conv<kernel_shape = [3, 3], auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)
        d = Conv<kernel_shape = [3, 3], auto_pad = "SAME_LOWER">(x, w) }""",
        {"w": (6, 4, 3, 3), "v": (6,)},
    ),
    "grouped convolution": (
        """(float[N, 4, 9, 20] x) => (float[] a, float[] b, float[] c) {
        a = Conv<kernel_shape = [3, 3], group = 2, pads = [1, 1, 1, 1]>(x, w)
        b = Conv<kernel_shape = [5, 5], group = 4, pads = [2, 2, 2, 2], strides = [2, 1]>(x, u)
        c = Conv<kernel_shape = [3, 3], group = 4, dilations = [2, 2]>(x, t) }""",
        {"w": (6, 2, 3, 3), "u": (8, 1, 5, 5), "t": (4, 1, 3, 3)},
    ),
    "convolution of a line": (
        """(float[N, 4, 9] x) => (float[] a, float[] b) {
        a = Conv<kernel_shape = [3], pads = [1, 1]>(x, w) b = Conv<kernel_shape = [3], group = 4>(x, u) }""",
        {"w": (6, 4, 3), "u": (4, 1, 3)},
    ),
    "convolution of a volume": (
        "(float[1, 2, 5, 6, 4] x) => (float[] y) { y = Conv<kernel_shape = [3, 2, 2], pads = [1, 0, 0, 1, 0, 1]>(x, w) }",
        {"w": (3, 2, 3, 2, 2)},
    ),
    "transposed convolution": (
        """(float[1, 4, 5, 6] x) => (float[] a, float[] b, float[] c) {
        a = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]>(x, w, v)
        b = ConvTranspose<kernel_shape = [2, 2], strides = [2, 2], group = 2>(x, u)
        c = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER">(x, w) }""",
        {"w": (4, 3, 3, 3), "v": (3,), "u": (4, 3, 2, 2)},
    ),
    "pools": (
        """(float[N, 3, 9, 8] x) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f, float[] g) {
        a = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x)
        b = MaxPool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>(x)
        c = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)
        d = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(x)
        e = AveragePool<kernel_shape = [2, 3], strides = [2, 2], ceil_mode = 1>(x)
        f = GlobalAveragePool(x) g = GlobalMaxPool(x) }""",
        {},
    ),
    "averages of windows that reach beyond the end": (
        """(float[N, 3, 9, 8] x) => (float[] a, float[] b) {
        a = AveragePool<kernel_shape = [4, 4], strides = [4, 4], ceil_mode = 1, count_include_pad = 1>(x)
        b = AveragePool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1, count_include_pad = 1>(x) }""",
        {},
    ),
    "windows that would start behind the end": (
        """(float[N, 3, 9, 8] x) => (float[] a, float[] b, float[] c) {
        a = AveragePool<kernel_shape = [3, 3], strides = [3, 3], pads = [1, 1, 1, 1], ceil_mode = 1, count_include_pad = 1>(x)
        b = AveragePool<kernel_shape = [3, 3], strides = [3, 3], pads = [1, 1, 1, 1], ceil_mode = 1>(x)
        c = MaxPool<kernel_shape = [1, 1], strides = [2, 2], ceil_mode = 1>(x) }""",
        {},
    ),
    "samples of a plane": (
        """(float[N, 3, 5, 4] x, float[N, 6, 7, 2] g) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f) {
        a = GridSample(x, g) b = GridSample<align_corners = 1>(x, g) c = GridSample<mode = "nearest">(x, g)
        d = GridSample<padding_mode = "border">(x, g) e = GridSample<padding_mode = "reflection">(x, g)
        f = GridSample<padding_mode = "reflection", align_corners = 1>(x, g) }""",
        {},
    ),
    "products": (
        """(float[N, 3, 4] x, float[N, 4, 2] z) => (float[] a, float[] b, float[] c, float[] d) {
        a = MatMul(x, z) b = MatMul(x, w) c = MatMul(x, v) d = MatMul(u, x) }""",
        {"w": (4, 5), "v": (4,), "u": (2, 3)},
    ),
    "gemm": (
        """(float[N, 4] x) => (float[N, 5] a, float[N, 5] b, float[5, N] c) {
        a = Gemm(x, w, v) b = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, u, v) c = Gemm<transB = 1>(u, x) }""",
        {"w": (4, 5), "v": (5,), "u": (5, 4)},
    ),
    "einsum": (
        """(float[2, 3, 4] x, float[2, 5, 4] z) => (float[] a, float[] b, float[] c) {
        a = Einsum<equation = "bqd,bkd->bqk">(x, z) b = Einsum<equation = "bij->bji">(x)
        c = Einsum<equation = "bqd,bkd->kqb">(x, z) }""",
        {},
    ),
    "norms": (
        """(float[N, 4, 6] x) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
        s = Abs(v) a = BatchNormalization(x, w, u, u, s) b = InstanceNormalization(x, w, u)
        c = LayerNormalization<epsilon = 0.001>(x, t) d = LayerNormalization<axis = 1>(x, r, r)
        e = LpNormalization<axis = 1, p = 2>(x) }""",
        {"w": (4,), "u": (4,), "v": (4,), "t": (6,), "r": (4, 6)},
    ),
    "norms of newer opsets": (
        """(float[N, 4, 6] x) => (float[] a, float[] b) {
        a = GroupNormalization<num_groups = 2>(x, w, u) b = RMSNormalization<epsilon = 0.001>(x, t) }""",
        {"w": (4,), "u": (4,), "t": (6,)},
    ),
    "norms of planes": (
        """(float[N, 4, 6, 5] x) => (float[] a, float[] b, float[] c) {
        a = LRN<size = 3, alpha = 0.2, beta = 0.6, bias = 1.5>(x) b = MeanVarianceNormalization(x) c = InstanceNormalization(x, w, u) }""",
        {"w": (4,), "u": (4,)},
    ),
    "recurrent": (
        """(float[5, N, 3] x) => (float[] y, float[] h, float[] c, float[] g, float[] i, float[] r) {
        y, h, c = LSTM<hidden_size = 4>(x, w, q, v)
        g, i = GRU<hidden_size = 4, linear_before_reset = 1>(x, w3, q3, v3)
        r = RNN<hidden_size = 4, activations = ["Relu"]>(x, w1, q1) }""",
        {
            "w": (1, 16, 3), "q": (1, 16, 4), "v": (1, 32), "w3": (1, 12, 3), "q3": (1, 12, 4), "v3": (1, 24), "w1": (1, 4, 3),
            "q1": (1, 4, 4),
        },
    ),
    "recurrent of free length": (
        """(float[T, N, 3] x, float[2, N, 4] h0) => (float[] g, float[] i, float[] r, float[] b, float[] k) {
        g, i = GRU<hidden_size = 4, linear_before_reset = 1>(x, w3, q3, v3)
        r = RNN<hidden_size = 4, direction = "reverse", activations = ["Relu"]>(x, w1, q1)
        b, k = GRU<hidden_size = 4, direction = "bidirectional">(x, w, q, v, , h0) }""",
        {
            "w3": (1, 12, 3), "q3": (1, 12, 4), "v3": (1, 24), "w1": (1, 4, 3), "q1": (1, 4, 4), "w": (2, 12, 3), "q": (2, 12, 4),
            "v": (2, 24),
        },
    ),
    "scan of free length": (
        """(float[2, N] s, float[3, T, N] x, float[T, 2, 1] w, int64[T] k) => (float[] e, float[] y, float[] z, int64[] n, float[] v) <int64 start = {0}, int64[1] zero = {0}> {
        e, n, y, z, v = Scan<num_scan_inputs = 3, scan_input_axes = [1, 0, 0], scan_input_directions = [1, 0, 0],
          scan_output_axes = [2, 0, 0], scan_output_directions = [0, 1, 1],
          body = b (float[2, N] p, int64 m, float[3, N] q, float[2, 1] r, int64 j) =>
            (float[2, N] pp, int64 mm, float[2, N] o, float[2, N] d, float l) {
            a = Mul(p, r) t = ReduceSum<keepdims = 1>(q, zero) pp = Add(a, t) o = Tanh(pp) d = Neg(pp) mm = Add(m, j)
            l = ReduceMax<keepdims = 0>(q) }>(s, start, x, w, k) }""",
        {},
    ),
    "recurrent both ways": (
        """(float[5, 2, 3] x, float[2, 2, 4] h0, float[2, 2, 4] c0) => (float[] y, float[] h, float[] c, float[] g, float[] r) {
        y, h, c = LSTM<hidden_size = 4, direction = "bidirectional">(x, w, q, v, , h0, c0)
        g = GRU<hidden_size = 4, direction = "bidirectional">(x, w3, q3, v3, , h0)
        w1 = Identity(w3) one = Identity(q3)
        r = GRU<hidden_size = 4, direction = "reverse">(x, w2, q2) }""",
        {
            "w": (2, 16, 3), "q": (2, 16, 4), "v": (2, 32), "w3": (2, 12, 3), "q3": (2, 12, 4), "v3": (2, 24), "w2": (1, 12, 3),
            "q2": (1, 12, 4),
        },
    ),
    "reduced": (
        """(float[N, 4, 3] x) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f, float[] g,
        float[] h, float[] i, float[] j) <int64[1] last = {-1}, int64[2] two = {0, 2}> {
        a = ReduceMean(x, last) b = ReduceSum<keepdims = 0>(x, two) c = ReduceMax(x, last) d = ReduceMin<keepdims = 0>(x, last)
        e = ReduceProd(x, last) f = ReduceL1(x, two) g = ReduceL2<keepdims = 0>(x, last) h = ReduceSumSquare(x)
        i = ReduceLogSumExp(x, last) p = Abs(x) j = ReduceLogSum(p, last) }""",
        {},
    ),
    "places of the largest": (
        """(float[N, 4, 3] x) => (int64[] a, int64[] b, float[] c, int64[] d, float[] e, int64[] f, float[] g)
        <int64[1] k = {2}, int64 axis = {1}> {
        a = ArgMax<axis = 1>(x) b = ArgMin<axis = -1, keepdims = 0>(x) c, d = TopK<axis = 1>(x, k)
        e, f = TopK<largest = 0>(x, k) g = CumSum<reverse = 1, exclusive = 1>(x, axis) }""",
        {},
    ),
    "one hot": (
        "(int64[N, 2] x) => (float[N, 2, 4] y) <int64 depth = {4}, float[2] values = {0.5, 2}> { y = OneHot(x, depth, values) }",
        {},
    ),
    "resized to what it was, and to places that are whole": (
        """(float[1, 2, 3, 5] x) => (float[1, 2, 3, 5] a, float[1, 2, 3, 5] b, float[1, 2, 11, 3] c)
        <float[4] f = {1, 1, 1.2, 1.1}, int64[4] t = {1, 2, 11, 3}> {
        a = Resize<mode = "nearest", nearest_mode = "floor">(x, , f) b = Resize<mode = "linear">(x, , f)
        c = Resize<mode = "nearest", coordinate_transformation_mode = "half_pixel_symmetric", nearest_mode = "floor">(x, , , t) }""",
        {},
    ),
    "enlarged": (
        """(float[1, 2, 4, 5] x) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f)
        <float[4] twice = {1, 1, 2, 2}, int64[4] sizes = {1, 2, 7, 6}> {
        a = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(x, , twice)
        b = Resize<mode = "linear">(x, , twice)
        c = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">(x, , , sizes)
        d = Resize<mode = "cubic">(x, , , sizes)
        e = Resize<mode = "nearest">(x, , , sizes)
        f = Resize<mode = "linear", coordinate_transformation_mode = "asymmetric">(x, , , sizes) }""",
        {},
    ),
    "shrunk": (
        """(float[1, 2, 8, 9] x) => (float[] a, float[] b, float[] c, float[] d) <int64[4] sizes = {1, 2, 3, 4}> {
        a = Resize<mode = "linear", antialias = 1>(x, , , sizes) b = Resize<mode = "linear">(x, , , sizes)
        d = Resize<mode = "cubic", antialias = 1>(x, , , sizes) c = Resize<mode = "cubic", exclude_outside = 1>(x, , , sizes) }""",
        {},
    ),
    "enlarged at free sizes": (
        """(float[1, 2, N, 5] x) => (float[] a, float[] b) <float[4] twice = {1, 1, 2, 2}> {
        a = Resize<mode = "nearest">(x, , twice) b = Resize<mode = "linear">(x, , twice) }""",
        {},
    ),
    "shapes": (
        """(float[N, 4, 3] x) => (int64[3] a, int64[] b, float[] c, float[] d, float[] e, float[] f, float[] g)
        <int64[2] flat = {0, -1}, int64[1] one = {1}> {
        a = Shape(x) b = Size(x) c = Reshape(x, flat) d = Flatten<axis = 2>(x) e = Transpose<perm = [2, 0, 1]>(x)
        f = Unsqueeze(x, one) g = Squeeze(f, one) }""",
        {},
    ),
    "a shape computed from another": (
        """(float[N, 4, 6] x) => (float[] y) <int64 zero = {0}, int64[1] parts = {2, }, int64[1] rest = {-1}> {
        s = Shape(x) n = Gather(s, zero) axes = Identity(rest) l = Unsqueeze(n, first) t = Concat<axis = 0>(l, parts, rest)
        y = Reshape(x, t) }""".replace("{2, }", "{2}").replace("axes = Identity(rest)", "").replace("first", "zeros").replace(
            "int64[1] rest", "int64[1] zeros = {0}, int64[1] rest"
        ),
        {},
    ),
    "joined and parted": (
        """(float[N, 4] x, float[N, 2] z, bool[N, 4] c) => (float[] a, bool[] b, float[] d, float[] e, float[] f, float[] g)
        <int64[2] sizes = {1, 3}> {
        a = Concat<axis = 1>(x, z) n = Not(c) b = Concat<axis = -1>(c, n) d, e = Split<axis = 1>(x, sizes)
        f, g = Split<axis = -1, num_outputs = 2>(x) }""",
        {},
    ),
    "slices": (
        """(float[N, 8] x) => (float[] a, float[] b, float[] c, float[] d)
        <int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, int64[1] far = {9223372036854775807},
        int64[1] before = {-9223372036854775807}, int64[1] back = {-2}> {
        a = Slice(x, one, last, one) b = Slice(x, two, far, one, two) c = Slice(x, last, before, one, back) d = Slice(x, one, far) }""",
        {},
    ),
    "repeated": (
        """(float[N, 1, 3] x) => (float[] a, float[] b, float[] c) <int64[3] wide = {1, 4, 3}, int64[3] times = {2, 3, 1}> {
        a = Expand(x, wide) b = Tile(x, times) s = Shape(x) c = ConstantOfShape<value = float[1] {1.5}>(s) }""",
        {},
    ),
    "counted": (
        "(int64 n) => (int64[] y) <int64 zero = {0}, int64 two = {2}> { y = Range(zero, n, two) }",
        {},
    ),
    "padded": (
        """(float[N, 2, 4, 5] x) => (float[] a, float[] b, float[] c, float[] d)
        <int64[8] p = {0, 0, 1, 2, 0, 0, 2, 1}, int64[8] q = {0, 1, 1, -1, 0, 0, 0, 2}, float v = {0.5}> {
        a = Pad(x, p) b = Pad<mode = "reflect">(x, p) c = Pad<mode = "edge">(x, p) d = Pad(x, q, v) }""",
        {},
    ),
    "repeated around": (
        """(float[2, 3, 4] x, int64[3, 4] i, float[N, 4] z) => (float[] a, int64[] b, int64[] c, float[] d, int64[] e)
        <int64[6] p = {1, 0, 2, 0, 2, 5}, int64[4] q = {0, 1, 1, 2}, int64[4] r = {0, 3, 0, 2}, int64[2] f = {2, 1}, int64[1] first = {0}> {
        a = Pad<mode = "wrap">(x, p) b = Pad<mode = "edge">(i, q) c = Pad<mode = "reflect">(i, q) d = Pad<mode = "wrap">(z, r)
        g = ReduceSum(i, first) h = Squeeze(g, first) e = Pad<mode = "wrap">(h, f) }""",
        {},
    ),
    "integers padded": (
        """(int64[N, 3] x) => (int64[] a, int64[] b) <int64[4] p = {1, 0, 0, 2}, int64[4] q = {0, -1, 2, 1}, int64 v = {16777217}> {
        a = Pad(x, p, v) b = Pad(x, q) }""",
        {},
    ),
    "parted by computed sizes": (
        """(float[N, 4] x, float[N, 4] u) => (float[] a, float[] b) {
        n = Shape<start = 0, end = 1>(x) m = Shape<start = 0, end = 1>(u) sizes = Concat<axis = 0>(n, m)
        both = Concat<axis = 0>(x, u) v = Mul(both, both) a, b = Split<axis = 0>(v, sizes) }""",
        {},
    ),
    "spectra": (
        """(float[2, N, 1] x, float[2, 40] u) => (float[] a, float[] b, float[] c) <int64 step = {1}, int64 two = {2}, int64 wide = {8}> {
        l = Concat<axis = 1>(x, x, x, x) a = STFT(l, two, w) b = STFT<onesided = 0>(l, step, , two) c = STFT<onesided = 1>(u, two, w, wide) }""",
        {"w": (8,)},
    ),
    "blocks": (
        """(float[N, 8, 2, 4] x) => (float[] a, float[] b, float[] c) {
        a = DepthToSpace<blocksize = 2>(x) b = DepthToSpace<blocksize = 2, mode = "CRD">(x) c = SpaceToDepth<blocksize = 2>(x) }""",
        {},
    ),
    "places that are not zero": (
        "(float[3, 4] x) => (int64[2, M] y) <float zero = {0}> { b = Greater(x, zero) y = NonZero(b) }",
        {},
    ),
    "sequences backwards": (
        """(float[4, 3, 2] x) => (float[4, 3, 2] y) <int64[3] lengths = {4, 2, 1}> {
        y = ReverseSequence<batch_axis = 1, time_axis = 0>(x, lengths) }""",
        {},
    ),
    "gathered": (
        """(float[N, 4] x, int64[2, 3] i, float[4, 3] u) => (float[] a, float[] b, float[] c, float[] d, float[] e)
        <int64[2] behind = {-1, 0}, int64[2, 2] e0 = {0, 1, 2, -1}> {
        a = Gather(x, i) b = Gather<axis = 1>(x, behind) c = GatherElements<axis = 1>(u, e0) d = GatherND(x, i2) e = Gather(w, i) }""".replace(
            "i2", "n2"
        ).replace("int64[2, 2] e0", "int64[2, 2] n2 = {0, 1, 2, 3}, int64[2, 2] e0"),
        {"w": (7, 5)},
    ),
    "scattered": (
        """(float[4, 3] x, float[2, 3] u) => (float[4, 3] a, float[4, 3] b, float[4, 3] c, float[4, 3] d)
        <int64[2, 3] i = {0, 1, 2, 2, 0, 3}, int64[2, 1] n = {3, 1}> {
        a = ScatterElements(x, i, u) b = ScatterElements<reduction = "add">(x, i, u) c = ScatterND(x, n, u)
        d = ScatterND<reduction = "max">(x, n, u) }""",
        {},
    ),
    "at places counted from the end, behind axes of a batch": (
        """(float[2, 3, 4] x, float[N, 3, 4] z, int64[2, 2, 1] i, float[2, 4] u) => (float[] a, float[] b, float[] c, float[] d, float[] e)
        <int64 one = {1}, int64[2, 2] k = {-1, -2, 0, 2}> {
        n = Sub(i, one) a = GatherND<batch_dims = 1>(x, n) b = GatherND(z, k) m = Sub(k, one) c = GatherND(z, m)
        d = ScatterND(z, k, u) e = ScatterND<reduction = "add">(x, m, u) }""",
        {},
    ),
    "behind convolutions": (
        """(float[1, 4, 6, 5] x) => (float[] a, float[] b, float[] d, float[] e, float[] f)
        <float one = {1}, float far = {30}> {
        c = Conv(x, w) m = Abs(c) n = Sum(m, one) g = Conv<kernel_shape = [1, 1]>(n, u) h = Conv<kernel_shape = [1, 1]>(n, u)
        a = Div(v, g) b = Reciprocal(h) t = ConvTranspose<group = 2>(x, r) d = Mul(t, s)
        k = ConvTranspose<group = 2, strides = [2, 1]>(x, r) z = Abs(s6) e = BatchNormalization(k, s6, m6, m6, z)
        i = Conv(x, w) f = Add(i, far5) }""",
        {"w": (3, 4, 3, 3), "u": (3, 3, 1, 1), "v": (3, 1, 1), "r": (4, 3, 3, 3), "s": (6, 1, 1), "s6": (6,), "m6": (6,), "far5": (3, 1, 1, 1, 1)},
    ),
    "a root beside its reciprocal": (
        "(float[N, 7] x) => (float[N, 7] r, float[N, 7] y) { p = Exp(x) r = Sqrt(p) y = Reciprocal(r) }",
        {},
    ),
    "roots below one": (
        """(float[N, 4] x) => (float[N, 4] y, float[N, 4] z) <float one = {1}> {
        p = Mul(x, x) q = Add(p, one) r = Sqrt(q) y = Reciprocal(r) s = Exp(x) t = Sqrt(s) u = Reciprocal(t) z = Add(t, u) }""",
        {},
    ),
    "one of two": (
        """(float[N, 4] x) => (float[N, 4] y) <float zero = {0}> { s = ReduceSum<keepdims = 0>(x) c = Greater(s, zero)
        y = If(c)<then_branch = t () => (float[N, 4] a) { a = Exp(x) }, else_branch = e () => (float[N, 4] b) { b = Neg(x) }> }""",
        {},
    ),
    "loop": (
        """(float[4] x) => (float[4] y) <int64 times = {3}, bool on = {1}> {
        y = Loop(times, on, x)<body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w) {
          d = Identity(c) f = Cast<to = 1>(i) w = Add(v, f) }> }""",
        {},
    ),
    "loop with what no step reads": (
        """(float[4] x) => (float[4] y, float[2, 4] last, float[4] same) <int64 times = {9}, bool on = {1}, float none = {0}, int64[1] zeroth = {0},
          float most = {40}> {
        y, last, same = Loop(times, on, x, none, x)<
          body = b (int64 i, bool c, float[4] v, float[2, 4] o, float[4] k) => (bool d, float[4] w, float[2, 4] p, float[4] k) {
          h = Abs(v) g = Add(h, k) w = Add(g, h) a = Unsqueeze(w, zeroth) e = Unsqueeze(v, zeroth) p = Concat<axis = 0>(a, e)
          s = ReduceMax<keepdims = 0>(w) d = Less(s, most) }> }""",
        {},
    ),
    "numbers with and without an axis": (
        """(float[N, 4] x, float z) => (float[N, 4] y, float t) <float zero = {0}, float[1] one = {1}, int64 times = {3}, bool on = {1}> {
        s = ReduceSum<keepdims = 0>(x) c = Greater(s, zero)
        n = If(c)<then_branch = t () => (float[1] a) { a = Abs(one) }, else_branch = e () => (float b) { b = Neg(z) }>
        m = Neg(n) y = Add(x, m)
        t, u = Loop(times, on, z, z)<body = b (int64 i, bool c2, float v, float o) => (bool d, float w, float p) {
          d = Identity(c2) q = Add(o, one) p = Mul(q, q) r = ReduceSum<keepdims = 0>(q) w = Add(v, r) }> }""",
        {},
    ),
    "loop that collects": (
        """(float[4] x, float[3, 2] s) => (float[4] y, float[n, 4] all) <int64 most = {9}, bool on = {1}, int64 one = {1}> {
        h = Shape<start = 0, end = 1>(s) times = Squeeze(h)
        y, all = Loop(most, on, x)<body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w, float[4] k) {
          f = Cast<to = 1>(i) w = Add(v, f) k = Neg(w) j = Add(i, one) d = Less(j, times) }> }""",
        {},
    ),
    "as many as there are elsewhere": (
        """(float[N, 6, 2] x, float[M] some) => (float[N, K, 2] y, int64[N, K, 2] i, float[K] z, int64[K] j) <int64[1] one = {1}> {
        n = Size(some) k = Reshape(n, one) y, i = TopK<axis = 1>(x, k) z, j = TopK<largest = 0>(some, k) }""",
        {},
    ),
    "boxes": (
        """(float[2, 40, 4] b, float[2, 3, 40] s, float[2, 40, 4] c, int64[M] some) => (int64[K, 3] y, int64[L, 3] z, int64[J, 3] few)
        <int64 most = {7}, float overlap = {0.3}, float least = {0.25}, float one = {1}, int64 three = {3}> {
        e = Exp(c) y = NonMaxSuppression(b, s, most, overlap, least)
        z = NonMaxSuppression<center_point_box = 1>(e, s, most, overlap)
        n = Size(some) m = Min(n, three) few = NonMaxSuppression(b, s, m, overlap) }""",
        {},
    ),
    "scan": (
        """(float[2, 3] s, float[5, 2, 3] x, float[2, 5] w) => (float[2, 3] last, float[5, 2, 3] all, float[2, 5] other) {
        last, all, other = Scan<num_scan_inputs = 2, scan_input_axes = [0, 1], scan_input_directions = [0, 1],
          scan_output_axes = [0, 1], scan_output_directions = [1, 0],
          body = b (float[2, 3] t, float[2, 3] a, float[2] c) => (float[2, 3] v, float[2, 3] n, float[2] m) {
          p = Mul(t, a) v = Add(p, a) n = Neg(v) m = Exp(c) }>(s, x, w) }""",
        {},
    ),
    "masks of what is dropped": (
        """(float[N, 3] x, float[2, 3] s, float z) => (float[N, 3] a, bool[N, 3] b, float[2, 3] c, bool[2, 3] d, float e, bool f) {
        a, b = Dropout(x) c, d = Dropout(s) e, f = Dropout(z) }""",
        {},
    ),
    "scan of numbers": (
        """(float i) => (float y, float[5] z) <float[5] x = {0, 1, 2, 3, 4}> {
        y, z = Scan<num_scan_inputs = 1, body = b (float s, float n) => (float o, float p) { o = Add(s, n) p = Identity(o) }>(i, x) }""",
        {},
    ),
    "quantized": (
        """(float[N, 4] x) => (float[N, 4] a, float[N, 4] b, float[N, 3] c)
        <float s = {0.05}, int8 z = {3}, uint8 u = {120}, float[3] ws = {0.01, 0.02, 0.03}, int8[3] wz = {0, 0, 0}> {
        q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) p = QuantizeLinear(x, s, u) b = DequantizeLinear(p, s, u)
        r = QuantizeLinear<axis = 1>(w, ws, wz) d = DequantizeLinear<axis = 1>(r, ws, wz) c = MatMul(a, d) }""",
        {"w": (4, 3)},
    ),
    "sliced to the end by a number that 32 bits do not hold": (
        """(float[N, 5] x, float[M, 5] z) => (float[K, L] y) <int64[1] last = {9223372036854775807}, int64[2] begin = {0, 1}> {
        n = Shape<start = 0, end = 1>(z) ends = Concat<axis = 0>(n, last) y = Slice(x, begin, ends) }""",
        {},
    ),
    "truth values and small integers, moved": (
        """(uint8[1, 4, 2, 2] x, bool[4, 3] t, bool[2, 3] u, bool v) => (uint8[1, 1, 4, 4] a, uint8[1, 16, 1, 1] b, uint8[1, 1, 4, 4] c, bool[4, 3] d,
        bool[4, 3] e, bool[5, 3] f, bool[5, 3] g)
        <int64[2, 1] i = {1, 0}, int64[2, 3] j = {0, 1, 2, 3, 2, 1}, int64[4] p = {0, 0, 1, 0}, bool yes = {1}> {
        a = DepthToSpace<blocksize = 2>(x) b = SpaceToDepth<blocksize = 2>(x) c = DepthToSpace<blocksize = 2, mode = "CRD">(x)
        d = ScatterND(t, i, u) e = ScatterElements(t, j, u) f = Pad(t, p, yes) g = Pad(t, p, v) }""",
        {},
    ),
    "small integers, the largest of a window and repeated": (
        """(uint8[1, 2, 4, 4] x, int8[1, 2, 4, 4] z, float[1, 2, 4, 4] f) => (uint8[1, 2, 2, 2] a, int8[1, 2, 2, 2] b, uint8[1, 2, 8, 8] c,
        int8[1, 2, 6, 6] d, float[1, 2, 2, 2] e, int32[1, 2, 8, 8] g)
        <float[4] twice = {1, 1, 2, 2}, float[4] more = {1, 1, 1.5, 1.5}, float s = {0.05}, uint8 u = {120}> {
        a = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(z)
        c = Resize<mode = "nearest">(x, , twice) d = Resize<mode = "nearest">(z, , more)
        q = QuantizeLinear(f, s, u) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(q) e = DequantizeLinear(m, s, u)
        i = Cast<to = 6>(x) g = Resize<mode = "nearest">(i, , twice) }""",
        {},
    ),
    "padded with what is computed, and mirrored along early axes": (
        """(float[4, 3, 5] x, float v, int64[2, 3] i, int64 n) => (float[4, 4, 7] a, int64[2, 5] b, float[7, 3, 6] c, float[6, 4, 5] d)
        <int64[6] p = {0, 1, 0, 0, 0, 2}, int64[4] q = {0, 1, 0, 1}, int64[6] r = {2, 0, 0, 1, 0, 1}, int64[6] t = {1, 0, 0, 1, 1, 0}> {
        a = Pad(x, p, v) b = Pad(i, q, n) c = Pad<mode = "reflect">(x, r) d = Pad<mode = "edge">(x, t) }""",
        {},
    ),
    "integers of the caller's": (
        """(uint8[N, 4] x, int8[N, 4] z) => (float[N, 4] a, float[N, 4] b) <float s = {0.05}, uint8 u = {120}, int8 i = {-3}> {
        a = DequantizeLinear(x, s, u) b = DequantizeLinear(z, s, i) }""",
        {},
    ),
}  # fmt: skip


def _weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _model(name: str, opset: int = 21) -> ir.Model:
    text, shapes = CASES[name]
    return parse(
        HEAD % (24 if name in ("swish", "norms of newer opsets") else opset, text), **_weights(shapes)
    )


def _compare(model: ir.Model, folder, options=None, *, tolerance: float = 1e-5) -> None:
    from optkit.backends.coreml.lower import CoreMl, CoreMlOptions

    backend, options = CoreMl(), options or CoreMlOptions()
    legalize(model, backend, PHONE, name="model")
    backend.lower(model, PHONE, options, folder)
    reference = ReferenceSession(model, optimize=False)
    with backend.load(folder, PHONE, options) as session:
        for size in (3, 5):
            feeds = random_feeds(model, size=size, seed=size)
            found = session.run(feeds)
            for key, expected in reference.run(feeds).items():
                assert found[key].dtype == expected.dtype and found[key].shape == expected.shape, key
                np.testing.assert_allclose(found[key], expected, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_the_package_computes_what_onnx_runtime_does(name, tmp_path):
    _compare(_model(name), tmp_path)


def test_a_factor_and_an_offset_of_each_channel_are_no_norm_with_an_epsilon(tmp_path):
    """Two roundings are 1.2e-7; a root of 1 + 1e-5 below the factor is 5e-6."""
    model = parse(
        HEAD % (21, "(float[1, 4, 6, 5] x) => (float[1, 4, 6, 5] y) { p = Mul(x, s) y = Add(p, o) }"),
        **_weights({"s": (4, 1, 1), "o": (4, 1, 1)}),
    )
    _compare(model, tmp_path, tolerance=5e-7)


def test_small_integers_start_again_beyond_the_last(tmp_path):
    from optkit.backends.coreml.lower import CoreMl, CoreMlOptions

    operators = {"Add": "x, z", "Sub": "z, x", "Mul": "x, x", "Neg": "z", "Abs": "z"}
    inputs = ("uint8[4] x", "uint8[4] z", "int8[4] s", "int8[4] t")
    nodes, outputs = [], []
    for kind, (x, z) in (("uint8", "xz"), ("int8", "st")):
        for i, (op, read) in enumerate(operators.items()):
            if kind == "uint8" and read == "z":
                continue
            y = f"{x}{i}"
            nodes.append(f"{y} = {op}({read.translate(str.maketrans('xz', x + z))}) {y}f = Cast<to = 1>({y})")
            outputs.append(f"float[4] {y}f")
    model = parse(HEAD % (21, f"({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}"))
    feeds = {
        "x": np.array([200, 100, 255, 1], np.uint8), "z": np.array([1, 2, 3, 0], np.uint8),
        "s": np.array([-128, 100, 127, -3], np.int8), "t": np.array([-128, 127, 5, 1], np.int8),
    }  # fmt: skip
    CoreMl().lower(model, PHONE, CoreMlOptions(), tmp_path)
    with CoreMl().load(tmp_path, PHONE, CoreMlOptions()) as session:
        found = session.run(feeds)
    for key, expected in ReferenceSession(model, optimize=False).run(feeds).items():
        np.testing.assert_array_equal(found[key], expected, err_msg=key)


def test_casts_to_small_integers_start_again_beyond_the_last(tmp_path):
    """Read as floats inside of the package, where nothing narrows them any more."""
    from optkit.backends.coreml.lower import CoreMl, CoreMlOptions

    given = {
        "i": np.array([300, -1, 128, 70000], np.int64), "s": np.array([-128, -1, 0, 127], np.int8),
        "u": np.array([255, 128, 127, 0], np.uint8), "x": np.array([250.9, -3.9, 130.0, 0.5], np.float32),
    }  # fmt: skip
    casts = [(x, to) for x in given for to in (2, 3, 4, 5)]
    nodes = " ".join(f"{x}{to} = Cast<to = {to}>({x}) {x}{to}f = Cast<to = 1>({x}{to})" for x, to in casts)
    inputs = ", ".join(f"{v.dtype.name.replace('32', '')}[4] {k}" for k, v in given.items())
    outputs = ", ".join(f"float[4] {x}{to}f" for x, to in casts)
    model = parse(HEAD % (21, f"({inputs}) => ({outputs}) {{ {nodes} }}"))
    legalize(model, CoreMl(), PHONE, name="model")
    CoreMl().lower(model, PHONE, CoreMlOptions(), tmp_path)
    with CoreMl().load(tmp_path, PHONE, CoreMlOptions()) as session:
        found = session.run(given)
    kinds = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16}
    for x, to in casts:
        expected = given[x].astype(np.int64).astype(kinds[to])
        np.testing.assert_array_equal(found[f"{x}{to}f"], expected, err_msg=f"{x} to {kinds[to].__name__}")


def test_blocks_of_which_the_last_is_not_full_are_as_long_as_the_model_says(tmp_path):
    """Eighteen rows in blocks of 12 are 12 and 6, not twice 9."""
    random = np.random.default_rng(0)
    text = "(float[N, 18] x) => (float[N, 6] y) { d = DequantizeLinear<axis = 0, block_size = 12>(w, s, z) y = MatMul(x, d) }"
    model = parse(
        HEAD % (21, text),
        w=random.integers(-8, 8, (18, 6)).astype(np.int8),
        s=random.uniform(0.01, 0.2, (2, 6)).astype(np.float32),
        z=random.integers(-2, 2, (2, 6)).astype(np.int8),
    )
    _compare(model, tmp_path)


OLDEST = {
    "small integers": """(uint8[N, 3] x) => (float[M, 3] y) <uint8[1, 3] c = {3, 0, 5}> {
      a = Max(x, c) b = Concat<axis = 0>(a, c) d = Where(m, b, c) y = Cast<to = 1>(d) }""",
    "half": """(float16[5, 2, 3] x, float16[1, 2, 4] h) => (float16[5, 1, 2, 4] y, float16[1, 2, 4] z) {
      y, z = LSTM<hidden_size = 4>(x, w, r, , , h) }""",
    "spectra": """(float16[2, 64] x) => (float16[2, 4, 9, 2] y) <int64 s = {16}, int64 n = {16}> {
      y = STFT<onesided = 1>(x, s, , n) }""",
}  # fmt: skip


@pytest.mark.parametrize("name", OLDEST)
def test_ios_16_computes_the_same_with_the_types_that_it_has(name, tmp_path):
    from optkit.backends.coreml.lower import CoreMlOptions

    random = np.random.default_rng(0)
    given = {
        "w": random.normal(size=(1, 16, 3)).astype(np.float16), "r": random.normal(size=(1, 16, 4)).astype(np.float16),
        "m": np.array([True, False, True]),
    }  # fmt: skip
    model = parse(
        HEAD % (21, OLDEST[name]),
        **{k: v for k, v in given.items() if f"{k}," in OLDEST[name] or f"({k}," in OLDEST[name]},
    )
    _compare(model, tmp_path, CoreMlOptions(deployment="iOS16"), tolerance=4e-3)


HALVES = (
    "(float16[N, 4] x) => (float16[N, 4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
    "(float16[N, 4] x) => (float16[N, 3] y) { v = DequantizeLinear<axis = 0>(w, t) c = DequantizeLinear<axis = 0>(n, t) y = Gemm<transB = 1>(x, v, c) }",
    "(float16[1, 4, 3, 3] x) => (float16[] y) { v = DequantizeLinear<axis = 0>(k, t) y = Conv(x, v, b) }",
    "(int64[2] i) => (float16[2, 4] y) { v = DequantizeLinear<axis = 0>(w, t) y = Gather(v, i) }",
    "(float16[N, 4] x) => (float16[N, 3] y) { v = Gather(b, places) y = MatMul(x, v) }",
    "(float16[1, 3, 2, 2] x) => (float16[1, 3, 2, 2] y) { p = Mul(x, a) y = Add(p, a) }",
)


@pytest.mark.parametrize("graph", HALVES)
def test_a_model_in_half_precision_may_hold_compressed_weights_and_pairs(graph, tmp_path):
    whole = np.random.default_rng(0).integers(-127, 127, (3, 4)).astype(np.int8)
    given = {
        "w": whole, "k": whole.reshape(3, 4, 1, 1), "t": np.array([0.01, 0.02, 0.03], np.float16), "n": np.array([9, -8, 70], np.int32),
        "b": np.array([1, -2, 3], np.float16), "a": np.array([1, -2, 3], np.float16).reshape(3, 1, 1), "s": np.float16(0.05), "z": np.int8(3),
        "places": np.arange(12).reshape(4, 3) % 3,
    }  # fmt: skip
    model = parse(
        HEAD % (21, graph), **{k: v for k, v in given.items() if f"{k}," in graph or f"{k})" in graph}
    )
    # A few roundings to 11 bits.
    _compare(model, tmp_path, tolerance=4e-3)


def test_every_operator_of_the_emitters_is_compared():
    from optkit.backends.coreml.emit import ROWS

    compared = {node.op_type for name in CASES for node in walk(_model(name))}
    random = {f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")}
    assert set(ROWS) - compared == {"SimplifiedLayerNormalization"} | random


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("source", ["Like<%s>(x)", "<%s, shape = [3, 4096]>()"])
def test_random_numbers_have_the_distribution_that_is_asked_for(source, precision, tmp_path):
    """Within five standard errors of mean and deviation; others in each run, and the same where there is a seed."""
    from optkit.backends.coreml.lower import CoreMl, CoreMlOptions

    normal, uniform, seeded = (
        source % options for options in ("mean = 2.0, scale = 0.5", "low = -1.0, high = 3.0", "seed = 7.0")
    )
    text = f"""(float[N, 4096] x) => (float[] a, float[] b, float[] c) {{
      r = RandomNormal{normal} s = RandomUniform{uniform} t = RandomUniform{seeded} a = Add(x, r) b = Add(x, s) c = Add(x, t) }}"""
    model, backend, options = parse(HEAD % (21, text)), CoreMl(), CoreMlOptions(precision=precision)
    backend.lower(model, PHONE, options, tmp_path)
    feeds = {"x": np.zeros((3, 4096), np.float32)}
    with backend.load(tmp_path, PHONE, options) as session:
        one, other = session.run(feeds), session.run(feeds)
    count = feeds["x"].size
    for name, mean, deviation in (("a", 2, 0.5), ("b", 1, 4 / 12**0.5), ("c", 0.5, 1 / 12**0.5)):
        assert abs(one[name].mean() - mean) < 5 * deviation / count**0.5
        assert abs(one[name].std() - deviation) < 5 * deviation / count**0.5
    assert (one["a"] != other["a"]).any() and (one["b"] != other["b"]).any()
    np.testing.assert_array_equal(one["c"], other["c"])


def test_random_numbers_in_float64_are_refused():
    from optkit.backends.coreml.lower import CoreMl

    model = parse(HEAD % (21, "(float[2] x) => (double[2] y) { y = RandomNormalLike<dtype = 11>(x) }"))
    with pytest.raises(UnsupportedOpError, match="random numbers of type double"):
        legalize(model, CoreMl(), PHONE, name="model")


@pytest.mark.parametrize(
    "node", ["DequantizeLinear(k, s, z)", "DequantizeLinear(k, t, o)", "DequantizeLinear(q, t, o)"]
)
def test_a_scale_or_zero_point_of_each_run_is_refused(node):
    """Also where the integers are constant, which else would be computed with what is not known."""
    from optkit.backends.coreml.lower import CoreMl

    text = f"(float s, uint8 o, float[4] x) => (float[4] y) {{ q = QuantizeLinear(x, t, z) y = {node} }}"
    model = parse(
        HEAD % (21, text), k=np.array([0, 3, 128, 255], np.uint8), t=np.float32(0.5), z=np.uint8(128)
    )
    with pytest.raises(UnsupportedOpError, match="needs scales and zero points when it is compiled"):
        legalize(model, CoreMl(), PHONE, name="model")
