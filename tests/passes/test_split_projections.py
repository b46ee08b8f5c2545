"""Products that queries, keys and values share are taken apart, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.graph import rank
from optkit.passes.base import Context
from optkit.passes.lowering.projections import SplitProjections
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import parse

_RANDOM = np.random.default_rng(0)
W = {
    "w": _RANDOM.standard_normal((32, 48)).astype(np.float32),
    "b": _RANDOM.standard_normal(48).astype(np.float32),
}
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
# As timm writes it, and as GPT-2's exports have it.
HEADS = """g (float[N, 5, 32] x) => (float[N, 2, 5, 8] q, float[N, 2, 5, 8] k, float[N, 2, 5, 8] v) {
  m = MatMul(x, w)
  a = Add(b, m)
  form = Constant <value_ints = [-1, 5, 3, 2, 8]> ()
  r = Reshape(a, form)
  t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
  one = Constant <value_ints = [1, 1, 1]> ()
  q1, k1, v1 = Split <axis = 0> (t, one)
  first = Constant <value_ints = [0]> ()
  q = Squeeze(q1, first)
  k = Squeeze(k1, first)
  v = Squeeze(v1, first)
}"""
COLUMNS = """g (float[N, 5, 32] x) => (float[N, 5, 32] y, float[N, 5, 16] z) {
  m = MatMul(x, w)
  a = Add(m, b)
  sizes = Constant <value_ints = [32, 16]> ()
  y, z = Split <axis = -1> (a, sizes)
}"""
CASES = {"heads": (HEADS, [16, 16, 16]), "columns": (COLUMNS, [32, 16]), "no bias": (COLUMNS.replace("a = Add(m, b)", "a = Identity(m)").replace("a = Identity(m)\n", "").replace("(a, sizes)", "(m, sizes)"), [32, 16])}  # fmt: skip


def _changed(text):
    model = parse(HEAD + text, **{k: v for k, v in W.items() if f"{k})" in text or f"({k}," in text})
    before = model.clone()
    return before, model, SplitProjections().run(model, Context(target=target("l4")))


@pytest.mark.parametrize("name", CASES)
def test_each_part_gets_a_product_of_its_own_and_the_numbers_stay(name):
    text, sizes = CASES[name]
    before, model, changes = _changed(text)
    assert [c.detail for c in changes] == [f"{len(sizes)} products of {', '.join(map(str, sizes))} columns"]
    products = [n for n in model.graph if n.op_type == "MatMul"]
    assert [n.inputs[1].const_value.shape.numpy() for n in products] == [(32, s) for s in sizes]
    assert not [n for n in model.graph if n.op_type == "Split"]
    for count in (1, 3):
        feeds = {"x": np.random.default_rng(count).standard_normal((count, 5, 32)).astype(np.float32)}
        expected, found = ReferenceSession(before).run(feeds), ReferenceSession(model).run(feeds)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        # Heads first: the columns of a part do not lie together.
        HEADS.replace("[-1, 5, 3, 2, 8]", "[-1, 5, 2, 3, 8]").replace("[2, 0, 3, 1, 4]", "[3, 0, 2, 1, 4]"),
        # Rows are split, not columns.
        COLUMNS.replace("[32, 16]", "[2, 3]").replace("axis = -1", "axis = 1").replace("float[N, 5, 32] y, float[N, 5, 16] z", "float[N, 2, 48] y, float[N, 3, 48] z"),
        # What was computed is read elsewhere too.
        COLUMNS.replace("float[N, 5, 16] z)", "float[N, 5, 16] z, float[N, 5, 48] a)"),
        # The matrix is no constant.
        COLUMNS.replace("(float[N, 5, 32] x)", "(float[N, 5, 32] x, float[32, 48] u)").replace("MatMul(x, w)", "MatMul(x, u)"),
    ],
    ids=["heads first", "rows", "read elsewhere", "no constant"],
)  # fmt: skip
def test_what_does_not_go_apart_stays(text):
    _, model, changes = _changed(text)
    assert changes == [] and sum(n.op_type == "MatMul" for n in model.graph) == 1


def test_an_axis_that_squeezes_alone_read_is_never_made():
    """Four axes are what the Neural Engine works on; of two readers one may want it."""
    _, model, _ = _changed(HEADS)
    assert max(rank(v) for n in model.graph for v in n.outputs) == 4
    both = HEADS.replace("float[N, 2, 5, 8] v)", "float[N, 2, 5, 8] v, float[1, N, 2, 5, 8] v1)")
    before, model, _ = _changed(both)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)}
    expected, found = ReferenceSession(before).run(feeds), ReferenceSession(model).run(feeds)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "name", "apart"),
    [(HEADS, "apple-ane", True), (HEADS, "iphone15", False), (COLUMNS, "apple-ane", False), (HEADS, "cpu", False)],
)  # fmt: skip
def test_wide_alone_leaves_products_together_where_the_target_takes_as_many_axes(text, name, apart):
    model = parse(HEAD + text, **W)
    changes = SplitProjections(wide=True).run(model, Context(target=target(name)))
    assert bool(changes) == apart
