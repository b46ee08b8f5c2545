"""A model that runs in a process of its own, as those who serve one run it.

Where a dozen runtimes share a process, what one frees and the next takes lies in pieces all over memory, and small models run
up to a fifth slower for it, unlike from runtime to runtime.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort

from optkit.bench import alternate, clock
from optkit.errors import OptkitError
from optkit.evaluate import Run

# Seconds that opening a model and one round may take.
_PATIENCE = 300.0


class Apart:
    """A context in which a model can be timed; several may be opened at the same time.

    Args:
        open_: Gives the callable; a function of a module, or a ``partial`` of one.
        feeds: A file of ``keep``.
    """

    def __init__(self, open_: Callable[[], Run], feeds: Path) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, open_, feeds), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        self._process.join(1)
        self._process.kill()
        self._process.join()

    def wait(self) -> None:
        """Until it is open.

        Raises:
            OptkitError: It cannot be opened.
        """
        if not self._ready:
            self._answer()
            self._ready = True

    def time(self, index: int, *, settle: int = 0) -> tuple[float, float]:
        """As ``optkit.bench.clock``.

        Raises:
            OptkitError: It cannot be opened, the run fails, or the process is gone.
        """
        self.wait()
        self._ours.send((index, settle))
        cpu, wall = self._answer()
        return cpu, wall

    def _answer(self) -> Any:
        if not self._ours.poll(_PATIENCE):
            raise OptkitError(f"stopped: no answer within {_PATIENCE:.0f} seconds")
        try:
            answer = self._ours.recv()
        except EOFError:
            self._process.join()
            raise OptkitError(f"its process died with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise OptkitError(answer)
        return answer


def in_turn(
    openers: Mapping[str, Callable[[], Run]], feeds: Path, *, seatings: int, rounds: int, settle: int
) -> dict[str, np.ndarray]:
    """CPU seconds of each, all in turn, each in processes of its own, one after the other.

    Args:
        openers: As for ``Apart``.
        feeds: A file of ``keep``.
        seatings: How many processes each has.
        rounds: In each of them.
        settle: Calls before each that are not counted.
    """
    taken = []
    for seed in range(seatings):
        with contextlib.ExitStack() as stack:
            apart = {name: stack.enter_context(Apart(open_, feeds)) for name, open_ in openers.items()}
            calls = {name: partial(a.time, settle=settle) for name, a in apart.items()}
            taken.append(alternate(calls, rounds=rounds, seed=seed))
    return {name: np.concatenate([times[name][:, 0] for times in taken]) for name in openers}


def keep(feeds: Sequence[Mapping[str, np.ndarray]], file: Path) -> Path:
    """Write the inputs where other processes find them."""
    named: dict[str, Any] = {f"{k} {name}": x for k, batch in enumerate(feeds) for name, x in batch.items()}
    np.savez(file, **named)
    return file


def _kept(file: Path) -> list[dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(file) as arrays:
        for key in arrays:
            index, _, name = key.partition(" ")
            found.setdefault(int(index), {})[name] = arrays[key]
    return [found[k] for k in sorted(found)]


def _serve(theirs: Connection, open_: Callable[[], Run], file: Path) -> None:
    ort.set_default_logger_severity(4)
    with contextlib.suppress(EOFError, OSError):
        try:
            run, feeds = open_(), _kept(file)
            run(feeds[0])
            theirs.send(None)
            while True:
                index, settle = theirs.recv()
                theirs.send(clock(run, feeds, index, settle=settle))
        except EOFError:
            raise
        except Exception as error:  # noqa: BLE001  (runtimes raise anything; the parent says what)
            theirs.send(f"{type(error).__name__}: {error}")
