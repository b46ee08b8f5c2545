"""ONNX's own cases: what is equal, what is refused, and that a wrong number is called so."""

from __future__ import annotations

import re
import tempfile

import numpy as np
import onnx
import pytest

from optkit.benchmarks import onnx_cases

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 3] x, int64[1] k) => (float[2, 1] v, int64[2, 1] i) { v, i = TopK(x, k) }'
)
GIVEN = {"x": np.array([[1, 5, 2], [4, 3, -6]], np.float32), "k": np.array([1])}
WANTED = {"v": np.array([[5], [4]], np.float32), "i": np.array([[1], [0]])}


@pytest.mark.needs("ai_edge_litert")
def test_what_a_file_has_to_know_is_constant():
    assert onnx_cases.examine("litert", MODEL, GIVEN, WANTED, 1e-7) == {"result": "equal", "free": ["x"]}


@pytest.mark.needs("ai_edge_litert")
@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("v", np.array([[5.5], [4]], np.float32), "1 of 2 of v differ: 5.0 for 5.5"),
        ("i", np.array([1, 0]), r"i is \[2, 1\], not \[2\]"),
    ],
)
def test_another_number_or_shape_is_not_equal(name, array, said):
    found = onnx_cases.examine("litert", MODEL, GIVEN, WANTED | {name: array}, 1e-7)
    # ONNX Runtime agrees with the file, not with what is planted here.
    assert found["result"] == "as ONNX Runtime"
    assert re.fullmatch(said, found["why"])


@pytest.mark.needs("ai_edge_litert")
def test_what_no_choice_of_constants_makes_possible_is_refused_with_the_reason():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 2] x) => (float y) { y = Det(x) }'
    )
    found = onnx_cases.examine(
        "litert", model, {"x": np.eye(2, dtype=np.float32)}, {"y": np.float32(1)}, 1e-7
    )
    assert found["result"] == "refused" and "no translation of Det" in found["why"]


def test_the_page_counts_and_names_what_is_wrong():
    rows = [
        {"name": "test_a", "operator": "A", "result": "equal", "free": ["x"]},
        {"name": "test_b", "operator": "B", "result": "wrong", "why": "1 of 2 differ", "free": ["x"]},
        {"name": "test_c", "operator": "C", "result": "refused", "why": "no C"},
    ]
    page = onnx_cases.markdown(
        {"processor": {"name": "P"}, "versions": {"onnx": "1"}, "backends": {"litert": rows}}
    )
    assert "| litert | 3 | 1 | 0 | 1 | 0 | 1 |" in page
    assert "no case is equal of: B, C." in page and "* test_b: wrong: 1 of 2 differ" in page


def test_what_an_error_says_is_the_same_in_every_run():
    """The folder that a file lay in, and no other, is left out of it."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (uint16[2] x, uint16[2] z) => (uint16[2] y) { y = Max(x, z) }'
    )
    numbers = np.array([1, 2], np.uint16)
    first, second = (
        onnx_cases.examine("onnxruntime", model, {"x": numbers, "z": numbers}, {"y": numbers}, 1e-7)
        for _ in range(2)
    )
    assert first == second
    assert first["result"] == "refused" and tempfile.gettempdir() not in first["why"]
