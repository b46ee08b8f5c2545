from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from optkit.errors import UnknownNameError, UsageError
from optkit.formats import FORMATS, PRECISIONS, Precision


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_every_format_lies_within_its_storage_type(fmt):
    info = np.iinfo(fmt.dtype.numpy()) if fmt.integer else ml_dtypes.finfo(fmt.dtype.numpy())
    assert info.min <= fmt.low < fmt.high <= info.max
    assert fmt.steps == fmt.high - fmt.low


@pytest.mark.parametrize(("name", "fmt"), FORMATS.items(), ids=FORMATS)
def test_every_format_is_named_as_its_key_says(name, fmt):
    assert fmt.name == name


def test_symmetric_formats_hold_the_negative_of_all_they_hold():
    assert all(f.low == -f.high for f in FORMATS.values() if f.symmetric)


@pytest.mark.parametrize("base", PRECISIONS)
def test_every_precision_is_read_in_any_case(base):
    assert Precision.parse(f" {base.upper()} ") == Precision(base=base)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8-dyn", Precision(base="int8", dynamic=True)),
        ("w4a16-g128", Precision(base="w4a16", group=128)),
        ("w4a16-g32-asym", Precision(base="w4a16", group=32, symmetric=False)),
        ("W4A16-SYM-g64", Precision(base="w4a16", group=64, symmetric=True)),
        ("w8a8", Precision(base="int8")),
        ("float32", Precision(base="fp32")),
        ("float16", Precision(base="fp16")),
        ("bfloat16", Precision(base="bf16")),
    ],
)
def test_suffixes_and_other_spellings(text, expected):
    assert Precision.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["int8-sym-asym", "int8-dyn-dyn", "w4a16-g128-g64", "int8-sym-sym", "w4a16-g0"]
)
def test_suffixes_that_contradict_each_other_are_refused(text):
    with pytest.raises(UsageError, match=text):
        Precision.parse(text)


@pytest.mark.parametrize(("text", "near"), [("int88", "int8"), ("fp61", "fp16"), ("bf166", "bf16")])
def test_an_unknown_precision_suggests_the_nearest(text, near):
    with pytest.raises(UnknownNameError, match=text) as caught:
        Precision.parse(text)
    assert caught.value.hint == f"did you mean {near!r}?"


@pytest.mark.parametrize("text", ["", "int8-", "int8-g", "int8-pt", "-dyn"])
def test_what_is_no_precision_is_refused(text):
    with pytest.raises(UsageError):
        Precision.parse(text)
