"""Work in a process of its own, within bounds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from optkit.benchmarks.bounded import bounded
from optkit.errors import OptkitError

ENOUGH = 1 << 33
HOLD = "import numpy, time; x = numpy.ones(64 << 20); time.sleep(60)"
REFUSE = "from optkit.errors import ModelError; raise ModelError('no such shape', hint='another one')"


def test_it_gives_what_the_function_returns() -> None:
    result, peak = bounded(sum, [1, 2, 3], seconds=60, memory=ENOUGH)
    assert result == 6
    assert peak >= 0


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (os._exit, 7, "its process died with exit code 7"),
        (exec, REFUSE, "ModelError: no such shape"),
    ],
)
def test_what_fails_is_an_error_that_says_why(
    function: Callable[[Any], Any], argument: Any, message: str
) -> None:
    with pytest.raises(OptkitError, match=message):
        bounded(function, argument, seconds=60, memory=ENOUGH)


def test_what_takes_too_long_is_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(OptkitError, match="stopped: it did not finish within 2 seconds"):
        bounded(time.sleep, 60, seconds=2, memory=ENOUGH)
    assert time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_holds_too_much_is_stopped() -> None:
    with pytest.raises(OptkitError, match=r"stopped: it held 0\.[3-9] GB, allowed 0\.3"):
        bounded(exec, HOLD, seconds=60, memory=300 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="not every system forks")
def test_a_fork_has_what_was_imported_and_the_same_bounds() -> None:
    _HELD[:] = [1, 2]
    assert bounded(_known, seconds=60, memory=ENOUGH, start="fork")[0] == [1, 2]
    with pytest.raises(OptkitError, match="stopped: it did not finish within 1 seconds"):
        bounded(time.sleep, 60, seconds=1, memory=ENOUGH, start="fork")


_HELD: list[int] = []


def _known() -> list[int]:
    return list(_HELD)
