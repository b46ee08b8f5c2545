from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.inference import infer
from optkit.passes.cleanup.noops import RemoveNoops
from optkit.testing import check_pass, parse

# Nodes on either side keep the names of input and output out of the way.
ONE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[%(shape)s] x) => (float[%(out)s] y) <%(weights)s> { a = Neg(x) b = %(node)s y = Exp(b) }
"""


def check(node: str, weights: str, *, gone: bool, shape: str, out: str | None = None):
    source = ONE % {"shape": shape, "node": node, "weights": weights, "out": out or shape}
    op = node.split("(")[0].split("<")[0]
    check_pass(RemoveNoops(), source, ops=["Neg", "Exp"] if gone else ["Neg", op, "Exp"], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("Identity(a)", ""),
        ("Dropout(a)", ""),
        ("Dropout(a, r, t)", "float r = {0.5}, bool t = {0}"),
        ("Cast<to = 1>(a)", ""),
        ("CastLike(a, x)", ""),
        ("Transpose<perm = [0, 1]>(a)", ""),
        ("Reshape(a, s)", "int64[2] s = {0, 4}"),
        ("Reshape(a, s)", "int64[2] s = {-1, 4}"),
        ("Reshape(a, s)", "int64[2] s = {0, -1}"),
        ("Flatten(a)", ""),
        ("Squeeze(a, s)", "int64[0] s = {}"),
        ("Unsqueeze(a, s)", "int64[0] s = {}"),
        ("Expand(a, s)", "int64[2] s = {1, 4}"),
        ("Expand(a, s)", "int64[1] s = {1}"),
        ("Tile(a, s)", "int64[2] s = {1, 1}"),
        ("Slice(a, z, e, z)", "int64[1] z = {0}, int64[1] e = {9223372036854775807}"),
        ("Slice(a, z, e, i)", "int64[1] z = {0}, int64[1] e = {4}, int64[1] i = {1}"),
        ("Slice(a, z, e, i)", "int64[1] z = {-4}, int64[1] e = {5}, int64[1] i = {-1}"),
        ("Pad(a, p)", "int64[4] p = {0, 0, 0, 0}"),
        ("Concat<axis = 0>(a)", ""),
        ("Sum(a)", ""),
        ("Max(a)", ""),
        ("Split<num_outputs = 1>(a)", ""),
        ("Add(a, c)", "float c = {0}"),
        ("Add(c, a)", "float[4] c = {0, 0, 0, 0}"),
        ("Sub(a, c)", "float[1, 4] c = {0, 0, 0, 0}"),
        ("Mul(a, c)", "float[1] c = {1}"),
        ("Div(a, c)", "float c = {1}"),
        ("Pow(a, c)", "float c = {1}"),
        ("Pow(a, c)", "int64 c = {1}"),
        ("Clip(a)", ""),
        ("Where(c, a, x)", "bool c = {1}"),
        ("ReduceMean<noop_with_empty_axes = 1>(a)", ""),
    ],
)
def test_what_gives_back_its_input_goes(node, weights):
    check(node, weights, gone=True, shape="N, 4")


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("Reshape(a, s)", "int64[2] s = {4, -1}"),
        ("Expand(a, s)", "int64[3] s = {1, 1, 4}"),
        ("Tile(a, s)", "int64[2] s = {2, 1}"),
        ("Slice(a, z, e, i)", "int64[1] z = {0}, int64[1] e = {3}, int64[1] i = {1}"),
        ("Slice(a, z, e, i)", "int64[1] z = {0}, int64[1] e = {1}, int64[1] i = {0}"),
        ("Slice(a, z, e, i, s)", "int64[1] z = {0}, int64[1] e = {4}, int64[1] i = {1}, int64[1] s = {2}"),
        ("Pad(a, p)", "int64[4] p = {0, 0, 0, 1}"),
        ("Add(a, c)", "float c = {0.5}"),
        ("Add(a, c)", "float[4] c = {0, 0, 0, 1}"),
        ("Sub(c, a)", "float c = {0}"),
        ("Div(c, a)", "float c = {1}"),
        ("Pow(c, a)", "float c = {1}"),
        ("Mul(a, c)", "float[1] c = {-1}"),
        ("Clip(a, c)", "float c = {0}"),
        ("Transpose<perm = [1, 0]>(a)", ""),
        ("Where(c, a, x)", "bool[4] c = {1, 1, 0, 1}"),
    ],
)
def test_near_misses_stay(node, weights):
    check(node, weights, gone=False, shape="2, 4", out="A, B")


def test_adding_zeros_that_broadcast_the_input_stays():
    check("Add(a, c)", "float[2, 1] c = {0, 0}", gone=False, shape="1, 4", out="2, 4")
    check("Mul(a, c)", "float[1, 1] c = {1}", gone=False, shape="4", out="1, 4")
    # An axis of unknown size may be 1, which a constant of 4 rows would widen.
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4] x) => (float[M, 4] y) <float[3, 4] c = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}> { a = Neg(x) b = Add(a, c) y = Exp(b) }
        """,
        ops=["Neg", "Add", "Exp"],
        x=np.ones((1, 4), np.float32),
    )


def test_dropout_whose_mask_is_read_stays():
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, bool[N] m) { a, m = Dropout(x) y = Neg(a) }
        """,
        ops=["Dropout", "Neg"],
    )


def test_names_of_inputs_and_outputs_win():
    # x and y are both names of the interface: something has to carry the value from one to the other.
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, float[N] z) { y = Identity(x) a = Neg(x) z = Identity(a) }
        """,
        ops=["Identity", "Neg"],
    )


def test_twice_the_inverse_and_twice_the_same():
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) { a = Neg(x) b = Neg(a) c = Abs(b) d = Abs(c) e = Relu(d) f = Relu(e) y = Exp(f) }
        """,
        ops=["Neg", "Abs", "Exp"],
        atol=0,
        rtol=0,
    )


def test_pooling_and_reducing_single_elements():
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 3, 1, 1] x) => (float[N, 3, 1, 1] y) <int64[2] hw = {2, 3}> {
          a = Exp(x)
          b = GlobalAveragePool(a)
          c = ReduceMax<keepdims = 1>(b, hw)
          d = MaxPool<kernel_shape = [1, 1]>(c)
          y = Neg(d)
        }
        """,
        ops=["Exp", "Neg"],
        atol=0,
        rtol=0,
    )


def test_a_pool_with_strides_stays():
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 3, 4, 4] x) => (float[N, 3, 2, 2] y) {
          a = Exp(x)
          b = MaxPool<kernel_shape = [1, 1], strides = [2, 2]>(a)
          y = Neg(b)
        }
        """,
        ops=["Exp", "MaxPool", "Neg"],
    )


def test_bodies_are_cleaned_and_may_not_return_what_is_outside():
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) {
          s = Exp(x)
          y = If (b) <
            then_branch = yes () => (float[N] t) { u = Identity(s) t = Neg(u) },
            else_branch = no () => (float[N] e) { e = Identity(s) }
          >
        }
        """,
        ops=["Exp", "If", "Neg", "Identity"],
        b=np.array(True),
    )


def test_resizing_by_one():
    check_pass(
        RemoveNoops(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 3, 4, 4] x) => (float[N, 3, 4, 4] y) <float[4] s = {1, 1, 1, 1}> {
          a = Exp(x)
          b = Resize<mode = "linear">(a, , s)
          y = Neg(b)
        }
        """,
        ops=["Exp", "Neg"],
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("end", "ops"),
    [(4, ["Slice", "Neg"]), (3, ["Slice", "Slice", "Concat", "Neg"])],
    ids=["empty", "one element"],
)
def test_parts_of_a_concatenation_without_elements_go(end, ops):
    check_pass(
        RemoveNoops(),
        f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4] x) => (float[N, M] y)
        <int64[1] two = {{2}}, int64[1] start = {{{end}}}, int64[1] last = {{4}}, int64[1] axis = {{1}}> {{
          a = Slice(x, two, last, axis)
          b = Slice(x, start, last, axis)
          c = Concat<axis = 1>(a, b)
          y = Neg(c)
        }}
        """,
        ops=ops,
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(("end", "gone"), [("x", True), ("z", False)])
def test_a_slice_up_to_the_size_of_its_axis_goes(end, gone):
    check_pass(
        RemoveNoops(),
        f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4] x, float[M, 4] z) => (float[K, 4] y) <int64[1] zero = {{0}}> {{
          a = Exp(x)
          n = Shape<end = 1>({end})
          b = Slice(a, zero, n, zero)
          y = Neg(b)
        }}
        """,
        ops=["Exp", "Shape", *([] if gone else ["Slice"]), "Neg"],
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("sizes", "ops"), [("4, 0", ["Exp", "Neg"]), ("3, 1", ["Exp", "Split", "Neg"])], ids=["all", "a part"]
)
def test_a_split_of_which_one_part_is_all_goes(sizes, ops):
    check_pass(
        RemoveNoops(),
        f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4] x) => (float[N, M] y) <int64[2] sizes = {{{sizes}}}> {{
          a = Exp(x)
          b, rest = Split<axis = 1>(a, sizes)
          y = Neg(b)
        }}
        """,
        ops=ops,
        atol=0,
        rtol=0,
    )


LSTM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[T, N, 3] x) => (float[T, 1, N, 4] y) <int64[1] one = {1}, int64[1] four = {4}, float start = {%s}> {
  n = Shape<start = 1, end = 2>(x)
  s = Concat<axis = 0>(one, n, four)
  h = Expand(start, s)
  y = LSTM<hidden_size = 4>(x, w, r, , , h, h)
}
"""


@pytest.mark.parametrize(("start", "kept"), [("0", 5), ("0.5", 7)])
def test_initial_states_that_are_zero_go(start, kept):
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal((1, 16, width)).astype(np.float32)
        for name, width in (("w", 3), ("r", 4))
    }
    after = check_pass(RemoveNoops(), parse(LSTM % start, **weights), atol=0, rtol=0)
    present = [v for v in after.graph[len(after.graph) - 1].inputs[5:] if v is not None]
    assert len(present) == kept - 5


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("s = Shape(x) e = Expand(v, s) y = Div(x, e)", ["Shape", "Div"]),
        (
            "s = Shape(x) e = Expand(v, s) a = Mul(e, x) b = Add(x, e) y = Sub(a, b)",
            ["Shape", "Mul", "Add", "Sub"],
        ),
        # The other operand is not known to have the shape, or the reader does not broadcast.
        ("s = Shape(u) e = Expand(v, s) y = Div(x, e)", ["Shape", "Expand", "Div"]),
        ("s = Shape(x) e = Expand(v, s) y = Concat<axis = 0>(x, e)", ["Shape", "Expand", "Concat"]),
        (
            "s = Shape(x) e = Expand(v, s) a = Mul(e, x) b = Exp(e) y = Sub(a, b)",
            ["Shape", "Expand", "Mul", "Exp", "Sub"],
        ),
    ],
)
def test_expanding_what_broadcasts_anyway(body, ops):
    source = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 4] x, float[M, 4] u) => (float[A, B] y) <float[1, 4] v = {{1, 2, 3, 4}}> {{ {body} }}
    """
    check_pass(
        RemoveNoops(),
        source,
        ops=ops,
        atol=0,
        rtol=0,
        x=np.ones((3, 4), np.float32),
        u=np.ones((3, 4), np.float32),
    )


def test_axes_of_any_size_are_not_taken_for_equal():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, M] x) => (float[A, B] y) { a = Neg(x) t = Transpose(a) s = Shape(t) b = Reshape(a, s) y = Exp(b) }
        """
    )
    source.graph.inputs[0].shape = ir.Shape(["?", "?"])
    for node in source.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].shape = None
    infer(source)
    check_pass(
        RemoveNoops(), source, ops=[node.op_type for node in source.graph], x=np.ones((2, 3), np.float32)
    )
