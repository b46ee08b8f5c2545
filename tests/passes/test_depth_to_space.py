from __future__ import annotations

import pytest

from optkit.passes.fusion.depth_to_space import FuseDepthToSpace
from optkit.testing import check_pass

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[%s] x) => (float[%s] y)
<int64[6] six = {%s}, int64[4] four = {%s}> {
  r = Reshape(x, six)
  t = Transpose<perm = [%s]>(r)
  y = Reshape(t, four)
}
"""
OPS = ["Reshape", "Transpose", "Reshape"]
CRD, DCR, BACK = "0, 1, 4, 2, 5, 3", "0, 3, 4, 1, 5, 2", "0, 3, 5, 1, 2, 4"


@pytest.mark.parametrize(
    ("sizes", "op", "mode"),
    [
        (("2, 18, 4, 5", "2, 2, 12, 15", "2, 2, 3, 3, 4, 5", "2, 2, 12, 15", CRD), "DepthToSpace", "CRD"),
        (("2, 18, 4, 5", "2, 2, 12, 15", "2, 3, 3, 2, 4, 5", "2, 2, 12, 15", DCR), "DepthToSpace", "DCR"),
        # Two channels and blocks of two: only the order of the axes tells the modes apart.
        (("2, 8, 4, 5", "2, 2, 8, 10", "2, 2, 2, 2, 4, 5", "2, 2, 8, 10", CRD), "DepthToSpace", "CRD"),
        (("2, 3, 8, 6", "2, 12, 4, 3", "2, 3, 4, 2, 3, 2", "2, 12, 4, 3", BACK), "SpaceToDepth", None),
        (("N, 8, 4, 5", "N, 2, 8, 10", "0, 2, 2, 2, 4, 5", "0, 2, 8, 10", CRD), "DepthToSpace", "CRD"),
    ],
)
def test_every_move(sizes, op, mode):
    after = check_pass(FuseDepthToSpace(), MODEL % sizes, ops=[op], atol=0, rtol=0)
    found = after.graph[0].attributes.get("mode")
    assert (found.as_string() if found is not None else None) == mode


@pytest.mark.parametrize(
    "sizes",
    [
        ("2, 8, 4, 5", "2, 2, 8, 10", "2, 2, 2, 2, 4, 5", "2, 2, 8, 10", "0, 1, 4, 3, 5, 2"),
        ("2, 12, 4, 5", "2, 2, 12, 10", "2, 2, 3, 2, 4, 5", "2, 2, 12, 10", CRD),
        ("2, 8, 4, 5", "2, 2, 10, 8", "2, 2, 2, 2, 4, 5", "2, 2, 10, 8", CRD),
        ("2, 8, 4, 5", "2, 2, 8, 10", "2, 2, 2, 2, 5, 4", "2, 2, 8, 10", CRD),
        ("2, 3, 4, 5", "2, 3, 4, 5", "2, 3, 1, 1, 4, 5", "2, 3, 4, 5", CRD),
        # The order of PixelUnshuffle: channels before blocks, which SpaceToDepth has no mode for.
        ("2, 3, 8, 6", "2, 12, 4, 3", "2, 3, 4, 2, 3, 2", "2, 12, 4, 3", "0, 1, 3, 5, 2, 4"),
    ],
)
def test_near_misses_stay(sizes):
    check_pass(FuseDepthToSpace(), MODEL % sizes, ops=OPS, atol=0, rtol=0)
