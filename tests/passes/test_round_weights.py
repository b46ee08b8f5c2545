"""Weights on float16's grid, held against NumPy's own conversion."""

from __future__ import annotations

import numpy as np

from optkit.passes.base import Context
from optkit.passes.quantization.halves import RoundWeights
from optkit.targets import target
from optkit.testing import parse

SOURCE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 8] x, int64[N] i) => (float[N, 6] y) {
  m = MatMul(x, product) t = Gather(table, i) s = Add(m, t) a = MatMul(s, wide) y = Add(a, bias)
}
"""


def _model():
    random = np.random.default_rng(0)
    shapes = {"product": (8, 6), "table": (9, 6), "wide": (6, 6), "bias": (6,)}
    weights = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    weights["wide"][2, 3] = 65520
    return parse(SOURCE, **weights), weights


def _run(model, **options):
    return RoundWeights(smallest=1, **options).run(model, Context(target=target("android-cpu")))


def test_weights_and_tables_are_the_nearest_of_float16_and_others_as_they_were():
    model, weights = _model()
    changes = _run(model)
    assert [c.detail for c in changes] == ["MatMul weights to float16", "Gather weights to float16"]
    for name, before in weights.items():
        after = model.graph.initializers[name].const_value.numpy()
        assert after.dtype == np.float32
        rounded = before.astype(np.float16).astype(np.float32) if name in ("product", "table") else before
        np.testing.assert_array_equal(after, rounded, err_msg=name)
    assert _run(model) == [], "a second run changes nothing"


def test_what_is_ignored_or_small_stays():
    model, weights = _model()
    assert len(_run(model, ignore=("Gather",))) == 1
    np.testing.assert_array_equal(model.graph.initializers["table"].const_value.numpy(), weights["table"])
    model, _ = _model()
    assert RoundWeights().run(model, Context(target=target("android-cpu"))) == []
