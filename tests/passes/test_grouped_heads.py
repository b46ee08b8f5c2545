"""Keys and values repeated for several heads, as torch 2.13 writes it for transformers 5 (``repeat_kv``)."""

from __future__ import annotations

import pytest

from optkit.passes.fusion.grouped_heads import GroupHeads
from optkit.testing import check_pass, parse

# What `fold-shapes` knows about the repeated heads is stated here: [B, 2, 3, S, 8], then [B, 6, S, 8].
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[%(queries)s] q, float[B, 2, S, 8] k) => (float[%(out)s] y)
<int64[1] axis = {%(axis)s}, int64[1] three = {3}, int64[1] two = {2}, int64[1] eight = {8}, int64[1] heads = {6}> {
  b = Shape <start = 0, end = 1> (k)
  s = Shape <start = 2, end = 3> (k)
  u = Unsqueeze (k, axis)
  five = Concat <axis = 0> (%(five)s)
  e = Expand (u, five)
  four = Concat <axis = 0> (b, heads, s, eight)
  r = Reshape (e, four)
  %(body)s
}
"""
KEYS = {
    "queries": "B, 6, T, 8",
    "out": "B, 6, T, S",
    "axis": "2",
    "five": "b, two, three, s, eight",
    "body": "t = Transpose <perm = [0, 1, 3, 2]> (r) y = MatMul (q, t)",
}
VALUES = KEYS | {"queries": "B, 6, T, S", "out": "B, 6, T, 8", "body": "y = MatMul (q, r)"}


def _model(parts):
    return parse(MODEL % parts)


def _computing(model):
    return [n.op_type for n in model.graph if n.op_type not in ("Shape", "Concat")]


@pytest.mark.parametrize(("parts", "turned"), [(KEYS, ["Transpose"]), (VALUES, [])])
def test_groups_are_multiplied_at_once(parts, turned):
    # Sums of 8 (or as many as there are tokens) products around 1.
    after = check_pass(GroupHeads(), _model(parts), atol=1e-5)
    assert _computing(after) == [*turned, "Reshape", "MatMul", "Reshape"]


def test_one_token_at_a_time():
    import numpy as np

    random = np.random.default_rng(0)
    q, k = (random.standard_normal(s).astype(np.float32) for s in ((1, 6, 1, 8), (1, 2, 9, 8)))
    check_pass(GroupHeads(), _model(KEYS), q=q, k=k)


@pytest.mark.parametrize(
    "change",
    [
        # Each head repeated in turn: query heads 0, 2, 4 would share the first keys.
        {"axis": "1", "five": "b, three, two, s, eight"},
        # The transpose moves heads too.
        {"body": "t = Transpose <perm = [0, 1, 3, 2]> (r) v = Add (r, r) w = MatMul (q, t) z = ReduceMax (v) y = Add (w, z)"},
        {"body": "t = Transpose <perm = [0, 1, 3, 2]> (r) v = MatMul (q, t) y = Relu (v) x = Relu (r)"},
    ],
)  # fmt: skip
def test_what_is_repeated_otherwise_or_read_elsewhere_stays(change):
    before = _model(KEYS | change)
    after = check_pass(GroupHeads(), before)
    if "x = Relu" not in change.get("body", ""):
        assert _computing(after) == _computing(before)
    else:
        assert "Expand" in _computing(after)


def test_queries_of_another_batch_stay():
    before = _model(KEYS | {"queries": "1, 6, T, 8"})
    after = check_pass(GroupHeads(), before)
    assert _computing(after) == _computing(before)


def test_an_unknown_number_of_heads_stays():
    before = _model(KEYS | {"queries": "B, H, T, 8", "out": "B, 6, T, S"})
    import numpy as np

    random = np.random.default_rng(0)
    q, k = (random.standard_normal(s).astype(np.float32) for s in ((2, 6, 3, 8), (2, 2, 5, 8)))
    after = check_pass(GroupHeads(), before, q=q, k=k)
    assert _computing(after) == _computing(before)
