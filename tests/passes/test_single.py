"""A graph in float16 or float64 computed in float32, held against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import graphs, text, walk
from optkit.passes.base import Context
from optkit.passes.lowering.single import NarrowDoubles, WidenHalves
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\ng '
# Numbers of float16 stand as their bits: its lowest, 2 and 0.5.
GRAPH = """(float16[N, 8] x, bool c, float[N, 8] s) => (float16[N, 8] y, float[N, 8] z, float16[N, 8] x2, float16[1] k)
<float16 low = {64511}> {
  h = Cast<to = 10>(s)  m = MatMul(x, w)  a = Add(m, h)
  y = If(c) <then_branch = t () => (float16[N, 8] ty) { f = Constant<value = float16[1] {16384}>() ty = Mul(a, f) },
             else_branch = e () => (float16[N, 8] ey) { ey = Max(a, low) }>
  z = Cast<to = 1>(a)
  n = ConstantOfShape<value = float16[1] {14336}>(shape)  x2 = Add(x, n)  k = Identity(half)
}"""


def _model():
    random = np.random.default_rng(0)
    return parse(
        HEAD + GRAPH, w=random.normal(size=(8, 8)).astype(np.float16), shape=np.array([8]), half=np.array([0.25], np.float16),
    )  # fmt: skip


def _run(model):
    return WidenHalves().run(model, Context(target=target("android-cpu")))


def test_inputs_and_outputs_keep_their_types_and_all_between_is_float32():
    model = _model()
    before = [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]
    assert _run(model)
    assert [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)] == before
    halves = {v.name for g in graphs(model) for n in g for v in n.outputs if v.dtype == ir.DataType.FLOAT16}
    assert halves == {"y", "x2", "k"}
    for node in walk(model):
        if node.op_type == "Cast" and node.outputs[0].name not in halves:
            assert node.attributes["to"].value == ir.DataType.FLOAT
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.FLOAT


def test_numbers_are_those_of_fewer_roundings():
    model = _model()
    _run(model)
    for seed in (0, 1):
        feeds = random_feeds(model, seed=seed)
        feeds["c"] = np.array(bool(seed))
        found = ReferenceSession(model).run(feeds)
        x, s, w = (
            a.astype(np.float64)
            for a in (feeds["x"], feeds["s"], _model().graph.initializers["w"].const_value.numpy())
        )
        a = x @ w + s
        expected = {"y": 2 * a if seed else a, "z": a, "x2": x + 0.5, "k": np.array([0.25])}
        for name, value in expected.items():
            tolerance = 1e-6 if found[name].dtype == np.float32 else 2**-11
            np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_graph_in_float32_and_one_that_was_widened_stay():
    plain = parse(HEAD + "(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    assert _run(plain) == []
    model = _model()
    _run(model)
    before = text(model)
    assert _run(model) == [] and text(model) == before, "a second run changes nothing"


# Angles of positions, as rotary embeddings compute them, and a mask of float64's lowest number.
DOUBLES = """(int64[N] p, float[N, 4] x) => (float[N, 4] y, float[N, 4] z) <double low = {-1.7e308}, double none = {0}> {
  d = Cast<to = 11>(p) u = Unsqueeze(d, last) a = Mul(u, rates) c = Cos(a) f = Cast<to = 1>(c) y = Mul(x, f)
  n = Less(a, one) m = Where(n, none, low) e = Exp(m) z = Cast<to = 1>(e)
}"""


def _doubles():
    return parse(
        HEAD + DOUBLES, last=np.array([-1]), rates=np.array([1, 0.1, 0.01, 0.001]), one=np.array(1.0),
    )  # fmt: skip


def test_float64_between_inputs_and_outputs_is_computed_in_float32():
    model, feeds = _doubles(), {"p": np.arange(50), "x": np.ones((50, 4), np.float32)}
    assert NarrowDoubles().run(model, Context(target=target("l4")))
    assert not any(v.dtype == ir.DataType.DOUBLE for n in walk(model) for v in n.outputs)
    found, expected = ReferenceSession(model).run(feeds), ReferenceSession(_doubles()).run(feeds)
    # An angle of 49 has 18 bits behind the point in float32.
    np.testing.assert_allclose(found["y"], expected["y"], atol=4e-6)
    np.testing.assert_array_equal(found["z"], expected["z"])
    assert not np.isinf(model.graph.initializers["low"].const_value.numpy()).any()
