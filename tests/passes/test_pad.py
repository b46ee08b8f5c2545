from __future__ import annotations

import pytest

from optkit.passes.fusion.pad import FoldPad
from optkit.testing import check_pass

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 1, 5, 6] x) => (float[N, 2, H, W] y)
<int64[%(n)s] pads = {%(pads)s}, int64[2] axes = {%(axes)s}, float value = {%(value)s}, float[2, 1, 3, 3] w = {%(w)s}> {
  p = Pad%(mode)s(x, pads, value%(with_axes)s)
  y = Conv%(conv)s(p, w)
}
"""


def model(pads="0, 0, 1, 0, 0, 0, 2, 1", axes="2, 3", value="0", mode="", conv="", with_axes=""):
    w = ", ".join(str((i * 7 % 11) / 4 - 1) for i in range(18))
    return MODEL % {
        "n": pads.count(",") + 1,
        "pads": pads,
        "axes": axes,
        "value": value,
        "mode": mode,
        "conv": conv,
        "with_axes": with_axes,
        "w": w,
    }


def test_spatial_zeros_become_pads_of_the_convolution():
    check_pass(FoldPad(), model(), ops=["Conv"])


def test_pads_are_added_to_those_that_are_there():
    after = check_pass(FoldPad(), model(conv="<pads = [1, 2, 3, 4]>"), ops=["Conv"])
    assert list(after.graph[0].attributes["pads"].as_ints()) == [2, 2, 5, 5]


def test_negative_axes_are_understood():
    check_pass(FoldPad(), model(pads="1, 0, 2, 1", axes="-2, -1", with_axes=", axes"), ops=["Conv"])


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "1"},
        {"mode": '<mode = "reflect">'},
        {"pads": "0, 0, -1, 0, 0, 0, 0, 0"},
        {"pads": "1, 0, 0, 0, 0, 0, 0, 0"},
        {"conv": '<auto_pad = "SAME_UPPER">'},
    ],
)
def test_other_padding_stays(changes):
    check_pass(FoldPad(), model(**changes), ops=["Pad", "Conv"])


def test_a_pad_that_something_else_reads_stays_for_it():
    text = model().replace("=> (float[N, 2, H, W] y)", "=> (float[N, 2, H, W] y, float[N, 1, J, K] p)")
    check_pass(FoldPad(), text, ops=["Pad", "Conv"])
