"""Sizes in files: worked out, never run."""

from __future__ import annotations

import pytest

from optkit.errors import ModelError
from optkit.kernels import KERNELS
from optkit.kernels.expressions import evaluate, of_shapes, symbols


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cdiv(rows, 128) * 2", 6),
        ("min(132, cdiv(rows, 128) * 12)", 36),
        ("elements(0) // 4 - -rows % 7", 6 - (-257 % 7)),
        ("max(axis(1, 0), axis(1, 2))", 5),
    ],
)
def test_expressions_are_worked_out(text, value):
    known = {"rows": 257, **of_shapes([(2, 12), (3, 4, 5)])}
    assert evaluate(text, known) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "().__class__", "rows.real", "[n for n in (1, 2)]", "'a' * 9", "cdiv", "rows(1)",
        "columns", "rows ** 9", "1.5", "rows // 0", "axis(4, 0)", "rows +", "cdiv(a=1, b=2)", "1+" * 300 + "1",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ModelError, match="is not a size"):
        evaluate(text, {"rows": 3, **of_shapes([(2,)])})


@pytest.mark.parametrize("name", list(KERNELS))
def test_shapes_of_outputs_as_expressions_are_those_of_numbers(name):
    kernel = KERNELS[name]()
    for problem in kernel.small:
        shapes = kernel.shapes(problem, 7)
        texts = kernel.outputs(problem, symbols([len(s) for s in shapes]))
        known = of_shapes(shapes)
        found = [None if s is None else tuple(evaluate(str(d), known) for d in s) for s in texts]
        assert found == [None if s is None else tuple(s) for s in kernel.outputs(problem, shapes)]


def test_what_is_worked_out_with_symbols_is_an_expression():
    shapes = symbols([2])
    found = evaluate(
        "cdiv(axis(0, 0) + 3, 4) * max(n, axis(0, 1)) - elements(0) % 7", {"n": 9, **of_shapes(shapes)}
    )
    assert evaluate(str(found), of_shapes([(10, 20)])) == 4 * 20 - 200 % 7
    assert "cdiv(" in str(found) and "max(" in str(found)


def test_arithmetic_of_symbols_keeps_its_order():
    ((a, b),) = symbols([2])
    numbers = of_shapes([(17, 5)])
    for made, value in (
        ((a + 2 * 3 - b) // 2, 9), (2 + a % b, 4), (3 * (a - b), 36), (-(a // b), -3), (1 - a, -16),
    ):  # fmt: skip
        assert evaluate(str(made), numbers) == value
