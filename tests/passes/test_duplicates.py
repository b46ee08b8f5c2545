from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.passes.base import Context
from optkit.passes.cleanup.duplicates import ShareDuplicates
from optkit.targets import target
from optkit.testing import check_pass, parse


def test_equal_nodes_become_one():
    check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) { a = Exp(x) b = Exp(x) c = Neg(a) d = Neg(b) y = Add(c, d) }
        """,
        ops=["Exp", "Neg", "Add"],
        atol=0,
        rtol=0,
    )


def test_other_attributes_make_other_nodes():
    check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4] x) => (float[N, 4] y) {
          a = LeakyRelu<alpha = 0.1>(x)
          b = LeakyRelu<alpha = 0.2>(x)
          y = Add(a, b)
        }
        """,
        ops=["LeakyRelu", "LeakyRelu", "Add"],
    )


def test_random_nodes_are_not_shared():
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) { a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }
        """
    )
    assert not ShareDuplicates().run(model, Context(target=target("cpu")))


def test_two_outputs_of_the_graph_stay_two():
    check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, float[N] z) { y = Exp(x) z = Exp(x) }
        """,
        ops=["Exp", "Exp"],
    )


def test_an_output_keeps_its_name_when_it_is_the_later_twin():
    check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, float[N] z) { a = Exp(x) z = Neg(a) y = Exp(x) }
        """,
        ops=["Exp", "Neg"],
    )


def test_a_body_uses_what_is_outside_and_siblings_do_not_mix():
    check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) {
          s = Exp(x)
          r = If (b) <
            then_branch = yes () => (float[N] t) { t0 = Exp(x) t1 = Sin(x) t = Add(t0, t1) },
            else_branch = no () => (float[N] e) { e1 = Sin(x) e = Neg(e1) }
          >
          y = Add(r, s)
        }
        """,
        ops=["Exp", "If", "Sin", "Add", "Sin", "Neg", "Add"],
        b=np.array(False),
    )


def test_equal_initializers_become_one_and_negative_zero_is_not_zero():
    model = check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 2] x) => (float[N, 2] y)
        <float[2] a = {1, 0}, float[2] b = {1, 0}, float[2] c = {1, -0.0}, float[1, 2] d = {1, 0}> {
          p = Add(x, a) q = Mul(p, b) r = Div(q, c) y = Sub(r, d)
        }
        """,
        ops=["Add", "Mul", "Div", "Sub"],
        x=np.ones((1, 2), np.float32),
    )
    assert list(model.graph.initializers) == ["a", "c", "d"]


def test_initializers_of_sibling_bodies_stay_and_those_of_the_outer_graph_are_used():
    model = check_pass(
        ShareDuplicates(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) <float two = {2}> {
          m = Mul(x, two)
          y = If (b) <
            then_branch = yes () => (float[N] t) <float a = {2}, float c = {3}> { t0 = Add(m, a) t = Div(t0, c) },
            else_branch = no () => (float[N] e) <float d = {3}> { e = Mul(m, d) }
          >
        }
        """,
        b=np.array(False),
    )
    yes, no = (model.graph[1].attributes[n].as_graph() for n in ("then_branch", "else_branch"))
    assert (list(model.graph.initializers), list(yes.initializers), list(no.initializers)) == (
        ["two"],
        ["c"],
        ["d"],
    )


def test_mapped_weights_are_compared_where_they_lie(tmp_path):
    weights = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 300] x) => (float[N, 300] y) { p = MatMul(x, a) y = MatMul(p, b) }
        """,
        a=weights,
        b=weights.copy(),
    )
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.data", size_threshold_bytes=0)
    loaded = ir.load(path)
    assert ShareDuplicates().run(loaded, Context(target=target("cpu")))
    (kept,) = loaded.graph.initializers.values()
    assert isinstance(kept.const_value, ir.ExternalTensor)
