"""Every error that optkit raises on purpose, with its exit code and a hint."""

from __future__ import annotations

from collections.abc import Iterable


class OptkitError(Exception):
    """Something that the user should read; ``hint`` says what to do about it.

    Messages say what is wrong and where, in lower case without a full stop.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OptkitError):
    """Asked wrongly: options, recipe, or data."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not fit its schema or its source."""


class DataError(UsageError):
    """Calibration or evaluation data that does not fit the model."""


class UnknownNameError(UsageError):
    """A name that no table has; the hint suggests the nearest.

    Args:
        listed: The command that lists what is known, where that is too much for a line.
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, where: str = "", listed: str | None = None
    ) -> None:
        import difflib

        known = sorted(known)
        close = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
        near = next((k for k in known if close and k.lower() == close[0]), None)
        every = f"{listed} lists what is known" if listed else f"known: {', '.join(known)}"
        hint = f"did you mean {near!r}?" if near else every
        super().__init__(f"{where}{': ' if where else ''}unknown {kind} {name!r}", hint=hint)


class ModelError(OptkitError):
    """A model that cannot be read, is not valid, or computes something else than it should."""


class UnsupportedOpError(ModelError):
    """Operators that a backend cannot run, all of them at once.

    Args:
        where: The model and the backend, for the first line.
        problems: ``(node, reason)``, one for every node concerned.
    """

    def __init__(self, where: str, problems: Iterable[tuple[str, str]], *, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  {node}: {reason}" for node, reason in self.problems)
        super().__init__(f"{where}: {len(self.problems)} unsupported node(s):{lines}", hint=hint)


class PassError(OptkitError):
    """A pass that failed or broke the graph."""


class LimitMissedError(OptkitError):
    """Done, but a limit, gate or ``require`` was missed."""

    exit_code = 3


class BackendUnavailableError(OptkitError):
    """Not possible on this machine: a package or device is missing."""

    exit_code = 4
