"""Jobs side by side, each held to a core of its own, so that none is timed where another one runs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def usable() -> list[int]:
    """The cores that this process may use."""
    return (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    )


@contextlib.contextmanager
def cores() -> Iterator[ProcessPoolExecutor]:
    """A process for each core that this one may use; jobs that have not begun when one fails are left out."""
    context: Any = multiprocessing.get_context("spawn")
    free, found = context.SimpleQueue(), usable()
    for core in found:
        free.put(core)
    with ProcessPoolExecutor(len(found), context, _hold, (free,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hold(free: Any) -> None:
    core = free.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
