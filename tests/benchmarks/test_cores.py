"""Jobs side by side, each held to a core of its own."""

from __future__ import annotations

import os

import pytest

from optkit.benchmarks.cores import cores

if not hasattr(os, "sched_getaffinity"):
    pytest.skip("this system does not hold processes to cores", allow_module_level=True)


def test_each_process_is_held_to_a_core_of_its_own():
    allowed = os.sched_getaffinity(0)
    with cores() as pool:
        held = {frozenset(core) for core in pool.map(os.sched_getaffinity, [0] * 8 * len(allowed))}
    assert all(len(core) == 1 and core <= allowed for core in held)
    assert os.sched_getaffinity(0) == allowed


def test_a_job_that_fails_says_why():
    with pytest.raises(ZeroDivisionError), cores() as pool:
        pool.submit(divmod, 1, 0).result()
