"""``--memory``: sizes, refusing in advance, and stopping work that takes more."""

from __future__ import annotations

import gc
import signal
import time

import pytest

from optkit.cli.memory import limited, parse_size, shown, used
from optkit.errors import OptkitError, UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5 g", 1_500_000_000),
        ("64mib", 64 * 2**20),
        ("1k", 1000),
    ],
)
def test_sizes_are_read_in_either_unit_and_any_case(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8", "", "GB", "-1GB", "0MB", "8 apples", "1e3GB"])
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.fixture(autouse=True)
def _collected():
    """What other tests left must not be freed while memory is watched."""
    gc.collect()


def _hold(size: int, seconds: float) -> None:
    filled = bytearray(b"\1") * size
    time.sleep(seconds)
    assert filled


def test_work_that_takes_more_is_stopped():
    with pytest.raises(OptkitError, match=r"stopped: .* were in use"), limited(used() + 20 * 2**20, 0):
        _hold(200 * 2**20, 5)


def test_work_in_the_background_of_a_shell_is_stopped_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(OptkitError, match="stopped"), limited(used() + 20 * 2**20, 0):
            _hold(200 * 2**20, 5)
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_that_takes_less_is_left_alone():
    with limited(used() + 2**30, 0):
        time.sleep(0.3)


def test_what_cannot_fit_is_not_begun():
    began = False
    with (
        pytest.raises(UsageError, match=r"takes about 2.00 GiB, --memory allows 1.00 GiB"),
        limited(2**30, 2**31),
    ):
        began = True
    assert not began


def test_sizes_are_shown_in_the_unit_that_fits():
    assert (shown(300 * 2**20), shown(5 * 2**29)) == ("300 MiB", "2.50 GiB")
