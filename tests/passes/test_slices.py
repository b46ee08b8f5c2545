from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.cleanup.layout import CancelLayout
from optkit.passes.cleanup.slices import SlicesToSplit
from optkit.testing import check_pass

TWO = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2, %s, 3] x) => (float[M, N, K] y, float[P, Q, R] z)
<int64[1] a = {%d}, int64[1] b = {%d}, int64[1] c = {%d}, int64[1] d = {%d}, int64[1] axis = {%d}, int64[1] step = {%d}> {
  y = Slice(x, a, b, axis, step)
  h = Slice(x, c, d, axis, step)
  z = Relu(h)
}
"""
END = 9223372036854775807


@pytest.mark.parametrize(
    "slices",
    [
        ("8", 0, 4, 4, 8, 1, 1),
        ("8", 0, 3, 3, END, 1, 1),
        ("8", 3, 8, 0, 3, -2, 1),
        ("8", -8, -2, -2, 100, 1, 1),
        ("N", 0, 1, 1, 3, 2, 1),
    ],
)
def test_slices_that_divide_an_axis_become_a_split(slices):
    after = check_pass(SlicesToSplit(), TWO % slices, ops=["Split", "Relu"], atol=0, rtol=0)
    assert after.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    "slices",
    [
        ("8", 0, 4, 3, 8, 1, 1),
        ("8", 0, 3, 4, 8, 1, 1),
        ("8", 0, 4, 4, 7, 1, 1),
        ("8", 1, 4, 4, 8, 1, 1),
        ("8", 0, 4, 4, 8, 1, 2),
        ("N", 0, 4, 4, END, 1, 1),
    ],
    ids=["overlap", "gap", "end left", "start left", "step 2", "size not known"],
)
def test_near_misses_stay(slices):
    check_pass(SlicesToSplit(), TWO % slices, ops=["Slice", "Slice", "Relu"], atol=0, rtol=0)


def test_parts_of_two_axes_are_told_apart_and_other_readers_stay():
    model = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4, 6] x) => (float[4, 2] a, float[4, 4] b, float[1, 6] c, float[4, 6] y)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] six = {6}> {
      b = Slice(x, two, six, one)
      c = Slice(x, zero, one, zero)
      a = Slice(x, zero, two, one)
      y = Relu(x)
    }
    """
    check_pass(SlicesToSplit(), model, ops=["Split", "Slice", "Relu"], atol=0, rtol=0)


def test_a_slice_of_several_axes_at_once_stays():
    model = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4, 6] x) => (float[2, 6] a, float[2, 6] b)
    <int64[2] low = {0, 0}, int64[2] mid = {2, 6}, int64[2] from = {2, 0}, int64[2] most = {4, 6}> {
      a = Slice(x, low, mid)
      b = Slice(x, from, most)
    }
    """
    check_pass(SlicesToSplit(), model, ops=["Slice", "Slice"], atol=0, rtol=0)


def test_where_a_slice_reads_computed_bounds_it_stays():
    model = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4, 6] x, int64[1] cut) => (float[K, 6] a, float[L, 6] b)
    <int64[1] zero = {0}, int64[1] four = {4}> {
      a = Slice(x, zero, cut, zero)
      b = Slice(x, cut, four, zero)
    }
    """
    check_pass(
        SlicesToSplit(), model, ops=["Slice", "Slice"], atol=0, rtol=0, x=np.ones((4, 6), np.float32), cut=np.array([2])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "ops"), [(2, ["Slice", "Slice", "Add"]), (1, ["Split", "Slice", "Slice", "Add"])]
)
def test_parts_that_are_sliced_further_along_another_axis_are_cut_once(axis, ops):
    """A Split and two Slices are a node more than two Slices of two axes each."""
    model = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 8, 4] x) => (float[M, N, K] y)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] axis = {%d}> {
      a = Slice(x, zero, four, one)
      b = Slice(x, four, eight, one)
      c = Slice(a, one, three, axis)
      d = Slice(b, one, three, axis)
      y = Add(c, d)
    }
    """
    apart = check_pass(SlicesToSplit(), model % axis, atol=0, rtol=0)
    check_pass(CancelLayout(), apart, ops=ops, atol=0, rtol=0)
