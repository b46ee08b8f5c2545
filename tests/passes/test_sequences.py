from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.cleanup.sequences import SequencesToSplit
from optkit.testing import check_pass

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def _text(sizes, axis=1, places=(0, 1), shape="2, 8, N", attributes="", last=""):
    constants = f"{sizes}, int64 i = {{{places[0]}}}, int64 j = {{{places[1]}}}"
    return f"""{HEADER}
    g (float[{shape}] x) => (float[A, B, C] y, float[D, E, F] z{", " + last if last else ""}) <{constants}> {{
      s = SplitToSequence<axis = {axis}{attributes}>(x, sizes)
      a = SequenceAt(s, i)
      y = Relu(a)
      z = SequenceAt(s, j)
      {"n = SequenceLength(s)" if last else ""}
    }}"""


@pytest.mark.parametrize(
    "text",
    [
        _text("int64 sizes = {4}"),
        _text("int64 sizes = {3}", places=(2, -3)),
        _text("int64[2] sizes = {3, 5}", attributes=", keepdims = 0"),
        _text("int64[2] sizes = {3, 5}", axis=-2, places=(1, 0)),
        _text("int64[2] sizes = {2, 3}", axis=2, shape="2, 8, 5"),
        _text("int64 sizes = {4}", places=(1, 1)),
    ],
    ids=[
        "halves",
        "the last is smaller",
        "sizes win over keepdims",
        "sizes",
        "all of them",
        "the same twice",
    ],
)
def test_pieces_taken_by_number_come_from_a_split(text):
    check_pass(SequencesToSplit(), text, ops=["Split", "Relu"], atol=0, rtol=0)


def test_sizes_need_no_known_length():
    text = _text("int64[2] sizes = {2, 3}", axis=2, shape="2, 8, N")
    check_pass(
        SequencesToSplit(),
        text,
        ops=["Split", "Relu"],
        x=np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32),
        atol=0,
        rtol=0,
    )


def test_sizes_may_be_computed():
    text = f"""{HEADER}
    g (float[N, 8] x, float[M, 8] u) => (float[A, 8] y) <int64 one = {{1}}> {{
      n = Shape<start = 0, end = 1>(x)
      m = Shape<start = 0, end = 1>(u)
      sizes = Concat<axis = 0>(n, m)
      both = Concat<axis = 0>(x, u)
      s = SplitToSequence(both, sizes)
      a = SequenceAt(s, one)
      y = Neg(a)
    }}"""
    check_pass(
        SequencesToSplit(), text, ops=["Shape", "Shape", "Concat", "Concat", "Split", "Neg"], atol=0, rtol=0
    )


@pytest.mark.parametrize(
    "text",
    [
        _text("int64 sizes = {1}", axis=2, places=(0, 0)),
        _text("int64 sizes = {4}", last="int64 n"),
        _text("int64 sizes = {1}", attributes=", keepdims = 0")
        .replace("[A, B, C]", "[A, B]")
        .replace("[D, E, F]", "[D, E]"),
    ],
    ids=["length not known", "the sequence is read otherwise", "runtimes disagree"],
)
def test_near_misses_stay(text):
    after = check_pass(SequencesToSplit(), text, atol=0, rtol=0)
    assert "Split" not in [node.op_type for node in after.graph]
