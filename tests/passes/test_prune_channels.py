"""Structured pruning of graphs without torch, held against the same graph with the lost weights at 0."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import PassError
from optkit.graph import verify
from optkit.passes.base import Context
from optkit.passes.pruning.structured import PruneChannels
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

_HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'

CONVS = (
    _HEADER
    + """
g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  r = Relu(a)
  y = Conv<pads = [1, 1, 1, 1]>(r, w2)
}
"""
)
RESIDUAL = (
    _HEADER
    + """
g (float[N, 3, 6, 6] x) => (float[N, 5] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1)
  n = BatchNormalization(a, scale, bias, mean, var)
  r = Relu(n)
  b = Conv<pads = [1, 1, 1, 1]>(r, w2)
  s = Add(r, b)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  y = Gemm<transB = 1>(f, w3, b3)
}
"""
)
SHUFFLE = (
    _HEADER
    + """
g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y)
<int64[2] halves = {4, 4}> {
  a = Conv(x, w1)
  l, r = Split<axis = 1>(a, halves)
  c = Conv<pads = [1, 1, 1, 1], group = 4>(r, w2)
  m = Concat<axis = 1>(l, c)
  y = Conv(m, w3)
}
"""
)
SLICED = (
    _HEADER
    + """
g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y)
<int64[1] zero = {0}, int64[1] three = {3}, int64[1] eight = {8}, int64[1] one = {1}> {
  a = Conv(x, w1)
  l = Slice(a, zero, three, one)
  r = Slice(a, three, eight, one)
  m = Concat<axis = 1>(r, l)
  y = Conv(m, w3)
}
"""
)
HEADS = (
    _HEADER
    + """
g (float[N, 5, 8] x) => (float[N, 5, 8] y)
<int64[4] split = {0, 5, 4, 2}, int64[3] join = {0, 5, 8}, float half = {0.7}> {
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  q4 = Reshape(q, split)
  k4 = Reshape(k, split)
  v4 = Reshape(v, split)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  kt = Transpose<perm = [0, 2, 3, 1]>(k4)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  s = MatMul(qt, kt)
  scaled = Mul(s, half)
  p = Softmax<axis = -1>(scaled)
  o = MatMul(p, vt)
  ot = Transpose<perm = [0, 2, 1, 3]>(o)
  oj = Reshape(ot, join)
  y = MatMul(oj, wo)
}
"""
)
# The second reshape takes its number of heads from the first, whose heads go; its own stay.
BORROWED = (
    _HEADER
    + """
g (float[N, T, 8] x) => (float[N, T, 8] y, float[N, T, 4, 2] z)
<int64[4] split = {0, 0, 4, 2}, int64[3] join = {0, 0, 8}, int64[1] none = {0}, int64[1] three = {3}, int64[1] two = {2}, int64[2] flat = {-1, 2}> {
  a = MatMul(x, w1)
  u = Reshape(a, split)
  r = Relu(u)
  m = Softmax<axis = -1>(r)
  j = Reshape(m, join)
  y = MatMul(j, w2)
  n = Shape(u)
  first = Slice(n, none, three)
  sizes = Concat<axis = 0>(first, two)
  b = MatMul(x, w3)
  c = Reshape(b, flat)
  z = Reshape(c, sizes)
}
"""
)
# The other way round: the sizes are those of what stays whole. Heads are merged with the batch in between.
LENT = (
    _HEADER
    + """
g (float[N, T, 8] x) => (float[N, T, 8] y, float[N, 4, T, 2] z)
<int64[4] split = {0, 0, 4, 2}, int64[3] join = {0, 0, 8}, int64[1] none = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] rest = {-1}> {
  u = Reshape(x, split)
  t = Transpose<perm = [0, 2, 1, 3]>(u)
  z = Relu(t)
  n = Shape(t)
  first = Slice(n, none, two)
  m = Shape(x)
  long = Slice(m, one, two)
  a = MatMul(x, w1)
  b = Reshape(a, split)
  c = Transpose<perm = [0, 2, 1, 3]>(b)
  flat = Concat<axis = 0>(rest, long, two)
  d = Reshape(c, flat)
  e = Transpose<perm = [0, 2, 1]>(d)
  sizes = Concat<axis = 0>(first, two, long)
  f = Reshape(e, sizes)
  s = Softmax<axis = 2>(f)
  h = Transpose<perm = [0, 3, 1, 2]>(s)
  j = Reshape(h, join)
  y = MatMul(j, w2)
}
"""
)
_SHAPES = {
    "lent": {"w1": (8, 8), "w2": (8, 8)},
    "borrowed": {"w1": (8, 8), "w2": (8, 8), "w3": (8, 8)},
    "convs": {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 8, 3, 3)},
    "residual": {
        "w1": (8, 3, 3, 3), "scale": (8,), "bias": (8,), "mean": (8,), "var": (8,), "w2": (8, 8, 3, 3), "w3": (5, 8),
        "b3": (5,),
    },
    "shuffle": {"w1": (8, 3, 1, 1), "w2": (4, 1, 3, 3), "w3": (4, 8, 1, 1)},
    "sliced": {"w1": (8, 3, 1, 1), "w3": (4, 8, 1, 1)},
    "heads": {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8)},
}  # fmt: skip
# Which positions are made small, by weight and axis, and so go; written down by hand.
CASES = {
    "convs": (CONVS, {"w1": {0: [1, 2, 5, 7]}, "b1": {0: [1, 2, 5, 7]}, "w2": {1: [1, 2, 5, 7]}}),
    "residual": (
        RESIDUAL,
        {
            "w1": {0: [0, 3, 4, 6]}, "scale": {0: [0, 3, 4, 6]}, "bias": {0: [0, 3, 4, 6]}, "mean": {0: [0, 3, 4, 6]},
            "var": {0: [0, 3, 4, 6]}, "w2": {0: [0, 3, 4, 6], 1: [0, 3, 4, 6]}, "w3": {1: [0, 3, 4, 6]},
        },
    ),
    # The left half of the channels is one group, the depthwise half another.
    "shuffle": (
        SHUFFLE, {"w1": {0: [0, 1, 5, 7]}, "w2": {0: [1, 3]}, "w3": {1: [0, 1, 5, 7]}}
    ),
    # The concatenation turns the order round: channel 0 is input 5 of the second convolution.
    "sliced": (SLICED, {"w1": {0: [0, 3, 4, 6]}, "w3": {1: [5, 0, 1, 3]}}),
    # Heads of two features: heads 1 and 2 of four.
    "lent": (LENT, {"w1": {1: [2, 3, 4, 5]}, "w2": {0: [2, 3, 4, 5]}}),
    "borrowed": (BORROWED, {"w1": {1: [0, 1, 6, 7]}, "w2": {0: [0, 1, 6, 7]}}),
    "heads": (HEADS, {"wq": {1: [2, 3, 4, 5]}, "wk": {1: [2, 3, 4, 5]}, "wv": {1: [2, 3, 4, 5]}, "wo": {0: [2, 3, 4, 5]}}),
}  # fmt: skip


def _weights(case, small=None, factor=1e-3):
    random = np.random.default_rng(0)
    weights = {n: random.uniform(0.5, 1.0, s) * random.choice([-1, 1], s) for n, s in _SHAPES[case].items()}
    if "var" in weights:
        weights["var"] = np.abs(weights["var"])
    for name, axes in (small or {}).items():
        for axis, positions in axes.items():
            np.moveaxis(weights[name], axis, 0)[positions] *= factor if name != "var" else 1.0
    return {n: w.astype(np.float32) for n, w in weights.items()}


def _run(model, feeds):
    return ReferenceSession(model, optimize=False).run(feeds)


def _prune(model, **options):
    context = Context(target=target("cpu"))
    return PruneChannels(**{"multiple": 1, **options}).run(model, context)


@pytest.mark.parametrize("case", CASES)
def test_the_pruned_graph_computes_what_the_masked_one_does(case):
    source, small = CASES[case]
    pruned = parse(source, **_weights(case, small))
    changes = _prune(pruned)
    verify(pruned)
    assert changes
    for name, axes in small.items():
        before, after = _SHAPES[case][name], pruned.graph.initializers[name].shape.numpy()
        assert after == tuple(n - len(axes.get(i, ())) for i, n in enumerate(before)), name
    masked = parse(source, **_weights(case, small, factor=0.0))
    for size in (1, 3):
        feeds = random_feeds(masked, size=size)
        found = _run(pruned, feeds)
        for name, expected in _run(masked, feeds).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
    assert _prune(pruned) == [], "a second run changes nothing"


def test_interface_and_size():
    model = parse(CONVS, **_weights("convs"))
    _prune(model, ratio=0.75)
    assert [(v.name, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)] == [
        ("x", "[N,3,6,6]"),
        ("y", "[N,4,6,6]"),
    ]
    assert model.graph.initializers["w2"].shape.numpy() == (4, 2, 3, 3)


def test_by_the_factors_of_batch_norms():
    weights = _weights("residual")
    weights["scale"] = np.array([9, 1, 8, 2, 7, 3, 6, 4], np.float32)
    model = parse(RESIDUAL, **weights)
    _prune(model, criterion="norm-scale")
    np.testing.assert_array_equal(model.graph.initializers["scale"].const_value.numpy(), [9, 8, 7, 6])


_LAYERS = (
    _HEADER
    + """
g (float[N, 4] x) => (float[N, 3] y) {
  a = Gemm(x, w1)
  ra = Relu(a)
  b = Gemm(ra, w2)
  rb = Relu(b)
  y = Gemm(rb, w3)
}
"""
)


def _layers(width=8, **changed):
    shapes = {"w1": (4, width), "w2": (width, width), "w3": (width, 3)}
    weights = {n: np.ones(s, np.float32) for n, s in shapes.items()} | changed
    return parse(_LAYERS, **weights)


def _widths(model):
    return [model.graph.initializers[n].shape.numpy()[1] for n in ("w1", "w2", "w3")]


def test_widths_are_rounded_up_to_what_the_target_runs_fast():
    model = _layers(48)
    _prune(model, multiple=None, ratio=0.6)
    assert _widths(model) == [32, 32, 3]  # 19 would stay, and the next multiple of 16 is 32


def test_patterns_choose_groups():
    model = _layers()
    _prune(model, targets=["w1"])
    assert _widths(model) == [4, 8, 3]
    model = _layers()
    _prune(model, ignore=["re:^w1$"])
    assert _widths(model) == [8, 4, 3]
    with pytest.raises(PassError, match="pruned 0 of 2 groups: none is named") as caught:
        _prune(_layers(), targets=["head"])
    assert "w1" in str(caught.value.hint)


def test_units_of_all_groups_are_compared_together():
    w1, w2, w3 = np.ones((4, 8), np.float32), np.ones((8, 8), np.float32), np.ones((8, 3), np.float32)
    # Of 16 units, the 8 that fall furthest behind their group: 6 of the first and 2 of the second.
    w1[:, :6] *= 0.1
    w2[:6] *= 0.1
    w2[:, 6:] *= 0.1
    w3[6:] *= 0.1
    model = _layers(w1=w1, w2=w2, w3=w3)
    _prune(model, together=True, least=0.0)
    assert _widths(model) == [2, 6, 3]


def test_a_share_of_each_group_stays():
    w1, w2 = np.ones((4, 8), np.float32) * 1e-3, np.ones((8, 8), np.float32)
    model = _layers(w1=w1, w2=w2)
    _prune(model, ratio=0.9, least=0.5)
    assert _widths(model) == [4, 4, 3]


def test_nothing_to_prune_is_an_error():
    alone = _HEADER + "g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }"
    with pytest.raises(PassError, match=r"pruned 0 of 0 groups: nothing can go \(.*an output of the model"):
        _prune(parse(alone, w=np.ones((4, 3), np.float32)))
    with pytest.raises(PassError, match="nothing would be pruned: 2 groups of units") as caught:
        _prune(_layers(16), multiple=16)
    assert "multiple" in str(caught.value.hint)


# What lies between two convolutions of eight channels and ties the channels down, with the reason.
TIED = {
    "an output": ("z = Identity(a)", ["z"], "an output of the model"),
    "softmax over channels": ("s = Softmax<axis = 1>(a)", [], "Softmax runs over it"),
    "layer norm": ("s = LayerNormalization<axis = 1>(a, ln)", [], "LayerNormalization computes statistics"),
    "a sum over channels": ("t = ReduceSum(a, axes)\n s = Mul(t, a)", [], "ReduceSum runs over it"),
    "chosen by number": ("s = Gather<axis = 1>(a, order)", [], "chosen by index"),
    "steps": ("h = Slice(a, zero, eight, one, two)\n s = Concat<axis = 1>(h, h)", [], "Slice with steps"),
    "an unknown operator": ("s = LRN<size = 3>(a)", [], "read by LRN"),
    "a reshape to a size of the input": ("n = Shape(a)\n s = Reshape(a, n)", [], ""),
}


@pytest.mark.parametrize("case", TIED)
def test_what_ties_channels_down_keeps_them(case):
    body, outputs, reason = TIED[case]
    made = "".join(f", float[N, 8, 6, 6] {name}" for name in outputs)
    source = f"""{_HEADER}
    g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y{made})
    <int64[1] axes = {{1}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] eight = {{8}},
     int64[8] order = {{7, 6, 5, 4, 3, 2, 1, 0}}> {{
      a = Conv(x, w1)
      {body}
      r = Relu({"a" if outputs else "s"})
      y = Conv(r, w2)
    }}"""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.standard_normal((8, 3, 1, 1)).astype(np.float32),
        "w2": random.standard_normal((4, 8, 1, 1)).astype(np.float32),
    }
    if "ln" in body:
        weights["ln"] = np.ones((8, 6, 6), np.float32)
    if not reason:
        model = parse(source, **weights)
        _prune(model)
        assert model.graph.initializers["w1"].shape.numpy()[0] == 4
        return
    with pytest.raises(PassError, match="nothing can go") as caught:
        _prune(parse(source, **weights))
    assert reason in str(caught.value)


def test_bodies_of_control_flow_are_not_looked_into():
    source = (
        _HEADER
        + """
    g (float[N, 3, 6, 6] x, bool c) => (float[N, 4, 6, 6] y) {
      a = Conv(x, w1)
      r = If(c) <
        then_branch = t () => (float[N, 8, 6, 6] o) { o = Relu(a) },
        else_branch = e () => (float[N, 8, 6, 6] p) { p = Neg(a) }
      >
      y = Conv(r, w2)
    }"""
    )
    weights = {"w1": np.ones((8, 3, 1, 1), np.float32), "w2": np.ones((4, 8, 1, 1), np.float32)}
    with pytest.raises(PassError, match="read by If, which pruning does not look into"):
        _prune(parse(source, **weights))


def test_a_kernel_with_a_scale_for_each_of_its_positions_keeps_all_of_them():
    text = _HEADER + (
        "g (float[N, 3, 20] x) => (float[N, 4, 20] y) {\n  n = Mul(v, g)\n"
        "  a = Conv<pads = [4, 4]>(x, n)\n  r = Relu(a)\n  y = Conv<pads = [0, 0]>(r, w)\n}"
    )
    random = np.random.default_rng(0)
    shapes = {"v": (8, 3, 9), "g": (1, 1, 9), "w": (4, 8, 1)}
    model = parse(text, **{k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()})
    feeds = random_feeds(model)
    changes = PruneChannels(ratio=0.5, multiple=1).run(model, Context(target=target("cpu")))
    assert [c.node for c in changes] == ["v"]
    assert model.graph.initializers["v"].shape.numpy() == (4, 3, 9)
    assert ReferenceSession(model).run(feeds)["y"].shape[1:] == (4, 20)
