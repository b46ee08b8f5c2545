from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import ModelError
from optkit.graph import (
    attribute,
    constant,
    count_nodes,
    count_parameters,
    describe,
    digest,
    drop_unused_initializers,
    elements,
    graphs,
    initializer,
    is_float,
    rank,
    scalar,
    subgraphs,
    text,
    users,
    verify,
    walk,
    weight_bytes,
)
from optkit.testing import parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
NESTED = """
g (float[N, 2] x, bool b) => (float[N, 2] y) <float[2] w = {1, 2}, float s = {0.5}> {
  a = Mul(x, w)
  y = If (b) <
    then_branch = yes () => (float[N, 2] t) <float[1] k = {3}> { c = Add(a, k) t = Neg(c) },
    else_branch = no () => (float[N, 2] e) {
      e = If (b) <
        then_branch = inner () => (float[N, 2] u) { u = Exp(a) },
        else_branch = other () => (float[N, 2] v) { v = Mul(a, s) }
      >
    }
  >
}
"""


def _nested() -> ir.Model:
    return parse(HEAD + NESTED)


def test_every_node_is_met_bodies_after_what_holds_them():
    assert [n.op_type for n in walk(_nested())] == ["Mul", "If", "Add", "Neg", "If", "Exp", "Mul"]
    assert [g.name for g in graphs(_nested())] == ["g", "yes", "no", "inner", "other"]


def test_the_bodies_of_a_node_are_its_own_alone():
    model = _nested()
    assert [g.name for n in model.graph for g in subgraphs(n)] == ["yes", "no"]


def test_counts_reach_into_bodies_and_leave_constants_out():
    model = parse(
        HEAD
        + NESTED.replace("a = Mul(x, w)", "h = Constant<value_float = 2.0>() g = Mul(x, h) a = Mul(g, w)")
    )
    assert count_nodes(model) == 8
    assert count_parameters(model) == 2 + 1 + 1
    assert weight_bytes(model) == 16


def test_a_constant_is_an_initializer_or_a_constant_node_and_nothing_the_caller_may_replace():
    model = parse(
        HEAD + "g (float[2] x, float[2] given) => (float[2] y) <float[2] w = {1, 2}> "
        "{ c = Constant<value_float = 7.0>() a = Add(x, w) d = Mul(a, c) y = Add(d, given) }"
    )
    values = {v.name: v for n in model.graph for v in (*n.inputs, *n.outputs)}
    assert constant(values["w"]).tolist() == [1, 2]
    assert constant(values["c"]) == 7
    assert scalar(values["c"]) == 7
    assert scalar(values["w"]) is None
    whole = parse(
        HEAD + "g (float[2] x) => (float[2] y) { c = Constant<value = int64[2] {3, 4}>() y = Expand(x, c) }"
    )
    assert constant(whole.graph[0].outputs[0]).tolist() == [3, 4]
    several = parse(
        HEAD + "g (float[2] x) => (float[2] y) { c = Constant<value_ints = [3, 4]>() y = Expand(x, c) }"
    )
    assert constant(several.graph[0].outputs[0]).dtype == np.int64
    assert constant(values["x"]) is None
    assert constant(values["a"]) is None
    assert constant(None) is None
    assert scalar(None) is None
    values["given"].const_value = ir.tensor(np.ones(2, np.float32))
    model.graph.register_initializer(values["given"])
    assert constant(values["given"]) is None


def test_attributes_are_given_as_plain_values():
    model = parse(
        HEAD
        + 'g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) { y = Conv<auto_pad = "SAME_UPPER", kernel_shape = [1, 1]>(x, x) }'
    )
    (node,) = model.graph
    assert attribute(node, "auto_pad") == "SAME_UPPER"
    assert list(attribute(node, "kernel_shape")) == [1, 1]
    assert attribute(node, "group", 1) == 1
    assert attribute(node, "group") is None


def test_users_are_given_once_each():
    model = parse(HEAD + "g (float[2] x) => (float[2] y) { a = Mul(x, x) y = Add(x, a) }")
    assert [n.op_type for n in users(model.graph.inputs[0])] == ["Mul", "Add"]


def test_types_and_ranks_as_far_as_they_are_known():
    model = parse(HEAD + "g (float16[2, N] x, int64[3] i, double d) => (float16[2, N] y) { y = Neg(x) }")
    x, i, d = model.graph.inputs
    assert [is_float(v) for v in (x, i, d, None)] == [True, False, True, False]
    assert [rank(v) for v in (x, i, d, None)] == [2, 1, 0, None]
    assert [elements(v.shape) for v in (x, i, d)] == [None, 3, 1]
    assert elements(None) is None


def test_a_new_constant_gets_the_next_free_name():
    model = _nested()
    first = initializer(model.graph, "w", np.zeros(3, np.float32))
    second = initializer(model.graph, "w", np.zeros((), np.float32))
    assert [v.name for v in (first, second)] == ["w_1", "w_2"]
    assert [v.const_value.name for v in (first, second)] == ["w_1", "w_2"]
    assert second.shape.numpy() == ()


def test_what_nothing_reads_is_forgotten_in_all_bodies():
    model = _nested()
    initializer(model.graph, "idle", np.zeros(3, np.float32))
    body = next(g for g in graphs(model) if g.name == "yes")
    initializer(body, "idle_too", np.zeros(3, np.float32))
    drop_unused_initializers(model)
    assert [sorted(g.initializers) for g in graphs(model)] == [["s", "w"], ["k"], [], [], []]


def test_an_initializer_that_is_an_output_stays():
    model = parse(HEAD + "g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {1, 2}> { y = Neg(x) }")
    drop_unused_initializers(model)
    assert list(model.graph.initializers) == ["w"]


def test_a_node_is_described_by_name_operator_and_where_it_came_from():
    (node,) = parse(HEAD + "g (float[2] x) => (float[2] y) { y = Neg(x) }").graph
    assert describe(node) == "? (Neg)"
    node.name = "n1"
    node.metadata_props.update({"optkit.source": "model.py:12", "optkit.module": "head.neg"})
    assert describe(node) == "n1 (Neg: head.neg, model.py:12)"


def test_the_text_shows_structure_and_no_numbers():
    model = parse(
        HEAD
        + "g (float[N, 2] x, bool b) => (float[N, 2] y) <float[2] w = {1, 2}> { a = Mul(x, w) c = Clip(a, , a) "
        "y = If (b) <then_branch = yes () => (float[N, 2] t) { t = LeakyRelu<alpha = 0.5>(c) }, "
        "else_branch = no () => (float[N, 2] e) { e = Neg(c) }> }"
    )
    assert text(model) == (
        "(x: float[N,2], b: bool[])\n"
        "  a = Mul(x, float[2])\n"
        "  c = Clip(a, -, a)\n"
        "  y = If(b)\n"
        "    ()\n"
        "      t = LeakyRelu(c) alpha=0.5\n"
        "    -> t\n"
        "    ()\n"
        "      e = Neg(c)\n"
        "    -> e\n"
        "-> y\n"
    )


def test_a_digest_is_that_of_the_bytes_however_many(tmp_path):
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        data = bytes(i % 251 for i in range(size))
        (tmp_path / "f").write_bytes(data)
        assert digest(tmp_path / "f") == hashlib.sha256(data).hexdigest()


# What must hold between passes


def test_a_valid_graph_passes():
    verify(_nested())


def test_a_value_used_before_it_is_defined_is_named():
    model = parse(HEAD + "g (float[2] x) => (float[2] y) { a = Neg(x) y = Exp(a) }")
    first, second = model.graph
    first.name, second.name = "first", "second"
    model.graph.remove(first)
    with pytest.raises(ModelError, match=r"second \(Exp\): input 0 \(a\) is not defined before it is used"):
        verify(model)


def test_an_output_that_nothing_computes_is_named():
    model = parse(HEAD + "g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.graph.outputs[0] = ir.Value(name="z")
    with pytest.raises(ModelError, match="graph g: output 'z' is not computed"):
        verify(model)


def test_a_name_that_two_values_have_is_named():
    model = parse(HEAD + "g (float[2] x) => (float[2] y) { a = Neg(x) y = Exp(a) }")
    next(iter(model.graph)).outputs[0].name = "x"
    with pytest.raises(ModelError, match="the name 'x' is defined twice"):
        verify(model)


def test_a_body_may_read_what_came_before_it_and_nothing_after():
    model = _nested()
    if_node = model.graph[1]
    body = next(subgraphs(if_node))
    later = ir.node("Neg", [model.graph[0].outputs[0]])
    later.outputs[0].name = "later"
    model.graph.append(later)
    body[0].replace_input_with(0, later.outputs[0])
    with pytest.raises(ModelError, match=r"input 0 \(later\) is not defined before it is used"):
        verify(model)


def test_names_of_two_bodies_may_not_be_the_same():
    model = _nested()
    yes, no = subgraphs(model.graph[1])
    no[0].outputs[0].name = yes[0].outputs[0].name
    with pytest.raises(ModelError, match="defined twice"):
        verify(model)
