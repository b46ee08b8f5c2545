"""Which elements a Resize takes, against ONNX Runtime, where rounding decides: places that are whole, and half way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optkit.backends.resampling import nearest, positions
from optkit.reference import ReferenceSession
from optkit.testing import parse

COORDINATES = (
    "half_pixel",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "half_pixel_symmetric",
    "tf_half_pixel_for_nn",
)
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


@pytest.mark.parametrize("by", ["sizes", "scales"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_the_nearest_elements_are_those_of_onnx_runtime(coordinates, by):
    text = """<ir_version: 10, opset_import: ["" : 21]>
      g (float[n] x, %s[1] t) => (float[m] y) { y = Resize<mode = "nearest", coordinate_transformation_mode = "%s", nearest_mode = "%s">(%s) }"""
    kind, inputs = ("int64", "x, , , t") if by == "sizes" else ("float", "x, , t")
    wanted = (1, 2, 4, 9, 11, 19, 23, 29) if by == "sizes" else (0.3, 1 / 3, 0.6, 0.75, 1.2, 1.5, 2.2, 2.6)
    compared = 0
    for rounding in ROUNDINGS:
        model = parse(text % (kind, coordinates, rounding, inputs))
        (node,) = model.graph
        session = ReferenceSession(model, optimize=False)
        for size, to in itertools.product((3, 5, 7, 10, 14, 16, 20), wanted):
            given = np.array([to], np.int64 if by == "sizes" else np.float32)
            feeds = {"x": np.arange(size, dtype=np.float32), "t": given}
            expected = session.run(feeds)["y"]
            # What keeps its size is copied.
            if len(expected) in (0, size):
                continue
            scale = len(expected) / size if by == "sizes" else float(given[0])
            found = [nearest(p, node) for p in positions(size, len(expected), scale, coordinates)]
            np.testing.assert_array_equal(
                np.clip(found, 0, size - 1), expected, err_msg=f"{rounding} {size} {to}"
            )
            compared += 1
    assert compared > 100
