"""``--memory``: refuse what is certain not to fit, and stop what turns out not to."""

from __future__ import annotations

import _thread
import contextlib
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from optkit.errors import OptkitError, UsageError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_STATUS = Path("/proc/self/status")
# Seconds between two looks.
_INTERVAL = 0.1
# Python, its packages and one small batch (measured).
_BASE = 150 * 2**20


def parse_size(text: str) -> int:
    """Bytes of ``8GiB``, ``512MB`` …, in any case.

    Raises:
        UsageError: Not a number with a unit.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)b?\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--memory {text!r} is not a size", hint="write a number and a unit: 8GiB, 512MB")
    return int(float(match[1]) * _UNITS[match[2]])


def used() -> int:
    """Bytes of memory that this process has to itself; mapped files, which can be dropped and read again, are left out.

    Where the system does not say, the largest amount that was ever resident.
    """
    if _STATUS.is_file():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        if "RssAnon" in fields:
            return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def shown(size: float) -> str:
    """``1.25 GiB``, ``310 MiB``."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def needed(path: Path | str, *, copies: float) -> int:
    """An estimate of the memory that work on the model at ``path`` takes; of a PyTorch model it is watched alone.

    Args:
        copies: How often its weights are in memory at the same time.

    Raises:
        ModelError: It cannot be read.
    """
    from optkit.frontend import is_torch, load
    from optkit.graph import weight_bytes

    if is_torch(path):
        return _BASE
    return _BASE + int(copies * weight_bytes(load(path, check=False)))


@contextlib.contextmanager
def limited(budget: int | None, needed: int) -> Iterator[None]:
    """Hold the work inside to ``budget`` bytes.

    Ten times a second a thread compares what the process uses with the budget and interrupts the work when it is more.
    A single call into the runtime cannot be interrupted, so for its length the budget can be passed.

    Args:
        budget: None for no limit.
        needed: The least that the work takes, by estimate; when that is more, the work is not begun.

    Raises:
        UsageError: The estimate is above the budget.
        OptkitError: The budget was passed.
    """
    if budget is None:
        yield
        return
    if needed > budget:
        raise UsageError(
            f"this takes about {shown(needed)}, --memory allows {shown(budget)}",
            hint="allow more; or use optkit quantize, which holds no reference beside the model and times nothing",
        )
    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(_INTERVAL):
            most = max(most, used())
            if most > budget:
                _thread.interrupt_main(signal.SIGUSR1)
                return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    # Not SIGINT, which shells make the processes ignore that they start in the background.
    before = signal.signal(signal.SIGUSR1, stop)
    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if most > budget:
            raise OptkitError(
                f"stopped: {shown(most)} were in use, --memory allows {shown(budget)}",
                hint="allow more, or give fewer or smaller batches: --set samples=N",
            ) from None
        raise
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
