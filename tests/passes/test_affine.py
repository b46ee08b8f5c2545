from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.fusion.affine import FoldAffine
from optkit.targets import target
from optkit.testing import check_pass, parse, same_numbers

RANDOM = np.random.default_rng(1)
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


ANGLE = """
g (float[N, 3, 4] x) => (float[N, 3, 6] y) <float s = {%s}, float one = {1}, float[6] v = {1, 2, 3, 4, 5, 6}> { %s }
"""


@pytest.mark.parametrize(
    ("factor", "body", "ops"),
    [
        (
            "6.2831855",
            "a = MatMul(x, w) z = Mul(a, s) b = Sin(z) c = Cos(z) y = Add(b, c)",
            ["MatMul", "Mul", "Sin", "Cos", "Add"],
        ),
        ("0.1", "a = MatMul(x, w) p = Mul(a, s) z = Add(p, one) y = Sin(z)", ["MatMul", "Mul", "Add", "Sin"]),
        # Rounds nothing.
        ("-0.25", "a = MatMul(x, w) z = Mul(a, s) y = Cos(z)", ["MatMul", "Cos"]),
        # Somebody else reads it, or is all that does.
        ("6.2831855", "a = MatMul(x, w) z = Mul(a, s) b = Sin(z) y = Add(b, z)", ["MatMul", "Sin", "Add"]),
        ("6.2831855", "a = MatMul(x, w) y = Mul(a, s)", ["MatMul"]),
        ("6.2831855", "a = MatMul(x, w) z = Mul(a, s) y = Tanh(z)", ["MatMul", "Tanh"]),
    ],
)
def test_factors_of_what_sines_are_taken_of_stay_unless_they_are_powers_of_two(factor, body, ops):
    check_pass(
        FoldAffine(), parse(HEADER + ANGLE % (factor, body), w=floats(4, 6)), ops=ops, rtol=1e-4, atol=1e-5
    )


CONV = """
g (float[N, 6, 9, 9] x) => (float[A, B, C, D] y) <float s = {0.5}, float[1] t = {-1.5}> { %s y = Relu(z) }
"""


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = Conv<pads = [1, 1, 1, 1]>(x, w, b) z = Mul(a, s)", ["Conv"]),
        ("a = Conv<pads = [1, 1, 1, 1]>(x, w) c = Mul(s, a) z = Add(c, t)", ["Conv"]),
        ("a = Conv(x, w) c = Add(a, v) z = Div(c, s)", ["Conv"]),
        ("a = Conv(x, w, b) c = Sub(t, a) z = Mul(c, v)", ["Conv"]),
        ("a = Conv(x, w, b) z = Neg(a)", ["Conv"]),
        ("c = Mul(x, u) d = Add(c, t) z = Conv(d, w, b)", ["Conv"]),
        ("c = Add(x, t) z = Conv<strides = [2, 2]>(c, w)", ["Conv"]),
        ("c = Mul(x, s) z = Conv<pads = [1, 1, 1, 1]>(c, w)", ["Conv"]),
        # Zeros are padded to what the shift gives, so the shift stays.
        ("c = Add(x, t) z = Conv<pads = [1, 1, 1, 1]>(c, w)", ["Add", "Conv"]),
        ('c = Add(x, t) z = Conv<auto_pad = "SAME_UPPER">(c, w)', ["Add", "Conv"]),
        ("c = Mul(x, s) d = Add(c, t) z = Conv<pads = [1, 1, 1, 1]>(d, w)", ["Add", "Conv"]),
        ("c = Mul(x, s) z = ConvTranspose(c, wt)", ["ConvTranspose"]),
        ("c = Add(x, t) z = ConvTranspose(c, wt)", ["Add", "ConvTranspose"]),
        # One reader cannot take it in, so nobody does.
        ("c = Mul(x, s) d = Conv(c, w1) e = Exp(c) z = Add(d, e)", ["Mul", "Conv", "Exp", "Add"]),
        ("c = Mul(x, s) d = Conv(c, w1) e = Conv(c, w1) z = Add(d, e)", ["Conv", "Conv", "Add"]),
        ("a = Conv(x, w1) c = Mul(a, s) d = Exp(a) z = Add(c, d)", ["Conv", "Mul", "Exp", "Add"]),
        # Constants that vary over the image are none of the layer's.
        ("a = Conv(x, w1) z = Mul(a, image)", ["Conv", "Mul"]),
        ("a = Conv(x, w1) c = Mul(a, s) z = Add(c, image)", ["Conv", "Add"]),
        # Channels that lie elsewhere.
        ("a = Conv(x, w1) d = Transpose<perm = [0, 2, 3, 1]>(a) z = Mul(d, six)", ["Conv", "Transpose"]),
        (
            "a = Conv(x, w1) d = Transpose<perm = [0, 2, 3, 1]>(a) c = Mul(d, six) z = Add(c, six)",
            ["Conv", "Transpose"],
        ),
        (
            "a = Conv(x, w1) d = Transpose<perm = [0, 2, 3, 1]>(a) z = Mul(d, tall)",
            ["Conv", "Transpose", "Mul"],
        ),
        (
            "c = Transpose<perm = [0, 2, 3, 1]>(x) d = Mul(c, six) e = Transpose<perm = [0, 3, 1, 2]>(d) z = Conv(e, w)",
            ["Transpose", "Transpose", "Conv"],
        ),
        # A different number on each row widens nothing but is not one for each channel either.
        ("a = Conv(x, w1) z = Mul(a, row)", ["Conv", "Mul"]),
    ],
)
def test_next_to_convolutions(body, ops):
    source = parse(
        HEADER + CONV % body,
        w=floats(8, 6, 3, 3),
        w1=floats(6, 6, 1, 1),
        wt=floats(6, 8, 3, 3),
        b=floats(8),
        u=floats(6, 1, 1),
        six=floats(6),
        tall=floats(9, 1),
        v=floats(1, 8, 1, 1),
        image=floats(9, 9),
        row=floats(1, 9),
    )
    # Sums of up to 54 products of values around 1: 54 roundings of 6e-8 of a sum of about 10.
    check_pass(FoldAffine(), source, ops=[*ops, "Relu"], atol=1e-4)


LINEAR = """
g (float[N, 5, 6] x) => (float[A, B, C] y) <float s = {0.125}, float t = {0.25}> { %s y = Relu(z) }
"""


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = MatMul(x, w) z = Mul(a, s)", ["MatMul"]),
        ("a = MatMul(x, w) c = Add(a, b) z = Mul(c, s)", ["MatMul", "Add"]),
        ("a = MatMul(x, w) z = Add(a, b)", ["MatMul", "Add"]),
        ("c = Div(x, u) z = MatMul(c, w)", ["MatMul"]),
        ("c = Add(x, u) z = MatMul(c, w)", ["Add", "MatMul"]),
        ("c = Mul(x, s) d = Add(c, u) z = MatMul(d, w)", ["Add", "MatMul"]),
        ("a = LayerNormalization(x, g, u) c = Mul(a, u) z = Add(c, t)", ["LayerNormalization"]),
        ("c = Mul(x, s) d = Mul(c, u) e = Add(d, t) z = Add(e, u)", ["Mul", "Add"]),
        ("c = Add(x, t) d = Sub(c, u) z = Neg(d)", ["Mul", "Add"]),
        ("c = Mul(x, s) z = Add(c, t)", ["Mul", "Add"]),
        ("c = Sub(t, x) z = Sub(t, c)", []),
    ],
)
def test_next_to_linear_layers_and_alone(body, ops):
    source = parse(HEADER + LINEAR % body, w=floats(6, 4), b=floats(4), u=floats(6), g=floats(6))
    check_pass(FoldAffine(), source, ops=[*ops, "Relu"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = Gemm(x, w, b) z = Mul(a, s)", ["Gemm"]),
        ("a = Gemm<alpha = 0.5, beta = 2.0>(x, w, b) c = Mul(a, b) z = Add(c, s)", ["Gemm"]),
        ("a = Gemm<transB = 1>(x, wt) z = Add(a, b)", ["Gemm"]),
        ("c = Mul(x, u) d = Add(c, s) z = Gemm<alpha = 0.5, beta = 2.0>(d, w, b)", ["Gemm"]),
        ("c = Sub(x, u) z = Gemm<transB = 1>(c, wt)", ["Gemm"]),
        # Rows of the left matrix are not its channels.
        ("c = Mul(x, s) z = Gemm<transA = 1>(c, w)", ["Mul", "Gemm"]),
    ],
)
def test_next_to_gemm(body, ops):
    source = parse(
        HEADER + f"g (float[6, 6] x) => (float[A, B] y) <float s = {{0.125}}> {{ {body} y = Relu(z) }}",
        w=floats(6, 4),
        wt=floats(4, 6),
        b=floats(4),
        u=floats(6),
    )
    check_pass(FoldAffine(), source, ops=[*ops, "Relu"], atol=1e-5, rtol=1e-5)


def test_rounding_by_a_large_number_is_kept():
    check_pass(
        FoldAffine(),
        HEADER
        + "g (float[N] x) => (float[N] y) <float c = {8388608}> { a = Add(x, c) b = Sub(a, c) y = Relu(b) }",
        ops=["Add", "Sub", "Relu"],
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(
    "tail",
    ["i = Div(one, r) n = Mul(x, i)", "i = Reciprocal(r) n = Mul(i, x)", "n = Div(x, r)"],
)
def test_the_scale_of_a_norm_stays_with_it(tail):
    body = f"q = Mul(x, x) m = ReduceMean(q, last) e = Add(m, eps) r = Sqrt(e) {tail} s = Mul(n, g) y = MatMul(s, w)"
    source = parse(
        f"{HEADER} g (float[N, 6] x) => (float[N, 4] y) <float one = {{1}}, float eps = {{1e-6}}, int64[1] last = {{-1}}> {{ {body} }}",
        w=floats(6, 4),
        g=floats(6),
    )
    check_pass(FoldAffine(), source, ops=[node.op_type for node in source.graph])


def test_integers_are_left_alone():
    check_pass(
        FoldAffine(),
        HEADER + "g (int64[N] x) => (int64[N] y) <int64 c = {3}> { a = Div(x, c) b = Mul(a, c) y = Neg(b) }",
        ops=["Div", "Mul", "Neg"],
    )


def test_weights_that_would_overflow_are_left_alone():
    source = parse(
        HEADER
        + "g (float[N, 2, 3, 3] x) => (float[N, 2, 3, 3] y) <float c = {1e30}> { a = Conv(x, w) b = Mul(a, c) y = Relu(b) }",
        w=np.full((2, 2, 1, 1), 1e20, np.float32),
    )
    check_pass(FoldAffine(), source, ops=["Conv", "Mul", "Relu"], x=np.zeros((1, 2, 3, 3), np.float32))


def test_a_constant_that_widens_the_value_stays():
    source = parse(
        HEADER
        + "g (float[N, 1, 3, 3] x) => (float[N, 4, 3, 3] y) { a = Conv(x, w) b = Mul(a, c) y = Relu(b) }",
        w=floats(1, 1, 1, 1),
        c=floats(4, 1, 1),
    )
    check_pass(FoldAffine(), source, ops=["Conv", "Mul", "Relu"])


def test_values_that_a_body_reads_stay():
    check_pass(
        FoldAffine(),
        HEADER
        + """
        g (float[N] x, bool b) => (float[N] y) <float s = {2}> {
          a = Mul(x, s)
          c = Mul(a, s)
          y = If (b) <
            then_branch = yes () => (float[N] t) { t0 = Add(a, c) t = Relu(t0) },
            else_branch = no () => (float[N] e) { e0 = Mul(c, s) e = Mul(e0, s) }
          >
        }
        """,
        ops=["Mul", "Mul", "If", "Add", "Relu", "Mul"],
        b=np.array(False),
    )


@settings(max_examples=60, deadline=None)
@given(
    transposed=st.booleans(),
    group=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    front=st.booleans(),
    whole=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_any_convolution_computes_the_same(
    transposed, group, per_group, kernel, stride, padding, front, whole, bias, seed
):
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    inputs, outputs = per_group[0] * group, per_group[1] * group
    weight = (inputs, per_group[1]) if transposed else (outputs, per_group[0])
    channels = inputs if front else outputs
    layer = f"Conv{'Transpose' if transposed else ''}<group = {group}, strides = [{stride}, {stride}], pads = [{', '.join([str(padding)] * 4)}]>"
    arguments = "w, b" if bias else "w"
    source = parse(
        HEADER
        + f"g (float[2, {inputs}, 5, 5] x) => (float[A, B, C, D] y) {{"
        + (
            f"c = Mul(x, s) d = Add(c, t) y = {layer}(d, {arguments})"
            if front
            else f"c = {layer}(x, {arguments}) d = Mul(c, s) y = Add(d, t)"
        )
        + "}",
        w=draw(*weight, kernel, kernel),
        s=draw(*(() if whole else (channels, 1, 1))),
        t=draw(*(() if whole else (1, channels, 1, 1))),
        **({"b": draw(outputs)} if bias else {}),
    )
    after = source.clone()
    FoldAffine().run(after, Context(target=target("cpu")))
    count = sum(1 for _ in walk(after))
    # Behind a layer everything goes; in front the scale goes, and the shift where it is exact.
    assert count == (1 if not front or (not transposed and not padding) else 2)
    # At most 27 products of values around 1 and two more roundings.
    same_numbers(source, after, {"x": draw(2, inputs, 5, 5)}, atol=1e-4, rtol=1e-4)


def test_float16_is_rounded_once():
    source = parse(
        HEADER + "g (float16[N, 4] x) => (float16[N, 4] y) { a = MatMul(x, w) b = Mul(a, s) y = Relu(b) }",
        w=floats(4, 4).astype(np.float16),
        s=floats(4).astype(np.float16),
    )
    after = source.clone()
    FoldAffine().run(after, Context(target=target("cpu")))
    weight, scale = (source.graph.initializers[n].const_value.numpy().astype(np.float64) for n in "ws")
    (folded,) = (v.const_value for v in after.graph.initializers.values() if v.uses())
    assert folded.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(folded.numpy(), (weight * scale).astype(np.float16))
