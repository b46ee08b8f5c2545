"""Zeros in the weights of a graph, held against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from optkit.errors import PassError
from optkit.passes.base import Context
from optkit.passes.pruning.zeros import ZeroWeights
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse, random_feeds

SOURCE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 8, 5, 5] x) => (float[N, 6] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, dense, bias)
  d = Conv<pads = [1, 1, 1, 1], group = 8>(a, depth)
  p = GlobalAveragePool(d)
  f = Flatten(p)
  m = MatMul(f, product)
  y = Gemm<transB = 1>(m, last)
}
"""
_SHAPES = {"dense": (8, 8, 3, 3), "bias": (8,), "depth": (8, 1, 3, 3), "product": (8, 32), "last": (6, 32)}


def _model():
    random = np.random.default_rng(0)
    return parse(SOURCE, **{n: random.standard_normal(s).astype(np.float32) for n, s in _SHAPES.items()})


def _weights(model):
    return {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items() if n in _SHAPES}


def _run(model, **options):
    return ZeroWeights(**options).run(model, Context(target=target("cpu")))


def test_two_of_each_four_inputs_stay_at_every_position():
    model = _model()
    before = _weights(model)
    changes = _run(model, pattern="2:4", ignore=("product",))
    after = _weights(model)
    assert [c.node for c in changes] == ["dense", "last"]
    for name in ("bias", "depth", "product"):
        np.testing.assert_array_equal(after[name], before[name])
    for name in ("dense", "last"):
        a, b = (np.moveaxis(w[name], 1, -1).reshape(-1, 4) for w in (before, after))
        for row, kept in zip(a, b, strict=True):
            # The two largest of each four as they were, the others 0.
            smallest = sorted(range(4), key=lambda i, row=row: abs(row[i]))[:2]
            np.testing.assert_array_equal(kept, [0 if i in smallest else row[i] for i in range(4)])
    assert _run(model, pattern="2:4", ignore=("product",)) == [], "a second run changes nothing"


def test_a_share_of_each_layer():
    model = _model()
    before = _weights(model)
    _run(model, sparsity=0.75)
    after = _weights(model)
    for name in ("dense", "last"):
        limit = np.sort(np.abs(before[name]), axis=None)[before[name].size * 3 // 4]
        np.testing.assert_array_equal(after[name], np.where(np.abs(before[name]) >= limit, before[name], 0))
    # Eight and nine weights an output: nothing to spare.
    for name in ("product", "depth"):
        np.testing.assert_array_equal(after[name], before[name])
    feeds = random_feeds(model)
    x = ReferenceSession(model, optimize=False).run(feeds)["y"]
    np.testing.assert_allclose(x, ReferenceSession(parse(SOURCE, **after), optimize=False).run(feeds)["y"])


def test_where_the_pattern_does_not_fit_the_layer_stays():
    source = '<ir_version: 10, opset_import: ["" : 20]>\ng (float[N, 18] x) => (float[N, 16] y) { y = MatMul(x, w) }'
    model = parse(source, w=np.ones((18, 16), np.float32))
    assert _run(model, pattern="2:4") == []


def test_nothing_to_prune_is_an_error():
    with pytest.raises(PassError, match="pruned 0 weights") as caught:
        _run(_model(), targets=("nothing*",))
    assert "targets" in str(caught.value.hint)
    with pytest.raises(ValidationError, match="write any, or N:M"):
        ZeroWeights(pattern="4:2")
