"""What a command says and where: its result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from optkit.passes.base import Progress

# Wide enough for any table: what is not a terminal is read by programs and in logs, where nothing may be cut off.
_UNLIMITED = 10_000


class Terminal:
    """The two streams of a command.

    Args:
        out: Stream of the result.
        err: Stream of everything else.
        verbosity: -1 errors alone, 0 also warnings and progress, 1 also what passes did, 2 everything.
        color: Whether colour is allowed; it is used on terminals alone.
    """

    def __init__(self, out: IO[str], err: IO[str], *, verbosity: int, color: bool) -> None:
        self.verbosity = verbosity
        self._out, self._err, self._color = out, err, color and not os.environ.get("NO_COLOR")
        self._closed = False

    @functools.cached_property
    def error_console(self) -> Console:
        """Rich's view of stderr."""
        return self._console(self._err)

    @functools.cached_property
    def _result_console(self) -> Console:
        return self._console(self._out)

    def _console(self, stream: IO[str]) -> Console:
        from rich.console import Console

        terminal = stream.isatty()
        return Console(
            file=stream, width=None if terminal else _UNLIMITED, force_terminal=terminal, no_color=not self._color,
            color_system="auto" if terminal and self._color else None, highlight=False, markup=False, emoji=False,
        )  # fmt: skip

    def result(self, what: str | RenderableType) -> None:
        """Print to stdout; a reader that went away is no error."""
        if self._closed:
            return
        try:
            self._print(self._out, what, None if isinstance(what, str) else self._result_console)
        except BrokenPipeError:
            self._closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def json(self, document: Any) -> None:
        """Print the one JSON document; numbers that JSON does not have become null."""
        self.result(json.dumps(_plain(document), indent=2, allow_nan=False))

    def say(self, what: str | RenderableType = "") -> None:
        """Print to stderr, unless only errors are wanted."""
        if self.verbosity >= 0:
            self.log(what)

    def log(self, what: str | RenderableType) -> None:
        """Print to stderr, above a progress bar where there is one."""
        needed = not isinstance(what, str) or "error_console" in vars(self)
        self._print(self._err, what, self.error_console if needed else None)

    def _print(self, stream: IO[str], what: str | RenderableType, console: Console | None) -> None:
        if console is None:
            stream.write(f"{what}\n")
        elif console.is_terminal:
            console.print(what, soft_wrap=isinstance(what, str))
        else:
            with console.capture() as text:
                console.print(what)
            stream.writelines(line.rstrip() + "\n" for line in text.get().splitlines())
        stream.flush()

    @functools.cached_property
    def progress(self) -> Progress:
        """A bar on a terminal, lines elsewhere, silence with ``-q``."""
        from optkit.passes.base import Silent
        from optkit.progress import Bar, Lines

        if self.verbosity < 0:
            return Silent()
        return Bar(self.error_console) if self._err.isatty() else Lines(self.say)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


class _Handler(logging.Handler):
    """Log records as lines of the terminal, above a progress bar where there is one."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            self._terminal.log(prefix + self.format(record))
        except Exception:  # noqa: BLE001  (as logging's own handlers: a log line never ends the program)
            self.handleError(record)


@contextlib.contextmanager
def _opened(*, verbosity: int, color: bool) -> Iterator[Terminal]:
    """Keep stdout for the result: whatever else writes to it, the user's own Python files included, goes to stderr."""
    out, saved = sys.stdout, None
    try:
        if out.fileno() == 1:
            out.flush()
            saved = os.dup(1)
            result: IO[str] = os.fdopen(saved, "w", encoding=out.encoding, errors="replace")
            os.dup2(2, 1)
        else:
            result = out
    except (OSError, ValueError):  # a stream without a file behind it, as in tests
        result = out
    terminal = Terminal(result, sys.stderr, verbosity=verbosity, color=color)
    handler, logger = _Handler(terminal), logging.getLogger("optkit")
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel({-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
    logger.propagate = False
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield terminal
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        if saved is not None:
            result.flush()
            os.dup2(saved, 1)
            result.close()


_COMMON = {
    "verbose": Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Say what each pass does; twice, everything.", show_default=False)
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.", show_default=False)],
    "no_color": Annotated[bool, typer.Option("--no-color", help="No colour, as with NO_COLOR=1.", show_default=False)],
    "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)],
}  # fmt: skip


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Make a command of ``function(terminal, **options)``, which returns the exit code.

    It gets the options that every command has: ``-v``, ``-q``, ``--no-color``, ``--debug``.
    """

    @functools.wraps(function)
    def run(*, verbose: int, quiet: bool, no_color: bool, debug: bool, **options: Any) -> int:
        verbosity = -1 if quiet else max(verbose, 2 if debug else 0)
        with _opened(verbosity=verbosity, color=not no_color) as terminal:
            return function(terminal, **options)

    signature = inspect.signature(function, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "terminal"]
    common = [
        inspect.Parameter(
            n, inspect.Parameter.KEYWORD_ONLY, default=0 if n == "verbose" else False, annotation=a
        )
        for n, a in _COMMON.items()
    ]
    run.__signature__ = signature.replace(parameters=[*own, *common])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *common)}
    del run.__wrapped__
    return run
