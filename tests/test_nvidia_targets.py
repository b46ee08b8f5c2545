from __future__ import annotations

import pytest

from optkit.backends import BACKENDS
from optkit.errors import UnknownNameError
from optkit.targets import TARGETS, target
from optkit.targets.gpu import ARCHITECTURES

GPUS = [t for t in TARGETS.values() if t.vendor == "nvidia"]


def test_the_hardware_of_the_plan_is_there():
    names = "t4 a10 a100 l4 l40s h100 h200 b200 rtx3090 rtx4090 rtx5090 jetson-orin gb10"
    assert [t.name for t in GPUS] == names.split()


@pytest.mark.parametrize("row", GPUS, ids=lambda t: t.name)
def test_every_row_has_what_an_estimate_needs_and_says_where_it_is_from(row):
    assert row.source
    assert row.memory > 8 * 2**30
    assert 1e11 < row.bandwidth < 1e13
    assert row.units > 8 and row.shared >= 64 * 1024
    assert {"fp32", "fp16", "int8"} <= set(row.peak)
    assert not row.runs_here
    assert all(f in row.peak for f in row.formats if not f.startswith("w"))


@pytest.mark.parametrize("row", GPUS, ids=lambda t: t.name)
def test_narrower_formats_are_not_slower(row):
    # GeForce Blackwell alone runs int8 faster than fp8 with sums in float32.
    for wide, narrow in (("fp32", "fp16"), ("fp16", "int8"), ("fp16", "fp8"), ("fp8", "nvfp4")):
        if wide in row.peak and narrow in row.peak:
            assert row.peak[narrow] >= row.peak[wide]


@pytest.mark.parametrize(
    ("name", "fmt", "allowed"),
    [
        ("a100", "fp8", False),
        ("l4", "fp8", True),
        ("h100", "fp8", True),
        ("t4", "w4a16", False),
        ("a100", "w4a16", True),
        ("h100", "nvfp4", False),
        ("b200", "nvfp4", True),
        ("rtx5090", "nvfp4", True),
        ("t4", "bf16", False),
        ("a10", "bf16", True),
    ],
)
def test_formats_that_an_architecture_lacks_are_refused_with_the_first_that_has_them(name, fmt, allowed):
    row = target(name)
    reason = row.refusal(fmt)
    assert (reason is None) == allowed
    if reason is not None:
        assert "sm_" in reason and name in reason


def test_the_processor_refuses_what_it_lacks_too():
    assert target("cpu").refusal("int8") is None
    assert "no hardware support for fp8" in target("cpu").refusal("fp8")


def test_a_row_has_the_limits_of_its_architecture():
    for row in GPUS:
        if row.vendor == "nvidia":
            assert ARCHITECTURES[row.capability].arch == row.arch
            assert ARCHITECTURES[row.capability].shared == row.shared


def test_names_are_found_in_any_case_and_near_ones_are_suggested():
    assert target("H100").name == "h100"
    with pytest.raises(UnknownNameError) as error:
        target("h10")
    assert "h100" in error.value.hint or "a10" in error.value.hint


def test_every_backend_of_a_target_is_in_the_table():
    for row in TARGETS.values():
        assert set(row.backends) <= set(BACKENDS), row.name
