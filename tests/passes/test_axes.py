from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.cleanup.axes import MergeAxes
from optkit.testing import check_pass, parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def _graph(first, move, last, x="float[N, 64, 6]", y="float[A, B, C]", more="", attributes=""):
    return f"""{HEADER}
    g ({x} x) => ({y} y{", float[] z" if more else ""})
    <int64[{len(first)}] first = {{{", ".join(map(str, first))}}}, int64[{len(last)}] last = {{{", ".join(map(str, last))}}}> {{
      a = Reshape(x, first)
      b = {move}(a)
      y = Reshape{attributes}(b, last)
      {more}
    }}"""


WINDOWS = [0, 2, 4, 2, 4, 6]
SWAP = "Transpose<perm = [0, 1, 3, 2, 4, 5]>"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (_graph(WINDOWS, SWAP, [-1, 16, 6]), 1),
        (_graph(WINDOWS, SWAP, [0, 64, 6]), 1),
        (_graph([-1, 2, 2, 4, 4, 6], SWAP, [0, 64, 6]), 1),
        (_graph(WINDOWS, 'Einsum<equation = "nhwpqc->nchpwq">', [0, 8, 48]), 2),
        (_graph([0, 2, 4, 2, 2, 4, 3], "Transpose<perm = [0, 1, 4, 2, 5, 3, 6]>", [0, 2, 192]), 2),
        (_graph([0, 2, 4, 2, 4, 2, 3], "Transpose<perm = [6, 4, 2, 0, 5, 3, 1]>", [3, 8, -1]), 5),
    ],
    ids=["windows", "back", "from windows", "patches", "patches of frames", "all apart"],
)
def test_axes_that_stay_together_move_as_one(text, steps):
    after = check_pass(MergeAxes(), text, ops=["Reshape", "Transpose"] * steps + ["Reshape"], atol=0, rtol=0)
    assert all(len(v.shape) <= 5 for node in after.graph for v in node.outputs)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_seven_axes(seed):
    order = [int(i) for i in np.random.default_rng(seed).permutation(7)]
    check_pass(
        MergeAxes(),
        _graph(
            [2, 3, 2, 4, 2, 1, 3], f"Transpose<perm = {order}>", [12, 24], x="float[24, 12]", y="float[A, B]"
        ),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(
    "text",
    [
        _graph([0, 8, 8, 6], "Transpose<perm = [0, 2, 1, 3]>", [0, 64, 6]),
        _graph(
            WINDOWS,
            "Transpose<perm = [0, 1, 3, 2, 4, 5]>",
            WINDOWS,
            y="float[A, B, C, D, E, F]",
            more="z = Neg(b)",
        ),
        _graph(WINDOWS, "Transpose<perm = [0, 1, 3, 2, 4, 5]>", [-1, 6], y="float[A, B]", more="z = Neg(a)"),
        _graph(WINDOWS, 'Einsum<equation = "nhwpqc->nhpqc">', [-1, 6], y="float[A, B]"),
        _graph(WINDOWS, "Transpose<perm = [0, 1, 3, 2, 4, 5]>", [0, -1, 6]),
    ],
    ids=["few axes", "read otherwise", "read before", "a sum", "two sizes not known"],
)
def test_near_misses_stay(text):
    after = check_pass(MergeAxes(), text, atol=1e-6, rtol=1e-6)
    assert [n.op_type for n in after.graph] == [n.op_type for n in parse(text).graph]
