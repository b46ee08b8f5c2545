"""Axes by name: where a name lies, what sizes are tried, and what is refused."""

from __future__ import annotations

import pytest
import torch

from optkit.errors import UnknownNameError, UsageError
from optkit.exporting.axes import ask, evaluate

pytestmark = pytest.mark.needs("torch", "onnxscript")

NAMES = ["ids", "mask", "image", "step"]
TENSORS = [torch.zeros(2, 5), torch.zeros(2, 8), torch.zeros(2, 3, 16, 12), torch.zeros(1)]


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (["batch"], {"ids": {0: "batch"}, "mask": {0: "batch"}, "image": {0: "batch"}}),
        (["height,width"], {"image": {2: "height", 3: "width"}}),
        (["past=mask:1"], {"mask": {1: "past"}}),
        (["n=ids:0+mask:-2"], {"ids": {0: "n"}, "mask": {0: "n"}}),
        ({"ids": {1: "t"}, "mask": {1: "t+3"}}, {"ids": {1: "t"}, "mask": {1: "t+3"}}),
        ({"ids": [None, "t"]}, {"ids": {1: "t"}}),
        ({"ids": {1: torch.export.Dim("t", min=2, max=9)}}, {"ids": {1: "t"}}),
        ({"ids": {1: torch.export.Dim.DYNAMIC}}, {"ids": {1: "ids_1"}}),
        (None, {}),
    ],
)
def test_names_mean_axes(asked, names):
    assert ask(asked, NAMES, TENSORS).names == names


def test_limits_of_a_dim_are_kept():
    axes = ask({"ids": {1: torch.export.Dim("t", min=2, max=9)}}, NAMES, TENSORS)
    assert axes.bounds == {"t": (2, 9)}


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (["words"], UsageError, "not a name with a known place"),
        (["past"], UsageError, None),
        (["sequence"], UsageError, "is 5 in 'ids' and 8 in 'mask'"),
        (["n=ids"], UsageError, "NAME=INPUT:AXIS is wanted"),
        (["n=idz:0"], UnknownNameError, "unknown input 'idz'"),
        (["n=ids:2"], UsageError, r"input 'ids' has no axis 2: \[2, 5\]"),
        ({"ids": {1: "t"}, "mask": {1: "t+1"}}, UsageError, "is 8, not 6"),
        ({"mask": {1: "t+1"}}, UsageError, "no axis is called 't'"),
        ({"ids": {1: "t"}, "mask": {1: "t**2"}}, UsageError, "is wanted"),
        (["frames"], UsageError, "no input has such an axis: ids"),
    ],
)
def test_what_means_nothing_is_refused(asked, error, message):
    if asked == ["past"]:  # the image has four axes, so it has such a place
        assert ask(asked, NAMES, TENSORS).names == {"image": {2: "past"}}
        return
    with pytest.raises(error, match=message):
        ask(asked, NAMES, TENSORS)


@pytest.mark.parametrize(("text", "value"), [("a", 3), ("a+b", 7), ("a*2-1", 5), ("b//3", 1)])
def test_expressions(text, value):
    assert evaluate(text, {"a": 3, "b": 4}) == value


def test_other_sizes_follow_in_every_input_and_take_values_of_the_example():
    axes = ask({"ids": {1: "t"}, "mask": {1: "t+3"}}, NAMES[:2], TENSORS[:2])
    ids = torch.arange(10).reshape(2, 5)
    first, second = axes.resized(NAMES[:2], [ids, TENSORS[1]], {"t": 7})
    assert (first.shape, second.shape) == ((2, 7), (2, 10))
    assert set(first[1].tolist()) <= set(ids[1].tolist())


def test_the_sizes_tried_differ_from_the_example_and_hold_a_batch_of_one():
    axes = ask(["batch", "t=ids:1"], NAMES, TENSORS)
    tried = [s for s, _ in zip(axes.candidates(), range(2), strict=False)]
    assert tried == [{"batch": 1, "t": 6}, {"batch": 3, "t": 10}]
