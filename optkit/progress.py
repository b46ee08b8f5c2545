"""How far long work is: a bar on a terminal, now and then a line where it is not one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from optkit.passes.base import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# Seconds between two lines, and between two drawings of a bar.
_LINES, _FRAMES = 3.0, 0.1


def on(stream: TextIO) -> Progress:
    """A bar, or lines where ``stream`` is no terminal."""
    if stream.isatty():
        from rich.console import Console

        return Bar(Console(file=stream))

    def say(line: str) -> None:
        stream.write(f"{line}\n")
        stream.flush()

    return Lines(say)


class Lines(Progress):
    """``evaluate reference: 64/300``, for logs. Work that is done before the first line is due says nothing.

    Args:
        say: Takes one line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    @contextlib.contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[_Lines]:
        """Open a task."""
        task = _Lines(self._say, what, total)
        yield task
        task.finish()


class _Lines:
    def __init__(self, say: Callable[[str], None], what: str, total: int | None) -> None:
        self._say, self._what, self._total = say, what, total
        self._done, self._start = 0, time.monotonic()
        self._next, self._said = self._start + _LINES, False

    def advance(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() >= self._next:
            self._line("")

    def finish(self) -> None:
        if self._said:
            self._line(f", {time.monotonic() - self._start:.0f} s")

    def _line(self, end: str) -> None:
        of = "" if self._total is None else f"/{self._total}"
        self._say(f"{self._what}: {self._done}{of}{end}")
        self._next, self._said = time.monotonic() + _LINES, True


class Bar(Progress):
    """Bars of rich, gone when the work is done.

    They are drawn by the work itself as it advances. A thread that draws would take CPU time in the middle of timings.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichProgress | None = None

    @contextlib.contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[_Bar]:
        """Open a task, below those that are open."""
        outer = self._bars
        if outer is not None:
            with self._row(outer, what, total) as row:
                yield row
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = RichProgress(*columns, console=self._console, auto_refresh=False, transient=True)
        try:
            with self._bars, self._row(self._bars, what, total) as row:
                yield row
        finally:
            self._bars = None

    @contextlib.contextmanager
    def _row(self, bars: RichProgress, what: str, total: int | None) -> Iterator[_Bar]:
        identity = bars.add_task(what, total=total)
        bars.refresh()
        try:
            yield _Bar(bars, identity)
        finally:
            bars.remove_task(identity)
            bars.refresh()


class _Bar:
    def __init__(self, bars: RichProgress, identity: TaskID) -> None:
        self._bars, self._identity, self._next = bars, identity, 0.0

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._identity, n)
        if (now := time.monotonic()) >= self._next:
            self._bars.refresh()
            self._next = now + _FRAMES
