from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.dims import divide, minus, plus, quotient, remainder, shape_of, times
from optkit.graph import text
from optkit.inference import at_shapes, infer, infer_node, windows_fit
from optkit.reference import ReferenceSession
from optkit.testing import parse, random_feeds

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
SIZES = {"a": 2, "b": 3, "c": 5}


def value(dim: int | str) -> int:
    return eval(str(dim), {}, dict(SIZES))


names = st.sampled_from(["a", "b", "c"])
numbers = st.integers(0, 6)


@st.composite
def expressions(draw, depth: int = 2):
    if depth == 0 or draw(st.booleans()):
        return draw(st.one_of(names, numbers))
    left, right = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    found = draw(st.sampled_from([plus, times]))(left, right)
    return left if found is None else found


@given(expressions(), expressions())
def test_arithmetic_with_names_is_that_of_the_sizes(x, y):
    assert value(times(x, y)) == value(x) * value(y)
    assert value(plus(x, y)) == value(x) + value(y)
    if (found := quotient(x, y)) is not None:
        assert value(found) * value(y) == value(x)
    if (found := minus(x, y)) is not None:
        assert value(found) == value(x) - value(y)


@given(expressions(), expressions())
def test_the_order_of_operands_does_not_matter(x, y):
    assert times(x, y) == times(y, x)
    assert plus(x, y) == plus(y, x)


@pytest.mark.parametrize(
    ("function", "a", "b", "expected"),
    [
        (times, "n", 1, "n"),
        (times, "n", 0, 0),
        (times, "t", "2*n", "2*n*t"),
        (times, "n", None, None),
        (quotient, "2*n*t", "n", "2*t"),
        (quotient, "n", 2, None),
        (quotient, "n", "t", None),
        (quotient, "6*n", "3*n", 2),
        # A name of the author's that looks like a sum is one name.
        (quotient, "n*t + 1", "n", None),
        (quotient, 7, 0, None),
        (plus, "n", 0, "n"),
        (plus, "n", "t", "(n + t)"),
        (plus, "(n + 1)", 2, "(n + 3)"),
        (plus, "(n + 1)", -1, "n"),
        (minus, "n", "n", 0),
        (minus, "n", "t", None),
        (divide, -7, 2, -3),
        (divide, 7, -2, -3),
        (divide, 7, 0, None),
        (remainder, 7, 4, 3),
        (remainder, -7, 4, None),
        (remainder, "4*n", 2, 0),
    ],
)
def test_single_steps(function, a, b, expected):
    assert function(a, b) == expected


def shapes(signature: str, body: str, weights: str = "") -> dict[str, str]:
    model = parse(f"{HEADER} g {signature} <{weights or 'float unused = {0}'}> {{ {body} }}")
    return {str(v.name): str(v.shape) for node in model.graph for v in node.outputs}


INTEGERS = "int64 zero = {0}, int64 one = {1}, int64[1] z = {0}, int64[1] o = {1}, int64[1] m = {-1}, int64[1] four = {4}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Shape(x) y = Reshape(x, s)", "[N,T,8]"),
        ("s = Shape(x) a = Slice(s, z, o) t = Concat<axis = 0>(a, m) y = Reshape(x, t)", "[N,8*T]"),
        ("t = Concat<axis = 0>(m, four) y = Reshape(x, t)", "[2*N*T,4]"),
        ("s = Shape(x) a = Gather(s, one) b = Mul(a, a) u = Unsqueeze(b, z) y = ConstantOfShape(u)", "[T*T]"),
        ("s = Shape(x) a = Gather(s, zero) y = Range(zero, a, one)", "[N]"),
        ("s = Shape(x) a = Slice(s, z, o) y = Expand(four, a)", "[N]"),
        ("y = Concat<axis = 1>(x, x, x)", "[N,3*T,8]"),
        ("r = Concat<axis = 0>(o, o, four) y = Tile(x, r)", "[N,T,32]"),
        ("y = Slice(x, z, big, o)", "[N,T,8]"),
        ("y = Slice(x, z, four, two)", "[N,T,4]"),
    ],
)
def test_sizes_that_depend_on_values(body, expected):
    found = shapes(
        "(float[N, T, 8] x) => (float[N, T, 8] out)",
        f"{body} out = Relu(x)",
        f"{INTEGERS}, int64[1] big = {{9223372036854775807}}, int64[1] two = {{2}}",
    )
    assert found["y"] == expected


def test_unknown_axes_get_one_name_each_and_keep_it():
    found = shapes(
        "(float[N, C, H, W] x, float[4, 3, 3, 3] w) => (float[A, B, D, E] y)",
        "c = Conv(x, w) r = Relu(c) s = Sigmoid(r) y = Add(r, s)",
    )
    assert found["c"] == found["r"] == found["s"] == "[N,4,c.d2,c.d3]"


def test_inference_twice_says_the_same_and_forgets_stale_names():
    model = parse(
        f"{HEADER} g (float[N, 8] x) => (float[A, B] y) {{ s = Shape(x) r = Reshape(x, s) a = Relu(r) y = Abs(a) }}"
    )
    once = text(model)
    for node in model.graph:
        for output in node.outputs:
            if output.name == "a":
                output.shape = ir.Shape(["unk__7", 8])
    infer(model)
    assert text(model) == once
    assert [shape_of(node.outputs[0]) for node in model.graph][2] == ("N", 8)


@pytest.mark.parametrize(("name", "equal"), [("?", False), ("-1", False), ("None", False), ("n", True)])
def test_what_stands_for_any_size_is_no_name(name, equal):
    model = parse(f"{HEADER} g (float[1, 2] x) => (float[A, B] y) {{ r = Relu(x) y = Transpose(r) }}")
    model.graph.inputs[0].shape = ir.Shape([name, name])
    for node in model.graph:
        node.outputs[0].shape = None
    infer(model)
    first, second = shape_of(model.graph[0].outputs[0])
    assert (first == second) == equal
    assert [d.value for d in model.graph.inputs[0].shape] == [name, name]


def test_what_outputs_were_declared_with_stays():
    model = parse(f"{HEADER} g (float[N, 8] x) => (float[out, B] y) {{ y = Relu(x) }}")
    assert [d.value for d in model.graph.outputs[0].shape] == ["out", "B"]
    # What else is known is known beside it.
    assert shape_of(model.graph.outputs[0]) == ("N", 8)


def test_an_output_that_has_the_name_of_an_input_axis_is_as_long():
    model = parse(
        f"{HEADER} g (float[N, 8] x, float[P, 8] p, float[T, 1] m) => (float[T, 8] y) {{ y = Concat <axis = 0> (x, p) }}"
    )
    assert shape_of(model.graph.outputs[0]) == ("T", 8)


@pytest.mark.parametrize("name", ["past+sequence", "sequence+past", "sequence + past"])
def test_a_sum_of_names_is_the_same_size_in_any_order(name):
    model = parse(
        f"{HEADER} g (float[A, 8] x, float[B, 8] p) => (float[C, 8] y) {{ y = Concat <axis = 0> (x, p) }}"
    )
    one, two = model.graph.inputs
    one.shape, two.shape = ir.Shape(["sequence", 8]), ir.Shape(["past", 8])
    model.graph.outputs[0].shape = ir.Shape([name, 8])
    infer(model)
    assert shape_of(model.graph.outputs[0]) == ("(past + sequence)", 8)


@pytest.mark.parametrize(
    ("name", "size"), [("2*n + 1", "(2*n + 1)"), ("n+n", "2*n"), ("a+", "a+"), ("a.b+c", "a.b+c"), ("a+b-c", "a+b-c")]
)  # fmt: skip
def test_only_sums_of_plain_names_are_put_in_order(name, size):
    model = parse(f"{HEADER} g (float[A, 8] x) => (float[A, 8] y) {{ y = Relu (x) }}")
    model.graph.inputs[0].shape = ir.Shape([name, 8])
    assert shape_of(model.graph.inputs[0]) == (size, 8)


@pytest.mark.parametrize("cast", ["c = Cast <to = 7> (zero)", "c = CastLike (zero, n)"])
def test_bounds_of_a_range_that_were_floats_are_known(cast):
    model = parse(
        f"{HEADER} g (float[N, 8] x) => (int64[L] y) <float zero = {{0}}, int64 one = {{1}}> "
        f"{{ s = Shape <start = 0, end = 1> (x) n = Squeeze (s) {cast} y = Range (c, n, one) }}"
    )
    assert shape_of(model.graph.outputs[0]) == ("N",)


def test_bounds_of_a_range_that_are_no_whole_numbers_are_not():
    model = parse(
        f"{HEADER} g (float[N, 8] x) => (int64[L] y) <float half = {{0.5}}, int64 one = {{1}}> "
        "{ s = Shape <start = 0, end = 1> (x) n = Squeeze (s) c = Cast <to = 7> (half) y = Range (c, n, one) }"
    )
    assert shape_of(model.graph.outputs[0]) == ("L",)


def test_elements_of_vectors_of_sizes():
    model = parse(
        f"{HEADER} g (float[N, T, 8] x) => (int64[3] y) <{INTEGERS}> {{ s = Shape(x) a = Slice(s, o, four) t = Concat<axis = 0>(m, a) y = Identity(t) }}"
    )
    known = infer(model)
    by_name = {v.name: e.tolist() for v, e in known.items()}
    assert (by_name["s"], by_name["a"], by_name["t"]) == (["N", "T", 8], ["T", 8], [-1, "T", 8])


def test_both_branches_agree_on_what_is_known():
    model = parse(
        f"""{HEADER} g (float[N, 8] x, bool b) => (float[A, B] y) {{
          r = If (b) <
            then_branch = p () => (float[N, 8] t) {{ t = Relu(x) }},
            else_branch = q () => (float[M, 8] e) {{ e = Abs(x) }}
          >
          y = Identity(r)
        }}"""
    )
    r = model.graph[0].outputs[0]
    assert shape_of(r)[1] == 8


@pytest.mark.parametrize("size", [1 << 40, 1 << 62])
def test_a_size_without_bound_costs_nothing(size):
    found = shapes(
        "(float[N] x) => (float[A] y)",
        "e = Expand(x1, n) f = ConstantOfShape(n) y = Identity(e)",
        f"float[1] x1 = {{2}}, int64[1] n = {{{size}}}",
    )
    assert found["f"] == f"[{size}]"


def test_one_new_node():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 4]))
    node = ir.node("Transpose", [x], {"perm": [1, 0]})
    infer_node(node)
    assert (node.outputs[0].dtype, shape_of(node.outputs[0])) == (ir.DataType.FLOAT, (4, "N"))
    unknown = ir.node("Relu", [ir.Value(name="u")])
    infer_node(unknown)
    assert unknown.outputs[0].type is None


def test_weights_in_constant_nodes_are_not_copied():
    class Untouchable(ir.Tensor):
        def tobytes(self) -> bytes:
            raise AssertionError("read")

        def tofile(self, file) -> None:
            raise AssertionError("read")

    weight = Untouchable(np.zeros((64, 64), np.float32), name="w")
    model = parse(f"{HEADER} g (float[N, 64] x) => (float[A, B] y) {{ r = Relu(x) y = Abs(r) }}")
    constant = ir.node("Constant", [], {"value": weight})
    product = ir.node("MatMul", [model.graph[0].outputs[0], constant.outputs[0]])
    model.graph.insert_after(model.graph[0], [constant, product])
    infer(model)
    assert shape_of(product.outputs[0]) == ("N", 64)


def test_sizes_from_constants_that_are_attributes_are_known():
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 12, S, 32] x) => (float[A, B, C, D] y) {
          zero = Constant <value_ints = [0]> () rest = Constant <value_ints = [-1, 0]> ()
          few = Shape <start = 1, end = 2> (x) form = Concat <axis = 0> (zero, few, rest) y = Reshape (x, form) }"""
    )
    model.graph.outputs[0].shape = None
    fixed = at_shapes(model, {"x": (8, 12, 51, 32)})
    assert fixed.graph.outputs[0].shape.numpy() == (8, 12, 51, 32)


@pytest.mark.parametrize(
    "body",
    [
        "(float[1, 3, 2, 8] x) => (float[] y) { y = MaxPool<ceil_mode = 1, kernel_shape = [1, 1], strides = [2, 2]>(x) }",
        "(float[1, 3, 9, 8] x) => (float[] y) {"
        " p = AveragePool<ceil_mode = 1, kernel_shape = [3, 3], strides = [3, 3], pads = [1, 1, 1, 1]>(x) y = Relu(p) }",
        "(float[1, 2, 7] x) => (float[] y) { y = LpPool<ceil_mode = 1, kernel_shape = [2], strides = [3], pads = [1, 1]>(x) }",
        "(float[1, 3, 9] x) => (float[] y) { y = AveragePool<ceil_mode = 1, kernel_shape = [3], strides = [2]>(x) }",
        "(float[1, 64, 1] x) => (float[] y) <int64 a = {8}, int64 b = {16}> { y = STFT(x, a, , b) }",
        "(float[1, 64, 1] x) => (float[] y) <int64 a = {8}, int64 b = {16}> { y = STFT<onesided = 0>(x, a, , b) }",
    ],
)
def test_sizes_are_those_that_onnx_runtime_computes_where_onnx_infers_others(body):
    model = parse(f'<ir_version: 10, opset_import: ["" : 21]>\ng {body}')
    (output,) = model.graph.outputs
    expected = ReferenceSession(model, optimize=False).run(random_feeds(model))["y"].shape
    assert tuple(output.shape) == expected


def test_a_new_node_knows_a_size_that_is_what_the_others_leave_over():
    model = parse(
        HEADER
        + "g (float[N, 37, 192] x) => (float[a, b, c, d] y) <int64[4] t = {-1, 37, 6, 32}> { y = Reshape (x, t) }"
    )
    node = ir.node("Reshape", model.graph[0].inputs)
    infer_node(node)
    assert shape_of(node.outputs[0]) == ("N", 37, 6, 32)


@pytest.mark.parametrize(
    ("attributes", "size", "fits"),
    [
        ("kernel_shape = [8]", 8, True),
        ("kernel_shape = [8]", 7, False),
        ("kernel_shape = [8], pads = [1, 0]", 7, True),
        ("kernel_shape = [4], dilations = [2]", 7, True),
        ("kernel_shape = [4], dilations = [2]", 6, False),
        ('kernel_shape = [8], auto_pad = "SAME_UPPER"', 3, True),
    ],
)
def test_a_window_fits_where_it_is_no_larger_than_its_padded_input(attributes, size, fits):
    model = parse(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 2, T] x) => (float[] y) {{ y = AveragePool<{attributes}>(x) }}'
    )
    assert windows_fit(model, {"x": (1, 2, size)}) is fits
