"""The comparison with other graph simplifiers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from optkit.benchmarks.cleanup import count, difference, main, markdown, shortfalls
from optkit.errors import UnknownNameError


def test_nodes_in_bodies_and_functions_are_counted():
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 21, "f" : 1]>
        g (float[N] x, bool b) => (float[N] y) {
          one = Constant <value_float = 1.0> ()
          a = f.twice (x)
          y = If (b) <
            then_branch = yes () => (float[N] t) { t = Add(a, one) },
            else_branch = no () => (float[N] e) { c = Neg(a) e = f.twice (c) }
          >
        }
        <domain: "f", opset_import: ["" : 21]>
        twice (v) => (w) { u = Add(v, v) w = Identity(u) }
        """
    )
    assert count(model) == 2 + 1 + 1 + 1 + 2


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([1.0, -4.0, np.inf], 0.0),
        ([1.0, -4.4, np.inf], 0.1),
        ([1.0, -4.0, 1.0], np.inf),
        ([1.0, -4.0], np.inf),
    ],
)
def test_difference_is_a_share_of_the_largest_value(after, expected):
    before = {"y": np.array([1, -4, np.inf], np.float32)}
    assert difference(before, {"y": np.array(after, np.float32)}) == pytest.approx(expected, rel=1e-6)


def test_other_names_are_no_match():
    y = np.ones(2, np.float32)
    assert difference({"y": y}, {"z": y}) == np.inf


def _found(nodes=10, seconds=1.0, difference=1e-6, **slim):
    tools = {
        "optkit": {"nodes": nodes, "seconds": seconds, "difference": difference},
        "onnxslim": {"nodes": 10, "seconds": 1.0, "difference": 0.0} | slim,
        "onnxsim": {"error": "it stopped"},
    }
    return {"name": "m", "nodes": 20, "runtime_difference": 1e-6, "tools": tools}


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (_found(), []),
        (_found(nodes=11), ["1 nodes more than onnxslim"]),
        (_found(seconds=1.5), ["1.50x the time of onnxslim"]),
        (_found(difference=3e-5), ["other numbers"]),
        (_found(difference=None), ["other numbers"]),
    ],
)
def test_what_is_missed_is_said(found, missed):
    assert shortfalls(found) == missed
    page = markdown(
        {"machine": {"processor": {"name": "chip"}, "versions": {"onnx": "1"}}, "models": [found]}
    )
    assert page.splitlines()[-3].endswith(f"| {'; '.join(missed) or '-'} |")
    assert page.endswith("* m, onnxsim: it stopped\n")


def test_unknown_models_are_refused():
    with pytest.raises(UnknownNameError, match="nosuch"):
        main(["--only", "nosuch"])
