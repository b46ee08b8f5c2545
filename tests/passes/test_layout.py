from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.cleanup.layout import CancelLayout
from optkit.testing import check_pass, parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
INTEGERS = (
    "int64[1] z = {0}, int64[1] o = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[2] flat = {0, -1}, "
    "int64[3] back = {0, 3, 8}, int64[2] both = {1, 2}, int64[1] m = {-1}"
)


def check(signature: str, body: str, ops: list[str], weights: str = "", **inputs: np.ndarray):
    source = f"{HEADER} g {signature} <{INTEGERS}{', ' + weights if weights else ''}> {{ {body} }}"
    return check_pass(CancelLayout(), source, ops=ops, atol=0, rtol=0, **inputs)


X = "(float[N, 3, 8] x)"


@pytest.mark.parametrize(
    ("out", "body", "ops"),
    [
        (
            "N, 24",
            "a = Relu(x) b = Reshape(a, flat) c = Reshape(b, back) d = Reshape(c, flat) y = Abs(d)",
            ["Reshape"],
        ),
        ("N, 3, 8", "a = Relu(x) b = Reshape(a, flat) c = Reshape(b, back) y = Abs(c)", []),
        ("N, 3, 8", "a = Relu(x) b = Unsqueeze(a, o) c = Squeeze(b, o) y = Abs(c)", []),
        ("N, 3, 8", "a = Relu(x) b = Flatten(a) c = Reshape(b, back) y = Abs(c)", []),
        ("N, 1, 1, 24", "a = Relu(x) b = Flatten(a) c = Unsqueeze(b, both) y = Abs(c)", ["Reshape"]),
        ("N, 1, 3, 1, 8", "a = Relu(x) b = Unsqueeze(a, o) c = Unsqueeze(b, t) y = Abs(c)", ["Reshape"]),
        # An axis of size 1 moves; no element does.
        (
            "N, 3, 8",
            "a = Relu(x) b = Unsqueeze(a, o) c = Transpose<perm = [0, 2, 3, 1]>(b) d = Squeeze(c, m) y = Abs(d)",
            [],
        ),
        (
            "N, 8, 3",
            "a = Relu(x) b = Transpose<perm = [0, 2, 1]>(a) c = Unsqueeze(b, o) d = Squeeze(c, o) y = Abs(d)",
            ["Transpose"],
        ),
    ],
)
def test_reshapes_in_a_row(out, body, ops):
    check(f"{X} => (float[{out}] y)", body, ["Relu", *ops, "Abs"], "int64[1] t = {3}")


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("b = Reshape(x, flat) c = Relu(b) d = Reshape(c, back) y = Abs(d)", ["Relu"]),
        ("b = Reshape(x, flat) c = Relu(b) d = Exp(c) e = Unsqueeze(d, o) y = Abs(e)", ["Relu", "Exp", "Reshape"]),
        ("b = Reshape(x, rows) c = Mul(b, v) d = Relu(c) e = Reshape(d, split) y = Abs(e)", ["Mul", "Relu"]),
        ("b = Reshape(x, flat) c = Add(s, b) d = Reshape(c, back) y = Abs(d)", ["Add"]),
        # The vector lies along an axis that the other shape does not have.
        ("b = Reshape(x, flat) c = Mul(b, wide) d = Reshape(c, back) y = Abs(d)", ["Reshape", "Mul", "Reshape"]),
        # Others read what is in between, or another value comes in.
        ("b = Reshape(x, flat) c = Relu(b) d = Reshape(c, back) e = Neg(c) f = Reshape(e, back) g = Add(d, f) y = Abs(g)",
         ["Reshape", "Relu", "Reshape", "Neg", "Reshape", "Add"]),
        ("b = Reshape(x, flat) e = Flatten(x) c = Mul(b, e) d = Reshape(c, back) y = Abs(d)", ["Reshape", "Flatten", "Mul", "Reshape"]),
        ("b = Reshape(x, flat) c = Softmax(b) d = Reshape(c, back) y = Abs(d)", ["Reshape", "Softmax", "Reshape"]),
    ],
)  # fmt: skip
def test_reshapes_with_elementwise_operators_in_between(body, ops):
    numbers = ", ".join(map(str, range(24)))
    weights = f"float[1] s = {{2}}, float[8] v = {{1, 2, 3, 4, 5, 6, 7, 8}}, int64[2] rows = {{-1, 8}}, int64[3] split = {{-1, 3, 8}}, float[24] wide = {{{numbers}}}"
    check(f"{X} => (float[A, B, C] y)", body, [*ops, "Abs"], weights)


def test_reshapes_that_others_read():
    # Both readers go around it.
    check(
        f"{X} => (float[N, 3, 8] y, float[A, B, C, D] u)",
        "a = Relu(x) b = Reshape(a, flat) c = Reshape(b, back) d = Unsqueeze(b, both) y = Abs(c) u = Abs(d)",
        ["Relu", "Reshape", "Abs", "Abs"],
    )
    # One of them needs it, so it stays, and what comes back to the same shape is cut all the same.
    check(
        f"{X} => (float[N, 3, 8] y, float[N, 24] u)",
        "a = Relu(x) b = Reshape(a, flat) c = Reshape(b, back) y = Abs(c) u = Neg(b)",
        ["Relu", "Reshape", "Abs", "Neg"],
    )


def test_two_unknown_axes_are_left_alone():
    check(
        "(float[N, T, 8] x, int64[3] s) => (float[A, B, C] y)",
        "a = Reshape(x, flat3) b = Reshape(a, s) y = Abs(b)",
        ["Reshape", "Reshape", "Abs"],
        "int64[2] flat3 = {-1, 8}",
        x=np.ones((2, 3, 8), np.float32),
        s=np.array([3, 2, 8]),
    )


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = Transpose<perm = [0, 2, 1]>(x) b = Transpose<perm = [0, 2, 1]>(a) y = Abs(b)", []),
        ("a = Transpose<perm = [1, 2, 0]>(x) b = Transpose<perm = [1, 2, 0]>(a) c = Transpose<perm = [1, 2, 0]>(b) y = Abs(c)", []),
        ("a = Transpose(x) b = Transpose(a) y = Abs(b)", []),
        ("a = Transpose<perm = [0, 2, 1]>(x) b = Transpose<perm = [2, 1, 0]>(a) y = Abs(b)", ["Transpose"]),
        # Through elementwise operators.
        ("a = Transpose<perm = [0, 2, 1]>(x) b = Relu(a) c = Mul(b, s) d = Transpose<perm = [0, 2, 1]>(c) y = Abs(d)", ["Relu", "Mul"]),
        ("a = Transpose<perm = [0, 2, 1]>(x) b = Mul(v, a) c = Add(b, w) d = Transpose<perm = [0, 2, 1]>(c) y = Abs(d)", ["Mul", "Add"]),
        ("a = Transpose<perm = [1, 2, 0]>(x) b = Relu(a) c = Transpose<perm = [2, 0, 1]>(b) y = Abs(c)", ["Relu"]),
        # Two branches that meet again.
        (
            "a = Transpose<perm = [0, 2, 1]>(x) b = Relu(a) e = Exp(a) f = Mul(b, e) d = Transpose<perm = [0, 2, 1]>(f) y = Abs(d)",
            ["Relu", "Exp", "Mul"],
        ),
        # Two Transposes come in, one goes out.
        (
            "n = Neg(x) a = Transpose<perm = [0, 2, 1]>(x) b = Transpose<perm = [0, 2, 1]>(n) c = Add(a, b) d = Relu(c) y = Abs(d)",
            ["Neg", "Add", "Relu", "Abs", "Transpose"],
        ),
        # Another permutation does not fit.
        (
            "a = Transpose<perm = [1, 2, 0]>(x) b = Relu(a) c = Transpose<perm = [1, 2, 0]>(b) y = Abs(c)",
            ["Transpose", "Relu", "Transpose"],
        ),
        # Something that is not transposed comes in.
        (
            "a = Transpose<perm = [0, 2, 1]>(x) q = MatMul(a, x) b = Mul(q, q) e = Softmax(b) y = Abs(e)",
            ["Transpose", "MatMul", "Mul", "Softmax"],
        ),
    ],
)  # fmt: skip
def test_transposes(body, ops):
    if "Abs" not in ops:
        ops = [*ops, "Abs"]
    check(
        "(float[N, 3, 8] x) => (float[A, B, C] y)",
        body,
        ops,
        "float s = {2}, float[3] v = {1, 2, 3}, float[8, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}",
    )


def test_values_that_are_read_elsewhere_are_transposed_there():
    source = parse(
        f"""{HEADER}
        g (float[2, 3, 4] x, float[2, 3, 4] v) => (float[2, 3, 4] y, float[2, 4, 3] z) {{
          a = Transpose<perm = [0, 2, 1]>(x)
          e = Transpose<perm = [0, 2, 1]>(v)
          b = Add(a, e)
          z = Relu(b)
          c = Transpose<perm = [0, 2, 1]>(b)
          y = Abs(c)
        }}
        """
    )
    check_pass(CancelLayout(), source, ops=["Add", "Relu", "Transpose", "Abs"], atol=0, rtol=0)


def test_a_transpose_that_others_read_stays():
    check(
        "(float[N, 3, 8] x) => (float[N, 3, 8] y, float[N, 8, 3] u)",
        "a = Transpose<perm = [0, 2, 1]>(x) b = Transpose<perm = [0, 2, 1]>(a) y = Abs(b) u = Neg(a)",
        ["Transpose", "Abs", "Neg"],
    )


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = Slice(x, o, two, o) b = Slice(a, z, four, two) y = Abs(b)", ["Slice"]),
        ("a = Slice(x, o, two, o) b = Slice(a, z, o, z) c = Slice(b, z, four, m) y = Abs(c)", ["Slice"]),
        ("a = Slice(x, m, z, two, m) b = Slice(a, o, two, o) y = Abs(b)", ["Slice"]),
        # The same axis twice, or a reader more.
        ("a = Slice(x, o, four, two) b = Slice(a, o, two, two) y = Abs(b)", ["Slice", "Slice"]),
        (
            "a = Slice(x, z, o, o) b = Slice(a, o, two, two) c = Add(a, b) y = Abs(c)",
            ["Slice", "Slice", "Add"],
        ),
    ],
)
def test_slices(body, ops):
    check("(float[N, 3, 8] x) => (float[A, B, C] y)", body, [*ops, "Abs"])


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("a = Concat<axis = 1>(x, x) b = Concat<axis = -2>(a, x) y = Abs(b)", ["Concat"]),
        ("a = Concat<axis = 1>(x, x) b = Concat<axis = 1>(x, a, a) y = Abs(b)", ["Concat", "Concat"]),
        ("a = Concat<axis = 1>(x, x) b = Concat<axis = 2>(a, a) y = Abs(b)", ["Concat", "Concat"]),
    ],
)
def test_concats(body, ops):
    check("(float[N, 3, 8] x) => (float[A, B, C] y)", body, [*ops, "Abs"])


def test_what_a_body_reads_stays():
    check(
        "(float[N, 3, 8] x, bool b) => (float[N, 3, 8] y)",
        """
        a = Transpose<perm = [0, 2, 1]>(x)
        y = If (b) <
          then_branch = yes () => (float[N, 3, 8] t) { t0 = Transpose<perm = [0, 2, 1]>(a) t = Relu(t0) },
          else_branch = no () => (float[N, 3, 8] e) { e0 = Exp(a) e1 = Transpose<perm = [0, 2, 1]>(e0) e = Abs(e1) }
        >
        """,
        ["Transpose", "If", "Transpose", "Relu", "Exp", "Transpose", "Abs"],
        b=np.array(True),
    )
