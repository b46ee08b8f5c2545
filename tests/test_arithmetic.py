from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from optkit.arithmetic import product_format, products, stored
from optkit.graph import walk
from optkit.testing import parse

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
PAIR = (
    HEADER
    + """g (float[2, 4] x) => (float[2, 3] y) {{
  q = QuantizeLinear(x, s, z)
  d = DequantizeLinear(q, s, z)
  {between}
  e = DequantizeLinear(w, s)
  [p] y = MatMul({left}, e)
}}
"""
)


def _product(text: str, **arrays) -> str:
    model = parse(text, **arrays)
    return product_format(next(n for n in walk(model) if n.name == "p"))


@pytest.mark.parametrize(("stored_as", "expected"), [(np.int8, "int8"), (ml_dtypes.float8_e4m3fn, "fp8")])
def test_a_product_of_two_grids_is_computed_on_them(stored_as, expected):
    grid = {"s": np.float32(0.1), "z": np.zeros((), stored_as), "w": np.ones((4, 3), stored_as)}
    assert _product(PAIR.format(between="", left="d"), **grid) == expected
    moved = PAIR.format(between="f = Transpose<perm = [0, 1]>(d)", left="f")
    assert _product(moved, **grid) == expected


def test_a_product_of_one_grid_and_a_float_is_a_float_product():
    grid = {"s": np.float32(0.1), "z": np.zeros((), np.int8), "w": np.ones((4, 3), np.int8)}
    assert _product(PAIR.format(between="f = Relu(d)", left="f"), **grid) == "fp32"
    assert _product(PAIR.format(between="", left="x"), **grid) == "fp32"


@pytest.mark.parametrize(("stored_as", "expected"), [(np.int8, "fp32"), (ml_dtypes.float8_e4m3fn, "fp8")])
def test_floats_of_eight_bits_are_multiplied_as_they_are_and_integers_without_a_scale_are_not(
    stored_as, expected
):
    text = (
        HEADER
        + """g (float[2, 4] x) => (float[2, 3] y) {
      q = QuantizeLinear(x, s, z)
      a = Cast<to = 1>(q)
      b = Cast<to = 1>(w)
      [p] y = MatMul(a, b)
    }"""
    )
    assert (
        _product(text, s=np.float32(0.1), z=np.zeros((), stored_as), w=np.ones((4, 3), stored_as)) == expected
    )


def test_half_precision_is_told_by_the_operands():
    text = HEADER + "g (float16[2, 4] x) => (float16[2, 3] y) { [p] y = MatMul(x, w) }"
    assert _product(text, w=np.ones((4, 3), np.float16)) == "fp16"


def test_products_with_weights_are_counted_and_those_of_two_activations_are_not():
    text = (
        HEADER
        + """g (float[2, 4] x) => (float[2, 2] y) {
      a = MatMul(x, w)
      t = Transpose<perm = [1, 0]>(a)
      y = MatMul(a, t)
    }"""
    )
    assert products(parse(text, w=np.ones((4, 3), np.float32))) == {"fp32": 1}


def test_a_weight_is_found_behind_casts_and_movements_and_a_table_is_not():
    text = (
        HEADER
        + """g (float16[2, 3] x, int64[4] i) => (float16[2, 4] y, float[4, 3] t) {
      c = Cast<to = 10>(w)
      m = Transpose<perm = [1, 0]>(c)
      y = MatMul(x, m)
      t = Gather(w, i)
    }"""
    )
    model = parse(text, w=np.ones((4, 3), np.float32))
    made = {v.name: v for n in walk(model) for v in n.outputs}
    assert stored(made["m"]).name == "w"
    assert stored(made["t"]) is None
    assert stored(made["y"]) is None
