"""Attention that looks back alone, in groups of heads and windows: from graphs of decoders and from ONNX's Attention."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from optkit.frontend import load
from optkit.graph import walk
from optkit.kernels import KERNELS
from optkit.masks import sight
from optkit.passes.base import Context
from optkit.passes.fusion.attention import CleanAttention
from optkit.passes.lowering.kernels import CallKernels
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse

H100 = Context(target=target("h100"))
# As torch 2.13 writes a layer of transformers' Llama and Mistral after group-heads: four heads, two of keys.
DECODER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 4, S, 16] q, float16[N, 2, S, 16] k, float16[N, 2, S, 16] v, bool[N, 1, 1, S] pad) => (float16[N, 4, S, 16] y)
<int64 zero = {0}, int64 one = {1}, int64[4] down = {1, 1, -1, 1}, int64[4] across = {1, 1, 1, -1}, int64 window = {3},
 int64[4] few = {0, 2, -1, 0}, int64[4] many = {0, 4, -1, 0}, int64[1] last = {-1}, float16 high = {0}> {
  shape = Shape <start = 2, end = 3> (q)
  length = Squeeze (shape)
  place = Range (zero, length, one)
  row = Reshape (place, down)
  column = Reshape (place, across)
  %s
  mask = Where (seen, high, low)
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  r = Reshape (q, few)
  p = MatMul (r, t)
  u = Reshape (p, many)
  a = Add (u, mask)
  w = Softmax (a)
  z = Reshape (w, few)
  x = MatMul (z, v)
  f = Reshape (x, many)
  %s
}
"""
OPEN = "y = Identity (f)"
GUARD = "i = Cast <to = 6> (seen) m = ReduceMax <keepdims = 1> (i, last) any = Cast <to = 9> (m) y = Where (any, f, high)"
CAUSAL = "seen = LessOrEqual (column, row)"
WINDOW = "least = Sub (row, window) near = Greater (column, least) back = LessOrEqual (column, row) seen = And (near, back)"
PADDED = "back = LessOrEqual (column, row) seen = And (back, pad)"
# As torch 2.13 exports is_causal.
TRIANGLE = (
    "size = Concat <axis = 0> (shape, shape) ones = Expand (one, size) kept = Trilu <upper = 0> (ones) "
    "gone = Equal (kept, zero) seen = Not (gone)"
)
STRIP = TRIANGLE.replace("seen", "back") + (
    " minus = Constant <value_int = -2> () near = Trilu <upper = 1> (ones, minus) far = Equal (zero, near) close = Not (far) seen = And (back, close)"
)
GIVEN = {"low": np.array(-65504, np.float16)}
# Halves: scores up to 30 are rounded by 2**-7 before, and shares by 2**-11.
CLOSE = {"atol": 2e-2, "rtol": 2e-2}


def calls(model):
    return [n for n in walk(model) if n.domain == "optkit"]


def called(text, **given):
    after = check_pass(CallKernels(), parse(text, **GIVEN, **given), context=H100, **CLOSE)
    return calls(after)


@pytest.mark.parametrize(
    ("seen", "end", "op", "window"),
    [
        (CAUSAL, OPEN, "CausalAttention", 0),
        ("more = Greater (column, row) seen = Not (more)", OPEN, "CausalAttention", 0),
        ("next = Add (row, one) seen = Less (column, next)", OPEN, "CausalAttention", 0),
        (WINDOW, OPEN, "CausalAttention", 3),
        (TRIANGLE, OPEN, "CausalAttention", 0),
        (STRIP, OPEN, "CausalAttention", 3),
        (PADDED, GUARD, "CausalMaskedAttention", 0),
        (WINDOW.replace("seen", "both") + " seen = And (both, pad)", GUARD, "CausalMaskedAttention", 3),
    ],
)
def test_what_a_decoder_lets_queries_see_is_a_kernel(seen, end, op, window):
    (node,) = called(DECODER % (seen, end))
    assert (node.op_type, node.attributes["window"].value, node.attributes["last"].value) == (op, window, 0)
    assert [v.name for v in node.inputs[:3]] == ["q", "k", "v"]


@pytest.mark.parametrize(
    ("seen", "end"),
    [
        (CAUSAL.replace("LessOrEqual", "GreaterOrEqual"), OPEN),  # ahead alone
        (CAUSAL.replace("LessOrEqual", "Less"), OPEN),  # not even its own place
        ("far = Add (row, one) seen = LessOrEqual (column, far)", OPEN),
        ("back = LessOrEqual (column, row) near = Greater (column, row) seen = And (near, back)", OPEN),
        ("back = LessOrEqual (column, row) seen = Or (back, pad)", OPEN),
        ("twice = Mul (row, window) seen = LessOrEqual (column, twice)", OPEN),
        (TRIANGLE.replace("upper = 0", "upper = 1"), OPEN),
        (TRIANGLE.replace("(ones)", "(ones, one)"), OPEN),
        (
            TRIANGLE.replace("Equal (kept, zero)", "Equal (kept, one)").replace(
                "seen = Not (gone)", "seen = Identity (gone)"
            ),
            OPEN,
        ),
        (PADDED, OPEN),  # queries that see no key would be not a number
    ],
)
def test_other_conditions_stay_a_mask(seen, end):
    (node,) = called(DECODER % (seen, end))
    assert node.op_type == "MaskedAttention"


MASK = "mask = Where (seen, high, low)"
HIDDEN_TIMES_LOW = "hide = Not (seen) n = Cast <to = 10> (hide) mask = Mul (n, low)"
REST_TIMES_LOW = (
    "n = Cast <to = 10> (seen) unit = Cast <to = 10> (one) rest = Sub (unit, n) mask = Mul (rest, low)"
)


@pytest.mark.parametrize("spelled", [HIDDEN_TIMES_LOW, REST_TIMES_LOW])
def test_numbers_times_a_very_low_one_are_a_mask(spelled):
    (node,) = called((DECODER % (WINDOW, OPEN)).replace(MASK, spelled))
    assert (node.op_type, node.attributes["window"].value) == ("CausalAttention", 3)


@pytest.mark.parametrize(
    "spelled",
    [
        "n = Cast <to = 10> (seen) mask = Mul (n, low)",  # hides what should be seen
        "n = Cast <to = 10> (seen) two = Add (n, n) mask = Mul (two, low)",
        "n = Cast <to = 10> (seen) mask = Sub (n, low)",
    ],
)
def test_other_numbers_stay_a_mask(spelled):
    (node,) = called((DECODER % (CAUSAL, OPEN)).replace(MASK, spelled))
    assert node.op_type == "MaskedAttention"


@pytest.mark.parametrize(
    ("seen", "op"), [(CAUSAL, "CausalAttention"), ("odd = Mul (row, window) seen = LessOrEqual (column, odd)", "MaskedAttention")]
)  # fmt: skip
def test_a_mask_of_two_axes_is_the_same_for_all_heads(seen, op):
    text = (DECODER % (seen, OPEN)).replace("int64[4] down = {1, 1, -1, 1}", "int64[2] down = {-1, 1}")
    (node,) = called(text.replace("int64[4] across = {1, 1, 1, -1}", "int64[2] across = {1, -1}"))
    assert node.op_type == op
    assert op == "CausalAttention" or len(node.inputs[3].shape) == 4


def test_queries_that_become_heads_and_groups_in_one_step_are_heads():
    text = (DECODER % (CAUSAL, OPEN)).replace("float16[N, 4, S, 16] q,", "float16[N, 4, S, 8, 2] q,")
    text = text.replace(
        "int64[4] few = {0, 2, -1, 0}", "int64[4] few = {0, 2, -1, 0}, int64[4] flat = {0, 2, -1, 16}"
    )
    text = text.replace("r = Reshape (q, few)", "r = Reshape (q, flat)").replace(
        "Shape <start = 2, end = 3> (q)", "Shape <start = 2, end = 3> (k)"
    )
    (node,) = called(text)
    assert node.op_type == "CausalAttention"
    assert [str(d) for d in node.inputs[0].shape] == ["N", "4", "S", "16"]


def test_scores_that_are_scaled_masked_and_widened_for_the_softmax_are_a_kernel():
    text = (DECODER % (CAUSAL, OPEN)).replace(
        "a = Add (u, mask)",
        "half = Cast <to = 10> (one) h = Mul (u, half) b = Add (h, mask) a = Cast <to = 1> (b)",
    )
    text = text.replace("z = Reshape (w, few)", "g = Cast <to = 10> (w) z = Reshape (g, few)")
    text = text.replace("half = Cast <to = 10> (one) ", "").replace("Mul (u, half)", "Mul (u, factor)")
    (node,) = called(text, factor=np.array(0.25, np.float16))
    assert (node.op_type, node.attributes["scale"].value) == ("CausalAttention", 0.25)


def test_a_mask_that_hides_a_little_stays_a_mask():
    model = parse(DECODER % (CAUSAL, OPEN), low=np.array(-5, np.float16))
    (node,) = calls(check_pass(CallKernels(), model, context=H100, **CLOSE))
    assert node.op_type == "MaskedAttention"


def test_heads_that_are_grouped_in_a_way_that_is_not_known_are_left_alone():
    text = (DECODER % (CAUSAL, OPEN)).replace(" int64[4] few = {0, 2, -1, 0},", "")
    text = text.replace("bool[N, 1, 1, S] pad", "int64[4] few")
    few = {"few": np.array([0, 2, -1, 0], np.int64)}
    after = check_pass(CallKernels(), parse(text, **GIVEN), context=H100, **CLOSE, **few)
    assert calls(after) == []


def test_a_constant_in_front_of_the_queries_becomes_the_scale():
    text = (
        (DECODER % (CAUSAL, OPEN))
        .replace("Reshape (q, few)", "Reshape (h, few)")
        .replace("  r =", "  h = Mul (q, half)\n  r =")
    )
    (node,) = called(text, half=np.array(0.5, np.float16))
    assert node.attributes["scale"].value == 0.5
    assert node.inputs[0].name == "q"


STEP = """
<ir_version: 10, opset_import: ["" : 21]>
g (float16[N, 4, 1, 16] q, float16[N, 2, T, 16] k, float16[N, 2, T, 16] v, float16[N, %s, 1, T] mask) => (float16[N, 4, 1, 16] y)
<int64[4] few = {0, 2, -1, 0}, int64[4] many = {0, 4, -1, 0}> {
  t = Transpose <perm = [0, 1, 3, 2]> (k)
  r = Reshape (q, few)
  p = MatMul (r, t)
  u = Reshape (p, many)
  a = Add (u, mask)
  w = Softmax (a)
  z = Reshape (w, few)
  x = MatMul (z, v)
  y = Reshape (x, many)
}
"""


@pytest.mark.parametrize(
    ("heads", "ops"), [(1, ["Reshape", "MaskedAttention", "Reshape"]), (4, ["MaskedAttention"])]
)
def test_one_query_of_heads_that_share_keys_reads_them_once(heads, ops):
    after = check_pass(CallKernels(), parse(STEP % heads), context=H100, ops=ops, **CLOSE)
    (node,) = calls(after)
    problem = KERNELS["masked-attention"]().problem(node)
    assert problem["few"]
    assert problem["share"] == (1 if heads == 1 else 2)


CACHE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 2, P, 16] past, float[N, 2, S, 16] k, float[S, P] u) => (float[S, T] mask)
<int64 zero = {0}, int64 one = {1}, float high = {0}, int64[1] first = {0}, int64[1] second = {1}> {
  keys = Concat <axis = 2> (past, k)
  all = Shape <start = 2, end = 3> (keys)
  length = Squeeze (all)
  place = Range (zero, length, one)
  column = Unsqueeze (place, first)
  new = Shape <start = 2, end = 3> (k)
  count = Squeeze (new)
  old = Shape <start = 2, end = 3> (%s)
  start = Squeeze (old)
  step = Range (zero, count, one)
  moved = Add (step, start)
  row = Unsqueeze (moved, second)
  seen = LessOrEqual (column, row)
  mask = Where (seen, high, low)
}
"""


@pytest.mark.parametrize(("cache", "last"), [("past", True), ("k", None)])
def test_queries_behind_a_cache_stand_at_the_last_keys(cache, last):
    model = parse(CACHE % cache, low=np.array(-np.inf, np.float32))
    values = {v.name: v for node in model.graph for v in node.outputs}
    found = sight(values["mask"], values["keys"])
    assert (found.last and not found.causal) if last else isinstance(found, str)


def test_the_cache_of_another_layer_is_as_long():
    text = (CACHE % "other").replace(
        "float[N, 2, P, 16] past,", "float[N, 2, P, 16] past, float[N, 2, P, 16] other,"
    )
    model = parse(text, low=np.array(-np.inf, np.float32))
    values = {v.name: v for node in model.graph for v in node.outputs}
    assert sight(values["mask"], values["keys"]).last


@pytest.mark.parametrize(("index", "last"), [(2, True), (-2, True), (1, False), (3, False)])
def test_the_length_of_a_cache_may_be_picked_out_of_its_shape(index, last):
    text = (CACHE % "past").replace("old = Shape <start = 2, end = 3> (past)", "old = Shape (past)")
    text = text.replace("start = Squeeze (old)", "start = Gather (old, at)").replace(
        "int64 zero", f"int64 at = {{{index}}}, int64 zero"
    )
    model = parse(text, low=np.array(-np.inf, np.float32))
    values = {v.name: v for node in model.graph for v in node.outputs}
    found = sight(values["mask"], values["keys"])
    assert (not isinstance(found, str) and found.last) == last


def test_fewer_queries_than_keys_are_joined_do_not_stand_last():
    text = (
        (CACHE % "past")
        .replace("float[S, P] u) => (float[S, T]", "float[R, P] u) => (float[R, T]")
        .replace("Shape <start = 2, end = 3> (k)", "Shape <end = 1> (u)")
    )
    model = parse(text, low=np.array(-np.inf, np.float32))
    values = {v.name: v for node in model.graph for v in node.outputs}
    assert "stand at the end" in sight(values["mask"], values["keys"])


def operator(heads, inputs, attributes, more=""):
    return f"""
<ir_version: 10, opset_import: ["" : 23]>
g (float16[N, 4, S, 32] q, float16[N, {heads}, T, 32] k, float16[N, {heads}, T, 32] v{inputs}) => (float16[N, 4, S, 32] y) {{
  y = Attention {attributes} (q, k, v{more})
}}
"""


def lowered(text):
    """The model as it is loaded, and with what the recipes do to attention."""
    before = load(onnx.parser.parse_model(text).SerializeToString(), check=False)
    model = before.clone()
    run_passes(model, Recipe.load("triton-fp32").passes, H100)
    return before, model


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        (operator(4, "", ""), ["Attention"]),
        (operator(1, "", ""), ["Attention"]),
        (operator(4, "", "<is_causal = 1>"), ["CausalAttention"]),
        (operator(2, "", "<is_causal = 1, scale = 0.25>"), ["CausalAttention"]),
        (
            operator(2, ", float16[N, 1, S, T] m", "", ", m"),
            ["MaskedAttention", "ReduceMax", "Equal", "Where"],
        ),
    ],
)  # fmt: skip
def test_the_operator_of_onnx_is_one_call(text, ops):
    before, model = lowered(text)
    assert [n.op_type for n in walk(model) if n.op_type != "Cast"] == ops
    random = np.random.default_rng(0)
    sizes = {"N": 2, "S": 5, "T": 7}
    feeds = {
        v.name: random.standard_normal([sizes.get(str(d), d) for d in v.shape]).astype(np.float16)
        for v in before.graph.inputs
    }
    feeds = {k: np.where(x < 0.5, x, -np.inf).astype(np.float16) if k == "m" else x for k, x in feeds.items()}
    if "m" in feeds:
        feeds["m"][0, 0, 2] = -np.inf  # a query that sees no key
    expected, found = (ReferenceSession(m, optimize=False).run(feeds)["y"] for m in (before, model))
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), **CLOSE)


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize(
    ("heads", "attributes", "op"), [(2, "<is_causal = 1>", "CausalAttention"), (4, "", "Attention")]
)
def test_the_operator_of_onnx_with_a_cache_is_one_call(opset, heads, attributes, op):
    text = f"""
<ir_version: 11, opset_import: ["" : {opset}]>
g (float16[N, 4, S, 32] q, float16[N, {heads}, S, 32] k, float16[N, {heads}, S, 32] v, float16[N, {heads}, P, 32] pk,
   float16[N, {heads}, P, 32] pv) => (float16[N, 4, S, 32] y, float16[N, {heads}, T, 32] nk, float16[N, {heads}, T, 32] nv) {{
  y, nk, nv = Attention {attributes} (q, k, v, , pk, pv)
}}
"""
    _, model = lowered(text)
    assert [n.op_type for n in walk(model)] == ["Concat", "Concat", op]
    assert op == "Attention" or calls(model)[0].attributes["last"].value == 1
    random = np.random.default_rng(0)
    sizes = {"N": 2, "S": 5, "P": 3}
    feeds = {
        v.name: random.standard_normal([sizes.get(str(d), d) for d in v.shape]).astype(np.float16)
        for v in model.graph.inputs
    }
    expected = ReferenceEvaluator(onnx.parser.parse_model(text)).run(None, feeds)
    found = ReferenceSession(model, optimize=False).run(feeds)
    for right, name in zip(expected, ("y", "nk", "nv"), strict=True):
        np.testing.assert_allclose(found[name].astype(np.float32), right.astype(np.float32), **CLOSE)


def test_scores_that_are_squashed_are_no_kernel():
    _, model = lowered(operator(4, "", "<softcap = 5.0>"))
    assert calls(model) == []


ROWS = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, 4, 3, 8] q, float[2, 4, 8, 4] k, float[2, 4, 4, 8] v, float[2, 1, 3, 4] m) => (float[2, 4, 3, 8] y)
<float zero = {0}, int64[1] last = {%s}> {
  s = MatMul (q, k)
  a = Add (s, m)
  p = Softmax (a)
  h = ReduceMax <keepdims = 1> (m, last)
  e = Equal (h, low)
  w = Where (e, %s, p)
  y = MatMul (w, v)
}
"""
HIDDEN = np.where(np.random.default_rng(1).random((2, 1, 3, 4)) < 0.6, -np.inf, 0).astype(np.float32)
HIDDEN[1, 0, 1] = -np.inf


def test_rows_of_an_infinite_mask_are_asked_behind_the_product():
    model = parse(ROWS % (-1, "zero"), low=np.array(-np.inf, np.float32))
    ops = ["MatMul", "Add", "Softmax", "MatMul", "ReduceMax", "Equal", "Where"]
    check_pass(CleanAttention(), model, ops=ops, m=HIDDEN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{-1}", "{1}"),
        ("Where (e, zero, p)", "Where (e, one, p)"),
        ("Equal (h, low)", "Equal (h, one)"),
        ("Softmax (a)", "Exp (a)"),
        ("Softmax (a)", "Softmax <axis = 1> (a)"),
    ],
)
def test_rows_that_are_asked_for_something_else_stay(old, new):
    text = (
        (ROWS % (-1, "zero"))
        .replace(old, new)
        .replace("float zero = {0}", "float zero = {0}, float one = {1}")
    )
    model = parse(text, low=np.array(-np.inf, np.float32))
    before = [n.op_type for n in model.graph]
    after = check_pass(CleanAttention(), model, m=np.zeros_like(HIDDEN))
    assert [n.op_type for n in after.graph] == before


def test_the_kernel_reads_a_mask_in_float32():
    text = (DECODER % (PADDED, GUARD)).replace(
        "a = Add (u, mask)", "b = Cast <to = 1> (u) c = Cast <to = 1> (mask) a = Add (b, c)"
    )
    text = text.replace("z = Reshape (w, few)", "g = Cast <to = 10> (w) z = Reshape (g, few)")
    (node,) = called(text)
    assert node.op_type == "CausalMaskedAttention"
    assert node.inputs[3].dtype == ir.DataType.FLOAT16
