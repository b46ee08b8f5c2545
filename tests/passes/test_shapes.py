from __future__ import annotations

import numpy as np
import pytest

from optkit.graph import constant
from optkit.passes.base import Context
from optkit.passes.cleanup.shapes import FoldShapes, constant_target
from optkit.targets import target
from optkit.testing import check_pass, parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
INTEGERS = "int64 zero = {0}, int64 one = {1}, int64[1] z = {0}, int64[1] o = {1}, int64[1] t = {2}, int64[1] four = {4}, int64[1] m = {-1}"


def model(signature: str, body: str, weights: str = "") -> str:
    return f"{HEADER} g {signature} <{INTEGERS}{', ' + weights if weights else ''}> {{ {body} }}"


@pytest.mark.parametrize(
    ("body", "ops", "shape"),
    [
        # Known sizes are numbers.
        ("s = Shape(x) d = Gather(s, t) e = Concat<axis = 0>(m, d) y = Reshape(x, e)", ["Reshape"], [-1, 8]),
        ("s = Shape<start = 2>(x) e = Concat<axis = 0>(m, s) y = Reshape(x, e)", ["Reshape"], [-1, 8]),
        # An axis that stays is 0, one that is left over -1.
        (
            "s = Shape(x) a = Gather(s, zero) b = Unsqueeze(a, z) e = Concat<axis = 0>(b, m) y = Reshape(x, e)",
            ["Reshape"],
            [0, -1],
        ),
        (
            "s = Shape(x) a = Slice(s, z, o) b = Slice(s, o, t) c = Mul(a, b) d = Slice(s, t, m2) e = Concat<axis = 0>(c, d) y = Reshape(x, e)",
            ["Reshape"],
            [-1, 8],
        ),
        # Half of an axis of eight.
        (
            "s = Shape(x) a = Gather(s, zero) b = Gather(s, two) c = Div(b, two) ua = Unsqueeze(a, z) uc = Unsqueeze(c, z) "
            "e = Concat<axis = 0>(ua, m, uc) y = Reshape(x, e)",
            ["Reshape"],
            [0, -1, 4],
        ),
    ],
)
def test_targets_of_reshape(body, ops, shape):
    dims = ", ".join("ABC"[: len(shape)])
    source = model(
        f"(float[N, T, 8] x) => (float[{dims}] y)",
        body,
        "int64[1] m2 = {9223372036854775807}, int64 two = {2}",
    )
    after = check_pass(
        FoldShapes(), source.replace("y = Reshape(x, e)", "r = Reshape(x, e) y = Relu(r)"), ops=[*ops, "Relu"]
    )
    assert constant(after.graph[0].inputs[1]).tolist() == shape


def test_two_axes_of_unknown_place_are_computed():
    body = "s = Shape(x) a = Gather(s, o) b = Gather(s, z) e = Concat<axis = 0>(a, b, m) r = Reshape(x, e) y = Relu(r)"
    check_pass(
        FoldShapes(),
        model("(float[N, T, 8] x) => (float[A, B, C] y)", body),
        ops=["Shape", "Gather", "Gather", "Concat", "Reshape", "Relu"],
        x=np.arange(48, dtype=np.float32).reshape(2, 3, 8),
    )


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (("n", "t", 8), ("n", "t", 2, 4), [0, 0, 2, 4]),
        (("n", "t", 8), ("n*t", 8), [-1, 8]),
        (("n", "t", 8), ("t", "n", 8), None),
        (("n", 8), (8, "n"), [8, -1]),
        (("n", 8), (None, "n"), None),
        (("n", 0), ("n", 0), None),
        (None, ("n", 8), [-1, 8]),
        (("n", 8), None, None),
    ],
)
def test_constant_targets(x, y, expected):
    assert constant_target(x, y) == expected


def test_a_condition_on_known_sizes_picks_its_branch():
    check_pass(
        FoldShapes(),
        model(
            "(float[N, 1, 4] x) => (float[A, B] y)",
            """
            s = Shape(x) d = Gather(s, one) c = Equal(d, one)
            r = If (c) <
              then_branch = yes () => (float[N, 4] p) { p = Squeeze(x, o) },
              else_branch = no () => (float[N, 1, 4] q) { q = Identity(x) }
            >
            y = Relu(r)
            """,
        ),
        ops=["Squeeze", "Relu"],
    )


def test_equal_vectors_of_sizes_are_computed_once():
    after = check_pass(
        FoldShapes(),
        model(
            "(float[N, T] x, float[N, T] u) => (float[N, T] y)",
            """
            s = Shape(x) v = Shape(u) a = Relu(x) w = Shape(a)
            p = Expand(one_f, s) q = Expand(one_f, v) r = Expand(one_f, w)
            b = Add(a, p) c = Mul(b, q) y = Sub(c, r)
            """,
            "float one_f = {1}",
        ),
    )
    assert sum(node.op_type == "Shape" for node in after.graph) == 1


def test_sizes_with_other_names_stay_apart():
    after = check_pass(
        FoldShapes(),
        model(
            "(float[N] x, float[M] u) => (float[N] y, float[M] v)",
            "s = Shape(x) t0 = Shape(u) p = Expand(one_f, s) q = Expand(one_f, t0) y = Add(x, p) v = Add(u, q)",
            "float one_f = {1}",
        ),
    )
    assert sum(node.op_type == "Shape" for node in after.graph) == 2


def test_one_size_is_one_shape():
    check_pass(
        FoldShapes(),
        model(
            "(float[N, T, 4] x) => (float[A] y)",
            "s = Shape(x) a = Gather(s, one) b = Unsqueeze(a, z) y = ConstantOfShape(b)",
        ),
        ops=["Shape", "ConstantOfShape"],
    )
    check_pass(
        FoldShapes(),
        model(
            "(float[N, T, 4] x) => (float[A, B] y)",
            """
            s = Shape(x) a = Gather(s, zero) b = Unsqueeze(a, z) c = Gather(s, one) d = Unsqueeze(c, z)
            e = Concat<axis = 0>(b, d) y = ConstantOfShape(e)
            """,
        ),
        ops=["Shape", "ConstantOfShape"],
    )


def test_an_unknown_axis_keeps_its_name_through_elementwise_operators():
    source = parse(
        model(
            "(float[N, C, H, W] x) => (float[A, B, E] y)",
            """
            a = Relu(x) b = Add(a, x) s = Shape(b) n = Slice(s, z, o) c = Slice(s, o, t)
            e = Concat<axis = 0>(n, c, m) r = Reshape(x, e) y = Relu(r)
            """,
        )
    )
    check_pass(FoldShapes(), source, ops=["Reshape", "Relu"], x=np.ones((2, 3, 4, 5), np.float32))


def test_a_size_without_bound_is_never_allocated():
    source = parse(
        model(
            "(float[1048576, 1048576] x) => (float[N] y)",
            "s = Size(x) u = Unsqueeze(s, z) y = ConstantOfShape(u)",
        )
    )
    FoldShapes().run(source, Context(target=target("cpu")))
    assert source.graph[len(source.graph) - 1].op_type == "ConstantOfShape"


def test_arithmetic_that_a_body_does():
    check_pass(
        FoldShapes(),
        model(
            "(float[N, 4] x, bool b) => (float[A, B] y)",
            """
            y = If (b) <
              then_branch = yes () => (float[P, Q] p) { s = Shape(x) d = Gather(s, o) e = Concat<axis = 0>(d, m) p0 = Reshape(x, e) p = Relu(p0) },
              else_branch = no () => (float[N, 4] q) { q = Identity(x) }
            >
            """,
        ),
        ops=["If", "Reshape", "Relu", "Identity"],
        b=np.array(True),
    )


def test_the_target_of_an_output_is_found_without_what_it_was_declared_with():
    after = check_pass(
        FoldShapes(),
        model(
            "(float[N, T, 8] x) => (float[A, B] y)",
            "a = Relu(x) s = Shape(a) n = Slice(s, z, o) e = Concat<axis = 0>(n, m) y = Reshape(a, e)",
        ),
        ops=["Relu", "Reshape"],
    )
    assert constant(after.graph[1].inputs[1]).tolist() == [0, -1]
