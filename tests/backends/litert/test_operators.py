"""Each operator as a .tflite file in LiteRT, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.legalize import legalize
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

pytestmark = pytest.mark.needs("ai_edge_litert")

HEAD = '<ir_version: 10, opset_import: ["" : %d]>\ng %s'
PHONE = target("android-cpu")

UNARY = (
    "Abs", "Ceil", "Cos", "Elu", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "LogSoftmax", "Neg", "Relu",
    "Round", "Sigmoid", "Sign", "Sin", "Softmax", "Tanh", "Dropout",
)  # fmt: skip
POSITIVE = ("Log", "Sqrt", "Reciprocal")
OPSETS = {"swish": 24, "norm by the root of squares": 24}


def _each(operators: tuple[str, ...], shape: str, of: str = "x", before: str = "") -> str:
    """A graph with an output for each operator of one input."""
    outputs = ", ".join(f"float[{shape}] y{i}" for i, _ in enumerate(operators))
    nodes = " ".join(f"y{i} = {op}({of})" for i, op in enumerate(operators))
    return f"(float[{shape}] x) => ({outputs}) <float small = {{0.25}}> {{ {before} {nodes} }}"


# Name -> graph, and the shapes of its weights. Every operator of the emitters is in one of them, see the last test.
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "steps of Scan, as many as there are rows": (
        """(float[N, 4, 2] x, float[4, 2] s) => (float[4, 2] e, float[N, 4, 2] y) {
        e, y = Scan<num_scan_inputs = 1, body = b (float[4, 2] p, float[4, 2] q) => (float[4, 2] n, float[4, 2] o) {
          n = Add(p, q) o = Tanh(n) }>(s, x) }""",
        {},
    ),
    "steps of Loop, as many as there are rows, and a branch by sizes": (
        """(float[N, 4] x) => (float[N, 4] y) <int64 zero = {0}, int64 one = {1}> {
        n = Shape<end = 1>(x) k = Squeeze(n) m = Add(k, one) c = Greater(k, zero)
        l = Loop(m, , x) <body = b (int64 i, bool g, float[N, 4] s) => (bool d, float[N, 4] t) { d = Identity(g) t = Sin(s) }>
        y = If(c) <then_branch = t () => (float[N, 4] a) { a = Neg(l) }, else_branch = e () => (float[N, 4] b) { b = Abs(l) }> }""",
        {},
    ),
    "unary": (_each(UNARY, "3, 7"), {}),
    "unary behind a convolution": (
        """(float[2, 3, 6, 5] x) => (float[] a, float[] b, float[] d, float[] e) {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = Relu(c) b = Sigmoid(c) d = Softmax<axis = 1>(c) e = HardSwish(c) }""",
        {"w": (4, 3, 1, 1)},
    ),
    "above zero": (_each(POSITIVE, "3, 7", "p", "a = Abs(x) p = Add(a, small)"), {}),
    "attributes": (
        """(float[3, 7] x) => (float[3, 7] a, float[3, 7] b, float[3, 7] c, float[3, 7] d) {
        a = LeakyRelu<alpha = 0.3>(x) b = HardSigmoid<alpha = 0.4, beta = 0.3>(x)
        c = Gelu<approximate = "tanh">(x) d = Softmax<axis = 0>(x) }""",
        {},
    ),
    "swish": ("(float[3, 4] x) => (float[3, 4] y, float[3, 4] z) { y = Swish(x) z = Swish<alpha = 1.7>(x) }", {}),
    "binary": (
        """(float[3, 4] x, float[4] z) => (float[3, 4] a, float[3, 4] b, float[3, 4] c, float[3, 4] d, float[3, 4] e, float[3, 4] f,
        float[3, 4] h) { a = Add(x, z) b = Sub(x, z) c = Mul(x, z) d = Div(x, z) e = Max(x, z, x) f = Min(x, z) p = Abs(x) h = Pow(p, z) }""",
        {},
    ),
    "binary of six axes that alternate": (
        """(float[2, 1, 3, 1, 2, 1] x, float[1, 2, 1, 3, 1, 2] z) => (float[] a, float[] b, bool[] c, float[] d) {
        a = Add(x, z) b = Max(x, z) c = Less(x, z) d = Where(c, x, z) }""",
        {},
    ),
    "binary behind a convolution": (
        """(float[1, 3, 6, 5] x, float[5] r) => (float[] a, float[] b, float[] d, float[] e, float[] f) {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = Add(c, v) b = Mul(c, u) d = Add(c, c) e = Sub(c, r) f = Mul(x, c) }""",
        {"w": (3, 3, 1, 1), "v": (3, 1, 1), "u": (1, 3, 1, 1)},
    ),
    "squeeze and excite": (
        """(float[1, 4, 6, 5] x) => (float[1, 4, 6, 5] y) { c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
        p = GlobalAveragePool(c) q = Conv<kernel_shape = [1, 1]>(p, u) r = HardSigmoid(q) y = Mul(c, r) }""",
        {"w": (4, 4, 3, 3), "u": (4, 4, 1, 1)},
    ),
    "many axes": (
        """(float[2, 3, 1, 2, 2, 3] x, float[2, 2, 1] z, float[2, 1, 1, 2, 2, 3] u, float[2, 3, 2, 2, 2, 3] w) =>
        (float[] a, float[] b, bool[] c, float[] d, bool[] e, float[] f, float[] g) {
        a = Add(x, z) b = Mul(x, w) c = Less(x, u) d = Where(c, x, u) h = Less(x, w) e = Xor(c, h) f = Max(x, z, u) g = Div(w, z) }""",
        {},
    ),
    "compared": (
        """(float[3, 4] x, float[4] z) => (bool[3, 4] a, bool[3, 4] b, bool[3, 4] c, bool[3, 4] d, bool[3, 4] e, bool[3, 4] f,
        bool[3, 4] g, bool[3, 4] h) { a = Greater(x, z) b = GreaterOrEqual(x, z) c = Less(x, z) d = LessOrEqual(x, z) e = Equal(x, x)
        f = And(a, b) g = Or(a, c) h = Not(a) }""",
        {},
    ),
    "chosen": (
        """(float[3, 4] x, bool[3, 4] c, int64[3, 4] i) => (float[3, 4] y, int64[3, 4] z) {
        s = Neg(x) y = Where(c, x, s) j = Add(i, i) z = Where(c, i, j) }""",
        {},
    ),
    "clipped": (
        """(float[3, 4] x) => (float[3, 4] a, float[3, 4] b, float[3, 4] c, float[3, 4] d)
        <float low = {-0.5}, float zero = {0}, float six = {6}, float high = {0.25}> {
        a = Clip(x, low, high) b = Clip(x, zero, six) c = Clip(x, zero) d = Clip(x, , high) }""",
        {},
    ),
    "activations of a convolution": (
        """(float[1, 3, 6, 5] x) => (float[] a, float[] b, float[] d) <float zero = {0}, float six = {6}, float one = {1}> {
        e = Conv<kernel_shape = [1, 1]>(x, w, v) a = Relu(e) f = Conv<kernel_shape = [1, 1]>(x, w, v) b = Clip(f, zero, six)
        g = Conv<kernel_shape = [1, 1]>(x, w, v) d = Clip(g, zero, one) }""",
        {"w": (4, 3, 1, 1), "v": (4,)},
    ),
    "slopes": (
        "(float[2, 4, 5, 3] x) => (float[2, 4, 5, 3] y, float[2, 4, 5, 3] z) { y = PRelu(x, w) z = PRelu(x, v) }",
        {"w": (4, 1, 1), "v": (1,)},
    ),
    "cast": (
        "(float[3, 4] x, int64[3] i) => (int32[3, 4] a, bool[3, 4] b, float[3] c) { a = Cast<to = 6>(x) b = Cast<to = 9>(x) c = Cast<to = 1>(i) }",
        {},
    ),
    "convolution": (
        """(float[2, 4, 9, 7] x) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
        a = Conv<kernel_shape = [3, 3], pads = [1, 0, 2, 1], strides = [2, 1]>(x, w, v)
        b = Conv<kernel_shape = [3, 3], dilations = [2, 1]>(x, w)
        c = Conv<kernel_shape = [3, 3], auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)
        d = Conv<kernel_shape = [3, 3], auto_pad = "SAME_LOWER", strides = [2, 2]>(x, w)
        e = Conv<kernel_shape = [3, 3], auto_pad = "VALID">(x, w) }""",
        {"w": (6, 4, 3, 3), "v": (6,)},
    ),
    "grouped convolution": (
        """(float[2, 4, 9, 20] x) => (float[] a, float[] b, float[] c) {
        a = Conv<kernel_shape = [3, 3], group = 2, pads = [1, 1, 1, 1]>(x, w)
        b = Conv<kernel_shape = [5, 5], group = 4, pads = [2, 2, 2, 2], strides = [2, 2]>(x, u)
        c = Conv<kernel_shape = [3, 3], group = 4, dilations = [2, 2]>(x, t) }""",
        {"w": (6, 2, 3, 3), "u": (8, 1, 5, 5), "t": (4, 1, 3, 3)},
    ),
    "convolution of a line": (
        """(float[2, 4, 9] x) => (float[] a, float[] b, float[] d, float[] e) {
        c = Conv<kernel_shape = [3], pads = [1, 1]>(x, w) a = Relu(c) f = Conv<kernel_shape = [3], group = 4, strides = [2]>(x, u)
        b = Tanh(f) d = MaxPool<kernel_shape = [3], strides = [2]>(c) e = GlobalAveragePool(c) }""",
        {"w": (6, 4, 3), "u": (4, 1, 3)},
    ),
    "transposed convolution": (
        """(float[1, 4, 5, 6] x, float[1, 4, 7] z) => (float[] a, float[] b, float[] c) {
        a = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 0, 1]>(x, w, v)
        b = ConvTranspose<kernel_shape = [2, 2], strides = [2, 2]>(x, u) c = ConvTranspose<kernel_shape = [3], strides = [2]>(z, t) }""",
        {"w": (4, 3, 3, 3), "v": (3,), "u": (4, 2, 2, 2), "t": (4, 2, 3)},
    ),
    "pools": (
        """(float[2, 3, 8, 9] x) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f) {
        a = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x) b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        c = AveragePool<kernel_shape = [2, 3], strides = [1, 2]>(x) d = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)
        e = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2], count_include_pad = 1>(x) f = GlobalMaxPool(x) }""",
        {},
    ),
    "averages beside padding": (
        """(float[2, 3, 8, 9] x, float[1, 4, 7] z) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
        a = AveragePool<kernel_shape = [2, 3], auto_pad = "SAME_LOWER">(x)
        b = AveragePool<kernel_shape = [2, 4], auto_pad = "SAME_LOWER", strides = [1, 2]>(x)
        c = AveragePool<kernel_shape = [3, 3], pads = [2, 0, 1, 1], strides = [2, 2]>(x)
        n = AveragePool<kernel_shape = [3, 3], pads = [2, 2, 0, 1]>(x) d = Relu(n)
        e = AveragePool<kernel_shape = [3], pads = [0, 2], strides = [2]>(z) }""",
        {},
    ),
    "pools with sizes rounded up": (
        """(float[2, 3, 8, 9] x, float[1, 4, 8] z) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f) {
        a = MaxPool<kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1>(x)
        b = AveragePool<kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1>(x)
        c = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [3, 2], ceil_mode = 1, count_include_pad = 1>(x)
        d = AveragePool<kernel_shape = [3, 2], pads = [1, 0, 0, 1], strides = [2, 2], ceil_mode = 1>(x)
        e = MaxPool<kernel_shape = [1, 1], strides = [2, 2], pads = [0, 0, 0, 0], ceil_mode = 1>(x)
        f = MaxPool<kernel_shape = [3], strides = [2], ceil_mode = 1>(z) }""",
        {},
    ),
    "looked up": (
        """(float[3, 3, 4] x, int64[2, 2, 4] i, int64[2, 5, 2] j) => (float[] a, float[] b, float[] c, float[] d, int64[] e)
        <int64[1, 2] last = {-1, -2}, int64 one = {1}> {
        a = GatherElements<axis = 1>(x, i) n = Neg(i) b = GatherElements<axis = -2>(x, n) m = Neg(j) k = Sub(m, one) c = GatherND(x, k)
        d = GatherND(x, last) e = GatherElements<axis = 2>(i, i) }""",
        {},
    ),
    "written": (
        """(float[3, 4, 5] x, float[2, 4, 5] u, float[2, 2, 5] v, int64[3, 4] i, int64[2, 4, 5] places) => (float[] a, float[] b, float[] c, float[] d, int64[] e)
        <int64[2, 1] rows = {2, -3}, int64[2, 2, 2] spots = {0, 1, 2, 3, 1, 1, -1, 0}, int64[2, 2, 2] twice = {0, 1, 0, 1, 1, 1, 0, 0},
        int64[1, 4] at = {2, 0, -1, 1}, int64[1, 4] nines = {9, 8, 7, 6}> {
        a = ScatterND(x, rows, u) b = ScatterND(x, spots, v) c = ScatterND<reduction = "add">(x, twice, v)
        d = ScatterElements<axis = 1, reduction = "add">(x, places, u)
        e = ScatterElements<axis = 0>(i, at, nines) }""",
        {},
    ),
    "largest of a line": (
        """(float[3, 6, 4] x, int64[3, 6, 4] i) => (float[] a, int64[] b, float[] c, int64[] d, float[] e, int64[] g, int64[] h) <int64[1] k = {3}, int64[1] one = {1}> {
        a, b = TopK(x, k) c, d = TopK<axis = 1, largest = 0>(x, k) e, f = TopK<axis = 0>(x, one)
        g, h = TopK<axis = 1, largest = 0>(i, k) }""",
        {},
    ),
    "one of many": (
        """(int64[2, 3] i) => (float[] a, int64[] b) <int64 n = {5}, float[2] v = {-1.5, 2.5}, int64[2] w = {0, 7}> {
        s = Neg(i) a = OneHot(s, n, v) b = OneHot<axis = 1>(i, n, w) }""",
        {},
    ),
    "triangles": (
        """(float[2, 1, 4, 5] x, int64[3, 3] i) => (float[] a, float[] b, int64[] c) <int64 one = {1}, int64 low = {-2}> {
        a = Trilu(x) b = Trilu<upper = 0>(x, one) c = Trilu(i, low) }""",
        {},
    ),
    "angles": (
        """(float[3, 50] x) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f) <float most = {0.999}, float few = {0.001}> {
        s = Sin(x) t = Mul(s, most) a = Asin(t) b = Acos(t) c = Atan(x) d = Tan(t) u = Mul(x, few) g = Concat<axis = 0>(x, u)
        e = Sinh(g) f = Cosh(x) }""",
        {},
    ),
    "not numbers": (
        """(float[3, 4] x) => (bool[] a, bool[] b, bool[] c, bool[] d, bool[] e) <float zero = {0}> {
        p = Relu(x) q = Neg(p) r = Div(q, zero) a = IsNaN(r) b = IsInf(r) c = IsInf<detect_negative = 0>(r) d = IsInf<detect_positive = 0>(r)
        e = Xor(a, b) }""",
        {},
    ),
    "integers divided": (
        """(int32[3, 4] x, int64[3, 4] z, uint8[3, 4] w) => (int32[] a, int32[] b, int64[] c, float[] d) <int32 two = {2}, int64 less = {-3}, uint8 bytes = {2}> {
        f = Add(x, x) g = Add(f, x) n = Neg(g) a = Div(n, two) b = Mod(n, two) m = Mul(z, less) o = Add(m, less) c = Mod(o, less)
        v = Div(w, bytes) d = Cast<to = 1>(v) }""",
        {},
    ),
    "pads of chosen axes and repeated elements": (
        """(float[1, 2, 3, 4] x, int64[2, 3] i) => (float[] a, float[] b, float[] c, float[] d, float[] e, int64[] f)
        <int64[2] ends = {1, 2}, int64[1] last = {-1}, int64[8] all = {0, 1, 1, 2, 0, 0, 2, 3}, int64[4] wide = {0, 5, 1, 4}, float fill = {2.5}> {
        a = Pad(x, ends, fill, last) b = Pad<mode = "edge">(x, all) c = Pad<mode = "wrap">(x, all) d = Pad<mode = "edge">(x, ends, , last)
        g = Conv<kernel_shape = [1, 1]>(x, w) e = Pad<mode = "reflect">(g, ends, , last) f = Pad<mode = "wrap">(i, wide) }""",
        {"w": (2, 2, 1, 1)},
    ),
    "transposed convolutions of other sizes": (
        """(float[1, 4, 5, 6] x, float[1, 4, 7] z) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f, float[] g) {
        a = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]>(x, w, v)
        b = ConvTranspose<kernel_shape = [3, 3], group = 2, strides = [2, 1]>(x, w, u) c = ConvTranspose<kernel_shape = [3, 3], dilations = [2, 1]>(x, w)
        d = ConvTranspose<kernel_shape = [3, 3], strides = [2, 3], auto_pad = "SAME_UPPER">(x, w)
        e = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_LOWER">(x, w)
        f = ConvTranspose<kernel_shape = [3], strides = [3], output_padding = [2], pads = [0, 1]>(z, t, v)
        g = ConvTranspose<kernel_shape = [3, 3], strides = [3, 3], output_shape = [14, 18]>(x, w) }""",
        {"w": (4, 3, 3, 3), "v": (3,), "u": (6,), "t": (4, 3, 3)},
    ),
    "gated cells": (
        """(float[4, 2, 3] x, float[2, 2, 5] h) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f) {
        a, b = GRU<hidden_size = 5, direction = "bidirectional">(x, w, r, o, , h) c, d = GRU<hidden_size = 5, linear_before_reset = 1, direction = "bidirectional">(x, w, r, o)
        e, f = GRU<hidden_size = 5, direction = "reverse", activations = ["Sigmoid", "Relu"]>(x, v, s) }""",
        {"w": (2, 15, 3), "r": (2, 15, 5), "o": (2, 30), "v": (1, 15, 3), "s": (1, 15, 5)},
    ),
    "factors of products": (
        """(float[3, 4] x, float[5, 4] m, float[3, 5] z) => (float[] a, float[] b, float[] c) {
        a = Gemm<alpha = 0.5, beta = -2.0>(x, w, v) b = Gemm<transB = 1, beta = 3.0>(x, m, v) c = Gemm<transA = 1, alpha = 0.25>(x, z) }""",
        {"w": (4, 5), "v": (5,)},
    ),
    "plain cells": (
        """(float[4, 2, 3] x, float[1, 2, 5] h) => (float[] a, float[] b, float[] c) {
        a, b = RNN<hidden_size = 5>(x, v, s, o, , h) c = RNN<hidden_size = 5, direction = "bidirectional", activations = ["Relu", "Tanh"]>(x, w, r) }""",
        {"w": (2, 5, 3), "r": (2, 5, 5), "o": (1, 10), "v": (1, 5, 3), "s": (1, 5, 5)},
    ),
    "norms of instances of other ranks": (
        """(float[2, 3, 7] x, float[2, 3, 2, 3, 2] z) => (float[] a, float[] b) {
        a = InstanceNormalization(x, w, v) b = InstanceNormalization<epsilon = 0.01>(z, w, v) }""",
        {"w": (3,), "v": (3,)},
    ),
    "products": (
        """(float[2, 3, 4] x, float[2, 4, 5] z, float[3, 4] s) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
        a = MatMul(x, z) b = MatMul(x, w) c = MatMul(s, w) d = MatMul(x, u) e = MatMul(s, z) }""",
        {"w": (4, 6), "u": (2, 4, 3)},
    ),
    "linear layers": (
        """(float[3, 4] x, float[4, 3] t, float[5, 4] m, float[5] n) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
        a = Gemm<transB = 1>(x, w, v) b = Gemm(x, u) c = Gemm<transA = 1>(t, u) r = Gemm<transB = 1>(x, w, v) d = Relu(r)
        e = Gemm<transB = 1>(x, m, n) }""",
        {"w": (5, 4), "v": (5,), "u": (4, 2)},
    ),
    "biases that are no row": (
        """(float[4, 3] x, float[4, 5] m, float[1] o, float[4, 1] p) => (float[] a, float[] b, float[] c, float[] d, float[] e) {
        a = Gemm(x, w, u) b = Gemm(x, w, m) c = Gemm(x, w, o) n = Gemm(x, w, v) d = Relu(n) e = Gemm(x, t, p) }""",
        {"w": (3, 5), "u": (4, 5), "v": (4, 1), "t": (3, 4)},
    ),
    "norms": (
        """(float[2, 3, 8] x, float[2, 4, 5, 3] p) => (float[] a, float[] b, float[] c) {
        a = LayerNormalization(x, s, t) b = LayerNormalization<axis = 1, epsilon = 0.1>(x, s2) c = InstanceNormalization(p, u, v) }""",
        {"s": (8,), "t": (8,), "s2": (3, 8), "u": (4,), "v": (4,)},
    ),
    "norm by the root of squares": ("(float[2, 3, 8] x) => (float[2, 3, 8] y) { y = RMSNormalization(x, s) }", {"s": (8,)}),
    "batch norms": (
        """(float[2, 3, 4, 5] x, float[6, 3] z) => (float[] a, float[] b) {
        p = Abs(v) a = BatchNormalization(x, s, t, m, p) b = BatchNormalization(z, s, t, m, p) }""",
        {"s": (3,), "t": (3,), "m": (3,), "v": (3,)},
    ),
    "shapes": (
        """(float[2, 3, 4] x) => (float[] a, float[] b, float[] c, float[] d, float[] e)
        <int64[2] to = {0, -1}, int64[1] first = {0}, int64[3] wide = {2, 3, 4}, int64[3] times = {1, 2, 1}> {
        a = Reshape(x, to) b = Flatten<axis = 2>(x) u = Unsqueeze(x, first) c = Squeeze(u, first) s = ReduceSum(x, first)
        d = Expand(s, wide) e = Tile(x, times) }""",
        {},
    ),
    "flattened behind a convolution": (
        """(float[1, 3, 6, 5] x) => (float[] a, float[] b, float[] d) <int64[2] to = {1, -1}> {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = Reshape(c, to) p = GlobalAveragePool(c) b = Flatten(p) d = Transpose<perm = [0, 2, 3, 1]>(c) }""",
        {"w": (4, 3, 1, 1)},
    ),
    "moved": (
        """(float[2, 3, 4, 5] x) => (float[] a, float[] b, float[] d, float[] e, float[] f) <int64[2] n = {1, 3}> {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = Transpose(x) b = Concat<axis = 1>(c, c) d = Concat<axis = -1>(x, x)
        e, f = Split<axis = 1>(c, n) }""",
        {"w": (4, 3, 1, 1)},
    ),
    "cut": (
        """(float[2, 4, 6, 5] x) => (float[] a, float[] b, float[] d, float[] e)
        <int64[1] one = {1}, int64[1] three = {3}, int64[1] end = {9223372036854775807}, int64[1] axis = {-3}, int64[1] back = {-1},
        int64[1] start = {-9223372036854775808}, int64[1] two = {2}> {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = Slice(x, one, three, axis) b = Slice(c, one, end, axis, two)
        d = Slice(x, back, start, axis, back) e = Slice(c, one, three, two) }""",
        {"w": (4, 4, 1, 1)},
    ),
    "padded": (
        """(float[1, 3, 5, 6] x) => (float[] a, float[] b, float[] d) <int64[8] p = {0, 0, 1, 2, 0, 1, 0, 3}, float v = {1.5},
        int64[8] r = {0, 0, 1, 2, 0, 0, 2, 1}> {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = Pad(x, p) b = Pad(c, p, v) d = Pad<mode = "reflect">(c, r) }""",
        {"w": (4, 3, 1, 1)},
    ),
    "gathered": (
        """(float[5, 4] x) => (float[] a, float[] b, float[] c, float[] d) <int64[2] behind = {-1, 0}, int64 last = {-1}> {
        a = Gather<axis = 1>(x, behind) b = Gather(x, last) f = Abs(x) g = Floor(f) h = Cast<to = 7>(g) two = Cast<to = 7>(last)
        i = Min(h, j) c = Gather(w, i) k = Sub(i, four) d = Gather(w, k) }""".replace(
            "int64 last = {-1}", "int64 last = {-1}, int64 j = {2}, int64 four = {3}"
        ),
        {"w": (7, 5)},
    ),
    "resized to what it was, and to places that are whole": (
        """(float[1, 2, 3, 5] x) => (float[1, 2, 3, 5] a, float[1, 2, 3, 5] b, float[1, 2, 11, 3] c)
        <float[4] f = {1, 1, 1.2, 1.1}, int64[4] t = {1, 2, 11, 3}> {
        a = Resize<mode = "nearest", nearest_mode = "floor">(x, , f) b = Resize<mode = "linear">(x, , f)
        c = Resize<mode = "nearest", coordinate_transformation_mode = "half_pixel_symmetric", nearest_mode = "floor">(x, , , t) }""",
        {},
    ),
    "resized": (
        """(float[1, 3, 4, 5] x) => (float[] a, float[] b, float[] c, float[] d, float[] e)
        <float[4] f = {1, 1, 2, 3}, float[4] g = {1, 1, 1.5, 0.8}> {
        a = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(x, , f)
        b = Resize<mode = "nearest">(x, , f) c = Resize<mode = "linear">(x, , f)
        d = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">(x, , f)
        e = Resize<mode = "linear", coordinate_transformation_mode = "asymmetric">(x, , f) }""",
        {},
    ),
    "resized by fractions": (
        """(float[1, 3, 5, 4] x, float[1, 1, 8, 8] z) => (float[] a, float[] b, float[] c, float[] d, float[] e, float[] f, float[] h)
        <float[4] up = {1, 1, 2.5, 1.3}, float[4] down = {1, 1, 0.6, 0.6}, int64[4] line = {1, 1, 3, 1}, int64[4] third = {1, 1, 3, 3}> {
        a = Resize<mode = "linear">(x, , up) b = Resize<mode = "linear", coordinate_transformation_mode = "asymmetric">(x, , down)
        c = Resize<mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel">(z, , , line)
        d = Resize<mode = "linear", antialias = 1>(z, , , third) e = Resize<mode = "linear", antialias = 1>(x, , down)
        f = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">(z, , , third)
        h = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric">(x, , down) }""",
        {},
    ),
    "resized by cubes and indices": (
        """(float[1, 3, 5, 4] x, int32[1, 2, 4, 4] i) => (float[] a, float[] b, float[] c, float[] d, int32[] e, float[] f, float[] h)
        <float[4] up = {1, 1, 2, 1.75}, float[2] rows = {1.5, 1}, int64[4] less = {1, 3, 2, 3}, float[4] twice = {1, 1, 2, 2}> {
        a = Resize<mode = "cubic">(x, , up) b = Resize<mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = 1>(x, , up)
        c = Resize<mode = "linear", axes = [2, 3]>(x, , rows) d = Resize<mode = "nearest">(x, , , less)
        e = Resize<mode = "nearest", nearest_mode = "ceil", coordinate_transformation_mode = "asymmetric">(i, , twice)
        f = Resize<mode = "nearest", nearest_mode = "floor">(x, , twice) h = Resize<mode = "nearest", axes = [1]>(x, , one) }""".replace(
            "float[2] rows", "float[1] one = {2}, float[2] rows"
        ),
        {},
    ),
    "resized within bounds": (
        """(float[1, 2, 4, 6] x) => (float[] a, float[] b, float[] c) <int64[4] s = {1, 2, 7, 8}, int64[2] t = {9, 7}> {
        a = Resize<mode = "linear", keep_aspect_ratio_policy = "not_larger", axes = [2, 3]>(x, , , t)
        b = Resize<mode = "nearest", keep_aspect_ratio_policy = "not_smaller", axes = [2, 3]>(x, , , t)
        c = Resize<mode = "cubic", keep_aspect_ratio_policy = "stretch">(x, , , s) }""",
        {},
    ),
    "powers": (
        """(float[3, 4] x, int32[4] i) => (float[3, 4] a, float[3, 4] b, int32[4] c) <int64 k = {3}, int32[4] q = {0, 1, 2, 3}> {
        a = Pow(x, k) b = Pow(x, q) c = Pow(i, q) }""",
        {},
    ),
    "masks of nothing dropped": (
        "(float[3, 4] x) => (float[3, 4] y, bool[3, 4] m, float[3, 4] z) <float r = {0}, bool t = {1}> { y, m = Dropout(x) z = Dropout(x, r, t) }",
        {},
    ),
    "blocks": (
        """(float[1, 8, 4, 6] x) => (float[] a, float[] b, float[] c) {
        a = DepthToSpace<blocksize = 2>(x) b = SpaceToDepth<blocksize = 2>(x) c = DepthToSpace<blocksize = 2, mode = "CRD">(x) }""",
        {},
    ),
    "reduced": (
        """(float[2, 3, 4, 5] x) => (float[] a, float[] b, float[] d, float[] e, float[] f, float[] g, float[] h)
        <int64[2] hw = {2, -1}, int64[1] one = {1}> {
        c = Conv<kernel_shape = [1, 1]>(x, w) a = ReduceMean(c, hw) b = ReduceMean<keepdims = 0>(c, hw) d = ReduceSum<keepdims = 0>(c, one)
        e = ReduceMax(x, one) f = ReduceMin<keepdims = 0>(x) g = ReduceProd(x, one) h = ReduceL2(x, hw) }""",
        {"w": (4, 3, 1, 1)},
    ),
    "largest": (
        """(float[3, 4, 5] x, int64[3, 4] i) => (int64[] a, int64[] b, float[3, 4, 5] c, int64[3, 4] d) <int64 two = {2}, int64 one = {1}> {
        a = ArgMax<axis = 1>(x) b = ArgMin<axis = 2, keepdims = 0>(x) c = CumSum(x, two) d = CumSum<reverse = 1>(i, one) }""",
        {},
    ),
    "lstm": (
        """(float[5, 2, 3] x, float[2, 2, 4] h0, float[2, 2, 4] c0) => (float[] y, float[] h, float[] c, float[] z, float[] r) {
        y, h, c = LSTM<hidden_size = 4, direction = "bidirectional">(x, w, again, offsets, , h0, c0)
        z, zh, zc = LSTM<hidden_size = 4>(x, w1, again1)
        r, rh, rc = LSTM<hidden_size = 4, direction = "reverse">(x, w1, again1) }""",
        {"w": (2, 16, 3), "again": (2, 16, 4), "offsets": (2, 32), "w1": (1, 16, 3), "again1": (1, 16, 4)},
    ),
    "one step of an lstm": (
        "(float[1, 1, 3] x) => (float[] y, float[] h) { y, h = LSTM<hidden_size = 4>(x, w, again) }",
        {"w": (1, 16, 3), "again": (1, 16, 4)},
    ),
    "largest and smallest": (
        """(float[2, 3, 5] x, int64[6, 2] i) => (float[2, 3, 2] v, int64[2, 3, 2] p, float[2, 2, 5] s, int64[2, 2, 5] q, int64[3, 2] w, int64[3, 2] r)
        <int64[1] two = {2}, int64[1] three = {3}> {
        t = Round(x) v, p = TopK(t, two) s, q = TopK<axis = 1, largest = 0>(t, two) w, r = TopK<axis = 0>(i, three) }""",
        {},
    ),
    "shuffled pixels": (
        """(float[2, 12, 3, 5] x) => (float[] a, float[] b) {
        a = DepthToSpace<blocksize = 2, mode = "CRD">(x) c = Conv(x, w) d = DepthToSpace<blocksize = 2, mode = "CRD">(c) b = Relu(d) }""",
        {"w": (8, 12, 1, 1)},
    ),
    "norms of groups and volumes": (
        """(float[2, 3, 20] x, float[1, 3, 4, 2, 5] v, float[3] t) => (float[] a, float[] b, float[] c) {
        a = InstanceNormalization(x, s, o) b = InstanceNormalization<epsilon = 0.01>(v, s, o) c = InstanceNormalization(x, t, o) }""",
        {"s": (3,), "o": (3,)},
    ),
    "resized as TensorFlow once did": (
        """(float[1, 2, 3, 4] x) => (float[] y) <float[4] f = {1, 1, 2, 1.5}> {
        y = Resize<mode = "nearest", coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "floor">(x, , f) }""",
        {},
    ),
    "integers of a grid as outputs": (
        """(float[3, 4] x, float[1, 3, 6, 5] p) => (uint8[3, 4] a, int8[3, 4] b, int8[4, 3] c, int32[3, 4] d, float[3, 4] e, uint8[] f)
        <float s = {0.05}, int8 z = {3}, uint8 u = {120}> {
        a = QuantizeLinear(x, s, u) b = QuantizeLinear(x, s, z) c = Transpose(b) d = Cast<to = 6>(a) e = DequantizeLinear(a, s, u)
        q = QuantizeLinear(p, s, u) f = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(q) }""",
        {},
    ),
    "quantized": (
        """(float[3, 4] x) => (float[3, 4] a, float[3, 4] b)
        <float s = {0.05}, int8 z = {3}, uint8 u = {120}> {
        q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) p = QuantizeLinear(x, s, u) b = DequantizeLinear(p, s, u) }""",
        {},
    ),
}  # fmt: skip


def _weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _model(name: str) -> ir.Model:
    text, shapes = CASES[name]
    return parse(HEAD % (OPSETS.get(name, 21), text), **_weights(shapes))


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_onnx_runtime_does(name, tmp_path):
    from optkit.backends.litert.lower import LiteRt, LiteRtOptions

    model, backend = _model(name), LiteRt()
    options = LiteRtOptions(shapes={"N": 3} if "[N" in CASES[name][0] else {})
    legalize(model, backend, PHONE, name="model")
    backend.lower(model, PHONE, options, tmp_path)
    reference = ReferenceSession(model, optimize=False)
    with backend.load(tmp_path, PHONE, options, threads=1) as session:
        for seed in (1, 2):
            feeds = random_feeds(model, seed=seed)
            found = session.run(feeds)
            for key, expected in reference.run(feeds).items():
                assert found[key].dtype == expected.dtype and found[key].shape == expected.shape, key
                np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_values_of_unknown_rank_are_no_mistake_of_ours(name):
    """As in what a branch gives that stays; the answer to whether LiteRT has a node is a reason or none."""
    from optkit.backends.litert.emit import ROWS

    model = _model(name)
    for value in {v for node in walk(model) for v in (*node.inputs, *node.outputs) if v is not None}:
        if not value.is_initializer():
            value.shape = None
    for node in walk(model):
        if (row := ROWS.get(node.op_type)) is not None and row.refuse is not None:
            assert row.refuse(node) is None or row.refuse(node)


def test_every_operator_of_the_emitters_is_compared():
    from optkit.backends.litert.emit import ROWS

    compared = {node.op_type for name in CASES for node in walk(_model(name))}
    random = {f"Random{kind}{like}" for kind in ("Normal", "Uniform") for like in ("", "Like")}
    assert set(ROWS) - compared == random


@pytest.mark.parametrize("source", ["Like<%s>(x)", "<%s, shape = [3, 4096]>()", "Like<%s>(z)"])
def test_random_numbers_have_the_distribution_that_is_asked_for(source, tmp_path):
    """Within five standard errors of mean and deviation; others in each run, also where their shape alone is known."""
    from optkit.backends.litert.lower import LiteRt, LiteRtOptions

    normal, uniform, seeded = (
        source % options for options in ("mean = 2.0, scale = 0.5", "low = -1.0, high = 3.0", "seed = 7.0")
    )
    text = f"""(float[N, 4096] x) => (float[] a, float[] b, float[] c) {{
      s = Shape(x) z = ConstantOfShape(s)
      r = RandomNormal{normal} u = RandomUniform{uniform} t = RandomUniform{seeded} a = Add(x, r) b = Add(x, u) c = Add(x, t) }}"""
    model, backend, options = parse(HEAD % (21, text)), LiteRt(), LiteRtOptions(shapes={"N": 3})
    legalize(model, backend, PHONE, name="model")
    backend.lower(model, PHONE, options, tmp_path)
    feeds = {"x": np.zeros((3, 4096), np.float32)}
    with backend.load(tmp_path, PHONE, options, threads=1) as session:
        one, other = session.run(feeds), session.run(feeds)
    with backend.load(tmp_path, PHONE, options, threads=1) as session:
        again = session.run(feeds)
    count = feeds["x"].size
    for name, mean, deviation in (("a", 2, 0.5), ("b", 1, 4 / 12**0.5), ("c", 0.5, 1 / 12**0.5)):
        assert abs(one[name].mean() - mean) < 5 * deviation / count**0.5
        assert abs(one[name].std() - deviation) < 5 * deviation / count**0.5
    assert (one["a"] != other["a"]).any() and (one["b"] != other["b"]).any()
    np.testing.assert_array_equal(one["c"], again["c"])
    assert (one["a"] != again["a"]).any()
