from __future__ import annotations

import numpy as np

from optkit.passes.cleanup.dead import RemoveDead
from optkit.testing import check_pass


def test_what_nothing_reads_goes():
    model = check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y) <float a = {1}, float b = {2}> { d = Mul(x, b) e = Exp(d) y = Add(x, a) }
        """,
        ops=["Add"],
    )
    assert list(model.graph.initializers) == ["a"]


def test_what_only_a_body_reads_stays():
    check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) {
          s = Exp(x)
          y = If (b) <
            then_branch = yes () => (float[N] t) { u = Neg(s) t = Abs(s) },
            else_branch = no () => (float[N] e) { e = Identity(x) }
          >
        }
        """,
        ops=["Exp", "If", "Abs", "Identity"],
        b=np.array(True),
    )


def test_optional_outputs_and_absent_inputs_go():
    model = check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 3, 4, 4] x) => (float[N, 3, 2, 2] y) {
          p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
          y = Clip(p, , )
        }
        """,
        ops=["MaxPool", "Clip"],
    )
    pool, clip = model.graph
    assert (len(pool.outputs), len(clip.inputs)) == (1, 1)


def test_required_outputs_stay():
    model = check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 4] x) => (int64[N, 1] y) <int64[1] k = {1}> { v, y = TopK(x, k) }
        """,
        ops=["TopK"],
    )
    assert len(model.graph[0].outputs) == 2


def test_an_output_of_a_conditional_that_nothing_reads_goes_from_both_branches():
    model = check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) {
          p, y, q = If (b) <
            then_branch = yes () => (float[N] t0, float[N] t1, float[N] t2) { t0 = Exp(x) t1 = Neg(x) t2 = Abs(x) },
            else_branch = no () => (float[N] e0, float[N] e1, float[N] e2) { e0 = Sin(x) e1 = Cos(x) e2 = Tan(x) }
          >
        }
        """,
        ops=["If", "Neg", "Cos"],
        b=np.array(True),
    )
    assert [o.name for o in model.graph[0].outputs] == ["y"]


def test_functions_that_nothing_calls_go():
    model = check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21, "my" : 1]>
        g (float[N] x) => (float[N] y) { y = my.outer(x) }
        <domain: "my", opset_import: ["" : 21, "my" : 1]> outer (a) => (b) { b = my.inner(a) }
        <domain: "my", opset_import: ["" : 21]> inner (a) => (b) { b = Neg(a) }
        <domain: "my", opset_import: ["" : 21]> alone (a) => (b) { b = Exp(a) }
        """,
        ops=["outer"],
    )
    assert [name for _, name, _ in model.functions] == ["outer", "inner"]


def test_what_only_a_dead_body_read_goes_too():
    check_pass(
        RemoveDead(),
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x, bool b) => (float[N] y) {
          s = Exp(x)
          d = If (b) <
            then_branch = yes () => (float[N] t) { t = Neg(s) },
            else_branch = no () => (float[N] e) { e = Abs(s) }
          >
          y = Relu(x)
        }
        """,
        ops=["Relu"],
        b=np.array(True),
    )
