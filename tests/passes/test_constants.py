from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.cleanup import constants
from optkit.passes.cleanup.constants import FoldConstants, LiftConstants
from optkit.targets import target
from optkit.testing import check_pass, parse

CONTEXT = Context(target=target("cpu"))


def test_constants_become_initializers_in_bodies_too():
    model = check_pass(
        LiftConstants(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) {
          one = Constant<value_float = 1.0>()
          s = Add(x, one)
          y = If (b) <
            then_branch = yes () => (float[N] t) { two = Constant<value_floats = [2.0]>() t = Mul(s, two) },
            else_branch = no () => (float[N] e) { e = Identity(s) }
          >
        }
        """,
        ops=["Add", "If", "Mul", "Identity"],
        b=np.array(True),
    )
    assert not any(node.op_type == "Constant" for node in walk(model))
    assert list(model.graph.initializers) == ["one"]


def test_a_constant_that_is_an_output_stays():
    model = check_pass(
        LiftConstants(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, float z) { z = Constant<value_float = 1.0>() y = Relu(x) }
        """,
        ops=["Relu"],
    )
    assert [node.op_type for node in walk(model)] == ["Constant", "Relu"]


CHAIN = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 2] x) => (float[N, 2] y)
<float[2] a = {1, 2}, float[2] b = {3, 5}> {
  i = Constant<value_ints = [0]>()
  p = Mul(a, b)
  q = Exp(p)
  r = Unsqueeze(q, i)
  y = Add(x, r)
}
"""


def test_chains_of_constants_are_computed():
    model = parse(CHAIN)
    LiftConstants().run(model, CONTEXT)
    after = check_pass(FoldConstants(), model, ops=["Add"], atol=0, rtol=0)
    assert list(after.graph.initializers) == ["r"]


def test_folding_gives_the_bits_that_onnx_runtime_computes():
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (float[4] y) <float[4] a = {0.1, 0.7, 1.3, 2.9}> {
          t = Tanh(a)
          e = Erf(t)
          p = Softmax(e)
          y = Add(x, p)
        }
        """
    )
    check_pass(FoldConstants(), source, ops=["Add"], atol=0, rtol=0, x=np.zeros(4, np.float32))


def test_random_operators_are_not_folded():
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (float[4] y) <float[4] a = {0, 0, 0, 0}> {
          r = RandomNormalLike(a)
          y = Add(x, r)
        }
        """
    )
    assert not FoldConstants().run(model, CONTEXT)


def test_quantized_weights_stay_quantized():
    check_pass(
        FoldConstants(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (float[4] y) <int8[4] w = {1, 2, 3, 4}, float s = {0.5}, int8 z = {0}> {
          d = DequantizeLinear(w, s, z)
          y = Add(x, d)
        }
        """,
        ops=["DequantizeLinear", "Add"],
    )


EXPAND = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, %(size)d] x) => (float[N, %(size)d] y) <float[1] a = {2}, int64[1] n = {%(size)d}> {
  e = Expand(a, n)
  y = Add(x, e)
}
"""


@pytest.mark.parametrize(("size", "ops"), [(16, ["Add"]), (17, ["Expand", "Add"])])
def test_folding_adds_no_more_than_max_bytes(size, ops):
    # 16 floats less the 4 + 8 bytes of the inputs that go are 52 bytes; 17 are 56.
    check_pass(FoldConstants(max_bytes=52), EXPAND % {"size": size}, ops=ops)


def test_a_result_without_bound_is_never_computed():
    model = parse(EXPAND % {"size": 1 << 40})
    assert not FoldConstants().run(model, CONTEXT)


def test_integer_division_by_zero_is_left_to_the_runtime():
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (int64[1] x) => (int64[1] y) <int64[1] a = {1}, int64[1] zero = {0}> { d = Div(a, zero) y = Add(x, d) }
        """
    )
    assert not FoldConstants().run(model, CONTEXT)


def test_a_node_that_cannot_be_computed_is_left_and_the_others_are_folded():
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1] x) => (float[1] y) <float[2] a = {1, 2}, int64[1] far = {7}, float[1] b = {3}> {
          g = Gather(a, far)
          e = Exp(b)
          s = Add(g, e)
          y = Add(x, s)
        }
        """
    )
    FoldConstants().run(model, CONTEXT)
    assert [node.op_type for node in walk(model)] == ["Gather", "Add", "Add"]


@pytest.mark.parametrize(("widen", "ops"), [(False, ["Cast", "Add"]), (True, ["Add"])])
def test_weights_stored_in_half_precision_are_widened_only_if_asked(widen, ops):
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 40000] x) => (float[N, 40000] y) { c = Cast<to = 1>(w) y = Add(x, c) }
        """,
        w=np.random.default_rng(0).standard_normal(40000).astype(np.float16),
    )
    check_pass(FoldConstants(widen=widen), model, ops=ops)


BRANCH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N] x) => (float[N] y) <bool b = {%d}, float two = {2}> {
  s = Relu(x)
  y = If (b) <
    then_branch = yes () => (float[N] t) <float three = {3}> { m = Mul(s, two) t = Add(m, three) },
    else_branch = no () => (float[N] e) { e = Identity(x) }
  >
}
"""


@pytest.mark.parametrize(("truth", "ops"), [(1, ["Relu", "Mul", "Add"]), (0, ["Relu", "Identity"])])
def test_the_branch_of_a_constant_condition_is_inlined(truth, ops):
    check_pass(FoldConstants(), BRANCH % truth, ops=ops)


def test_an_output_of_the_graph_that_folds_is_a_constant():
    model = check_pass(
        FoldConstants(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1] x) => (float[1] y, float[1] z) <float[1] a = {1}> { z = Exp(a) y = Add(x, z) }
        """,
        ops=["Add"],
        atol=0,
    )
    assert [v.name for v in model.graph.outputs] == ["y", "z"]


def test_an_initializer_that_is_also_an_input_is_not_constant():
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1] x, float[1] a = {1}) => (float[1] y) { e = Exp(a) y = Add(x, e) }
        """
    )
    assert not FoldConstants().run(model, CONTEXT)


def test_large_weights_are_moved_about_where_they_lie():
    weights = np.random.default_rng(0).standard_normal((1600, 1400)).astype(np.float32)
    source = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 1400] x) => (float[N, 1600] y) { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }
        """,
        w=weights,
    )
    after = check_pass(FoldConstants(), source, ops=["MatMul"], atol=1e-3)
    tensor = after.graph.initializers["t"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    np.testing.assert_array_equal(tensor.numpy(), weights.T)


def test_what_is_evaluated_with_others_costs_few_sessions_where_one_of_them_fails_or_is_not_read(monkeypatch):
    made = []
    session = constants.ort.InferenceSession
    monkeypatch.setattr(constants.ort, "InferenceSession", lambda *a, **k: made.append(a) or session(*a, **k))
    nodes = "\n".join(f"  c{i} = Add(k, k)\n  y{i} = Add(x, c{i})" for i in range(32))
    model = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2] x) => ({", ".join(f"float[2] y{i}" for i in range(32))}, float[2] z)
    <float[2] k = {{1, 2}}, int64[1] far = {{5}}, float[2, 2] table = {{1, 2, 3, 4}}> {{
    {nodes}
      unread = Shape(k)
      none = Gather(table, far)
      row = Squeeze(none)
      z = Add(x, row)
    }}
    """
    FoldConstants().run(parse(model), Context(target=target("cpu")))
    assert len(made) < 16
