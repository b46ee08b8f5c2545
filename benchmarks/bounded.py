"""Run a function in a process of its own that may use so much time and memory and no more.

A crash costs one result, and no result's memory or caches reach the next.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from optkit.errors import OptkitError

_INTERVAL = 0.5


def bounded(
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float,
    memory: int,
    start: Literal["spawn", "fork"] = "spawn",
) -> tuple[Any, int]:
    """What ``function`` returns, and the most bytes of memory that its process and the children of it held.

    Args:
        function: Importable by name.
        seconds: Wall-clock.
        memory: Bytes resident, looked at twice a second.
        start: ``fork`` where importing what it needs, once, takes longer than its work; caches do reach it then.

    Raises:
        OptkitError: It raised one, it died, or a bound was reached.
    """
    context: Any = multiprocessing.get_context(start)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    began, peak = time.monotonic(), 0
    try:
        while not ours.poll(_INTERVAL):
            peak = max(peak, _resident(process.pid or 0))
            if peak > memory:
                raise OptkitError(f"stopped: it held {peak / 1e9:.1f} GB, allowed {memory / 1e9:.1f}")
            if time.monotonic() - began > seconds:
                raise OptkitError(f"stopped: it did not finish within {seconds:.0f} seconds")
        try:
            result = ours.recv()
        except EOFError:
            process.join()
            raise OptkitError(f"its process died with exit code {process.exitcode}") from None
    finally:
        if process.is_alive() and not ours.closed:
            process.join(_INTERVAL)
        process.kill()
        process.join()
        ours.close()
    if isinstance(result, OptkitError):
        raise result
    return result, peak


def _child(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result: Any = function(*arguments)
    except OptkitError as error:
        result = OptkitError(f"{type(error).__name__}: {error}", hint=error.hint)
    connection.send(result)
    connection.close()


def _resident(pid: int) -> int:
    """Bytes of a process and of its children; 0 where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = {int(c) for t in threads for c in (t / "children").read_text().split()}
    except (OSError, IndexError):
        return 0
    return pages * 4096 + sum(_resident(child) for child in children)
