"""Fewer axes where a target takes no more: the same numbers over runs of axes that nothing takes apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.graph import rank, walk
from optkit.passes.base import Context
from optkit.passes.lowering.joining import JoinAxes
from optkit.targets import target
from optkit.testing import check_pass, parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
FIVE = Context(target=target("iphone15"))
FOUR = Context(target=target("apple-ane"))
# Places of deformable attention: offsets for each head, level and point, scaled for each level, around a reference.
DEFORMABLE = (
    HEAD
    + """g (float[%s, 7, 96] x, float[%s, 7, 4] r) => (float[%s, 7, 4, 4, 2] y, float[%s, 28, 24] z)
<int64[6] shape = {-1, 7, 4, 3, 4, 2}, int64[6] wide = {-1, 7, 1, 1, 1, 4}, int64[1] from = {2}, int64[1] to = {4}, int64[1] last = {-1},
 int64 level = {1}, int64[3] flat = {-1, 28, 24}> {
  a = Reshape(x, shape)
  b = Reshape(r, wide)
  c = Slice(b, from, to, last)
  d = Mul(a, s)
  e = Add(c, d)
  y = Gather<axis = 3>(e, level)
  z = Reshape(e, flat)
}"""
)


def _scales() -> dict[str, np.ndarray]:
    return {"s": np.random.default_rng(0).normal(size=(1, 1, 1, 3, 1, 2)).astype(np.float32)}


@pytest.mark.parametrize("batch", ["2", "N"])
def test_six_axes_become_five_and_come_back_where_one_was_taken_away(batch):
    ops = ["Reshape", "Reshape", "Slice", "Mul", "Add", "Gather", "Reshape", "Reshape"]
    model = parse(DEFORMABLE % ((batch,) * 4), **_scales())
    after = check_pass(JoinAxes(), model, ops=ops, context=FIVE)
    assert max(rank(v) for n in walk(after) for v in n.outputs) == 5
    assert not JoinAxes().run(parse(DEFORMABLE % ((batch,) * 4), **_scales()), Context(target=target("cpu")))


def test_axes_that_stay_together_are_one_through_a_transpose():
    """Of five axes the last two move as one: four are enough for the Neural Engine."""
    text = (
        HEAD
        + """g (float[2, 3, 160] x) => (float[2, 3, 160] y)
    <int64[5] shape = {2, 3, 4, 5, 8}, int64[3] back = {2, 3, 160}> {
      a = Reshape(x, shape)
      b = Transpose<perm = [0, 2, 1, 3, 4]>(a)
      c = Relu(b)
      y = Reshape(c, back)
    }"""
    )
    after = check_pass(JoinAxes(), parse(text), ops=["Reshape", "Transpose", "Relu", "Reshape"], context=FOUR)
    assert max(rank(v) for n in walk(after) for v in n.outputs) == 4
    check_pass(JoinAxes(), parse(text), ops=["Reshape", "Transpose", "Relu", "Reshape"], context=FIVE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("c = Slice(b, from, to, last)", "c = Slice(b, from, to, first)"),
        ("y = Gather<axis = 3>(e, level)", "t = Softmax<axis = 3>(e) y = Gather<axis = 3>(t, level)"),
        ("int64[3] flat = {-1, 28, 24}", "int64[3] flat = {0, 28, 24}"),
        (
            "d = Mul(a, s)",
            "t = Transpose<perm = [1, 0, 2, 3, 4, 5]>(a) u = Sin(t) v = Transpose<perm = [1, 0, 2, 3, 4, 5]>(u) d = Mul(v, q)",
        ),
    ],
    ids=[
        "an axis that is cut",
        "an operator that is not known",
        "a size that is copied from its place",
        "a scale for each of seven",
    ],
)
def test_what_takes_the_axes_apart_keeps_them(before, after):
    text = (
        (DEFORMABLE % (("7",) * 4))
        .replace(before, after)
        .replace("int64 level", "int64[1] first = {0}, int64 level")
    )
    if "first)" in after:
        text = text.replace(
            "int64[1] from = {2}, int64[1] to = {4}", "int64[1] from = {0}, int64[1] to = {1}"
        )
        text = text.replace("wide = {-1, 7, 1, 1, 1, 4}", "wide = {-1, 7, 1, 1, 2, 2}").replace(
            "x, shape", "x, shape"
        )
    weights = _scales()
    if "d = Mul(v, q)" in after:
        weights = {"q": np.random.default_rng(0).normal(size=(7, 1, 1, 3, 1, 2)).astype(np.float32)}
    if "first)" in after:
        # [1, 7, 1, 1, 2, 2] does not spread over four points.
        text = text.replace("e = Add(c, d)", "k = ReduceSum<keepdims = 1>(c, points) e = Add(k, d)").replace(
            "int64 level", "int64[1] points = {4}, int64 level"
        )
    model = parse(text, **weights)
    assert not JoinAxes().run(model, FIVE)


def test_a_target_that_takes_fewer_than_can_be_is_left_with_what_there_is():
    three = Context(target=replace(target("iphone15"), axes=3))
    assert not JoinAxes().run(parse(DEFORMABLE % (("2",) * 4), **_scales()), three)
