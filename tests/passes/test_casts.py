from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from optkit.passes.cleanup.casts import CleanCasts, holds
from optkit.testing import check_pass

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
FLOAT, HALF, DOUBLE, BOOL, INT32, INT64, UINT8 = 1, 10, 11, 9, 6, 7, 2


@pytest.mark.parametrize(
    ("source", "first", "second", "ops"),
    [
        ("float16", FLOAT, HALF, []),
        ("float16", FLOAT, DOUBLE, ["Cast"]),
        ("float", DOUBLE, FLOAT, []),
        ("int32", INT64, INT32, []),
        ("int32", DOUBLE, INT64, ["Cast"]),
        ("bool", FLOAT, BOOL, []),
        ("bool", INT64, FLOAT, ["Cast"]),
        ("float", FLOAT, INT64, ["Cast"]),
        # These round or cut.
        ("float", HALF, FLOAT, ["Cast", "Cast"]),
        ("int32", FLOAT, INT32, ["Cast", "Cast"]),
        ("int64", DOUBLE, INT64, ["Cast", "Cast"]),
        ("float", INT64, FLOAT, ["Cast", "Cast"]),
        ("int64", INT32, INT64, ["Cast", "Cast"]),
        ("float", BOOL, FLOAT, ["Cast", "Cast"]),
    ],
)
def test_chains(source, first, second, ops):
    out = {FLOAT: "float", HALF: "float16", DOUBLE: "double", BOOL: "bool", INT32: "int32", INT64: "int64"}[
        second
    ]
    # Nodes on either side keep the names of input and output out of the way.
    body = f"u = Concat<axis = 0>(x, x) a = Cast<to = {first}>(u) b = Cast<to = {second}>(a) y = Reshape(b, flat)"
    check_pass(
        CleanCasts(),
        f"{HEADER} g ({source}[N] x) => ({out}[M] y) <int64[1] flat = {{-1}}> {{ {body} }}",
        ops=["Concat", *ops, "Reshape"],
        atol=0,
        rtol=0,
    )


INTEGERS = [getattr(ir.DataType, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)]
FLOATS = [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE]


@pytest.mark.parametrize("narrow", INTEGERS)
@pytest.mark.parametrize("wide", INTEGERS + FLOATS)
def test_what_holds_every_integer(narrow, wide):
    """The extremes and their neighbours come back, if and only if ``holds`` says that all do."""
    limits = np.iinfo(narrow.numpy())
    edges = {
        limits.min,
        limits.min + 1,
        limits.max,
        limits.max - 1,
        0,
        257,
        (1 << 24) + 1,
        (1 << 53) + 1,
        2049,
        129,
    }
    values = [v for v in edges if limits.min <= v <= limits.max]
    kind = wide.numpy()
    if wide in INTEGERS:
        exact = all(np.iinfo(kind).min <= v <= np.iinfo(kind).max for v in values)
    else:
        with np.errstate(over="ignore"):
            back = [np.array(v, narrow.numpy()).astype(kind) for v in values]
        exact = all(
            np.isfinite(b.astype(np.float64)) and int(b.astype(np.float64)) == v
            for b, v in zip(back, values, strict=True)
        )
    assert holds(narrow, wide) == exact


def test_what_holds_every_half():
    bits = np.arange(1 << 16, dtype=np.uint16)
    for kind, narrow in ((np.float16, ir.DataType.FLOAT16), (ml_dtypes.bfloat16, ir.DataType.BFLOAT16)):
        assert holds(narrow, ir.DataType.FLOAT)
        values = bits.view(kind)
        with np.errstate(invalid="ignore"):
            back = values.astype(np.float32).astype(kind)
        numbers = ~np.isnan(values.astype(np.float32))
        np.testing.assert_array_equal(back[numbers].view(np.uint16), bits[numbers])
    assert not holds(ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    assert not holds(ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("y = Equal(c, one)", []),
        ("y = Equal(one, c)", []),
        ("y = Equal(c, zero)", ["Not"]),
        ("y = Greater(c, zero)", []),
        ("y = Greater(c, one)", ["Cast", "Greater"]),
        ("y = Equal(c, two)", ["Cast", "Equal"]),
    ],
)
def test_truth_values_written_as_numbers(body, ops):
    check_pass(
        CleanCasts(),
        f"{HEADER} g (bool[N] x, bool[N] u) => (bool[N] y) <int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}> {{ b = And(x, u) c = Cast<to = 7>(b) {body} }}",
        ops=["And", *ops],
    )


def test_the_shape_of_a_cast():
    check_pass(
        CleanCasts(),
        f"{HEADER} g (float[N] x) => (int64[1] y) {{ a = Cast<to = 7>(x) y = Shape(a) }}",
        ops=["Shape"],
    )


def test_a_cast_that_others_read_stays_for_them():
    check_pass(
        CleanCasts(),
        f"{HEADER} g (float16[N] x) => (double[N] y, float[N] z) {{ a = Cast<to = 1>(x) y = Cast<to = 11>(a) z = Neg(a) }}",
        ops=["Cast", "Cast", "Neg"],
    )


@pytest.mark.parametrize("like", ["float", "float16", "int64", "bool"])
def test_a_cast_to_the_type_of_another_value_names_the_type(like):
    check_pass(
        CleanCasts(),
        f"{HEADER} g (int32[N] x, {like}[2] like) => ({like}[N] y) {{ a = Add(x, x) y = CastLike(a, like) }}",
        ops=["Add", "Cast"],
        atol=0,
        rtol=0,
    )


def test_a_cast_to_the_own_type_goes():
    check_pass(
        CleanCasts(),
        f"{HEADER} g (float[N] x, float[2] like) => (float[N] y) {{ a = CastLike(x, like) y = Add(a, a) }}",
        ops=["Add"],
        atol=0,
        rtol=0,
    )
