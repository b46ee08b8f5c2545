"""The comparison of techniques of post-training quantization."""

from __future__ import annotations

import pytest

from optkit.benchmarks import ptq
from optkit.recipe import Recipe


@pytest.mark.parametrize("technique", ptq.TECHNIQUES, ids=lambda t: t[0])
def test_every_technique_is_a_recipe_that_ends_in_its_quantization(technique):
    recipe = ptq.recipe_of(technique)
    *front, last = recipe.passes
    assert all(p.exact for p in front)
    assert last.name == "quantize-static"
    assert isinstance(recipe, Recipe)


def test_the_table_has_a_column_a_model_and_a_row_a_technique():
    cell = {"sqnr_db": 12.34, "seconds": 5.6}
    rows = [{"model": name, **{t.name: cell for t in ptq.TECHNIQUES}} for name in ("one", "two")]
    lines = ptq.table(rows, ptq.TECHNIQUES).splitlines()
    assert lines[0] == "| SQNR, dB | one | two |"
    assert len(lines) == 2 + len(ptq.TECHNIQUES)
    assert lines[2] == "| int8-static | 12.3 (6 s) | 12.3 (6 s) |"


def test_alphas_take_the_place_of_the_techniques_and_differ_in_alpha_alone():
    bare, half, whole = ptq.smoothed([0.5, 1])
    assert bare == ptq.TECHNIQUES[0]
    (first, quantized), (second, _) = (ptq.recipe_of(technique).passes for technique in (half, whole))
    assert (first.alpha, second.alpha) == (0.5, 1)
    assert first.insert and second.insert
    assert quantized == ptq.recipe_of(bare).passes[-1]
    assert (half.name, whole.name) == ("+ alpha 0.5", "+ alpha 1")
