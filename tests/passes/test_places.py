from __future__ import annotations

import numpy as np
import pytest

from optkit.errors import ModelError
from optkit.graph import walk
from optkit.passes.base import Context
from optkit.passes.cleanup.places import PlacesToWhere
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target
from optkit.testing import check_pass, parse, random_feeds, same_numbers

EMBEDDING = """
<ir_version: 10, opset_import: ["" : 21]>
g (int64[2, 5] ids, float[7, 4] w, %s) => (float[2, 5, 4] y)
<int64 known = {7}, int64[1] zero = {0}, int64[2] ones = {1, 1}, float[3, 4] more = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
  mask = GreaterOrEqual(ids, known)
  found = NonZero(mask)
  places = Transpose <perm = [1, 0]> (found)
  rows, columns = Split <axis = 1> (places, ones)
  again = Concat <axis = -1> (rows, columns)
  taken = GatherND(ids, again)
  number = Sub(taken, known)
  looked = Gather(more, number)
  length = Shape(taken)
  zeros = Expand(zero, length)
  inside = ScatterND(ids, again, zeros)
  embedded = Gather(w, inside)
  y = ScatterND(embedded, again, looked)
}
"""
W = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "ids",
    [[[0, 7, 3, 9, 6], [8, 1, 2, 3, 4]], [[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]], [[7] * 5, [9] * 5]],
    ids=["some", "none", "all"],
)
def test_rows_of_a_second_table_are_chosen_whether_or_not_the_mask_holds_anywhere(ids):
    model = EMBEDDING.replace(", %s", "")
    check_pass(
        PlacesToWhere(), model, ops=["GreaterOrEqual", "Where", "Gather", "Unsqueeze", "Sub", "Where", "Gather", "Where"],
        ids=np.asarray(ids, np.int64), w=W, atol=0, rtol=0,
    )  # fmt: skip


def test_an_index_outside_of_the_table_where_the_mask_holds_stays_an_error():
    model = parse(EMBEDDING.replace(", %s", ""), w=W)
    PlacesToWhere().run(model, Context(target=target("cpu")))
    session = ReferenceSession(model)
    with pytest.raises(ModelError, match="out of data bounds"):
        session.run({"ids": np.full((2, 5), 10)})
    session.close()


ROWS = """
<ir_version: 10, opset_import: ["" : 21]>
g (bool[2, 3, 4] x, %s[2, 3] mask, bool[2, %s, 4] z) => (bool[2, 3, 4] y)
<bool[1] no = {0}, int64[2] two = {0, 0}, int64[1] four = {4}, int64[1] axis = {0}> {
  found = NonZero(mask)
  places = Transpose <perm = [1, 0]> (found)
  shape = Shape(places)
  n = Gather(shape, axis)
  size = Concat <axis = 0> (n, four)
  %s
  y = ScatterND <%s> (x, places, updates)
}
"""
GIVEN = {
    "x": np.random.default_rng(1).random((2, 3, 4)) > 0.5,
    "mask": np.asarray([[1, 0, 0], [0, 1, 1]]),
    "z": np.random.default_rng(2).random((2, 3, 4)) > 0.5,
}


@pytest.mark.parametrize("kind", ["bool", "float", "int64"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_constant_is_written_to_whole_rows_of_booleans(kind, value):
    model = ROWS % (kind, "3", "updates = Expand(no, size)", 'reduction = "none"')
    given = GIVEN | {"mask": GIVEN["mask"].astype({"float": "float32"}.get(kind, kind))}
    ops = ([] if kind == "bool" else ["Cast"]) + ["Unsqueeze"] + (["Or"] if value else ["Not", "And"])
    check_pass(
        PlacesToWhere(), model.replace("no = {0}", f"no = {{{value}}}"), ops=ops, atol=0, rtol=0, **given
    )


def test_booleans_are_chosen_between():
    model = ROWS % ("bool", "3", "updates = GatherND(z, places)", 'reduction = "none"')
    # Nothing reads the size.
    model = "\n".join(
        line for line in model.splitlines() if not line.startswith(("  shape", "  n =", "  size"))
    )
    given = GIVEN | {"mask": GIVEN["mask"] > 0}
    check_pass(PlacesToWhere(), model, ops=["Unsqueeze", "And", "Not", "And", "Or"], atol=0, rtol=0, **given)


@pytest.mark.parametrize(
    ("rows", "updates"),
    [
        ("4", "updates = GatherND(z, places)"),
        ("3", "taken = GatherND(z, places)\n  updates = Xor(taken, no)"),
    ],
    ids=["rows that the mask has not", "an operator that is not known"],
)
def test_near_misses_stay(rows, updates):
    given = GIVEN | {"mask": GIVEN["mask"] > 0, "z": np.ones((2, int(rows), 4), bool)}
    model = ROWS % ("bool", rows, updates, 'reduction = "none"')
    before = [
        "NonZero",
        "Transpose",
        "Shape",
        "Gather",
        "Concat",
        *(["GatherND"] if rows == "4" else ["GatherND", "Xor"]),
    ]
    check_pass(PlacesToWhere(), model, ops=[*before, "ScatterND"], atol=0, rtol=0, **given)


def test_a_mask_whose_places_are_found_twice_chooses_all_the_same():
    model = parse(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 5] x) => (float[N, 5] y) <int64[1] zero = {0}, float limit = {0.3}> {
          m = Greater(x, limit)
          n = NonZero(m) p = Transpose<perm = [1, 0]>(n)
          o = NonZero(m) q = Transpose<perm = [1, 0]>(o)
          z = GatherND(x, p) count = Shape<end = 1>(q) cut = Slice(z, zero, count, zero)
          s = Shape(x) none = ConstantOfShape(s)
          y = ScatterND(none, q, cut)
        }
        """
    )
    after = model.clone()
    run_passes(after, Recipe.load("cleanup").passes, Context(target=target("cpu")))
    assert "NonZero" not in {n.op_type for n in walk(after)}
    # Also where the mask holds nowhere.
    for x in (random_feeds(model)["x"], np.zeros((2, 5), np.float32)):
        same_numbers(model, after, {"x": x}, atol=0, rtol=0)
