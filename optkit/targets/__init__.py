"""Known hardware: what it can do, with the source of every number beside it. A file a vendor or family."""

from __future__ import annotations

from optkit.errors import UnknownNameError
from optkit.targets import amd, android, apple, cpu, nvidia
from optkit.targets.spec import Target

__all__ = ["TARGETS", "Target", "called", "target"]

TARGETS: dict[str, Target] = {
    target.name: target for target in (*cpu.ROWS, *apple.ROWS, *android.ROWS, *nvidia.ROWS, *amd.ROWS)
}


def called(name: str) -> str:
    """How messages name a target: with a mark, where it is experimental."""
    known = TARGETS.get(name)
    return f"{name} (experimental)" if known is not None and known.experimental else name


def target(name: str | Target) -> Target:
    """The target called ``name``, in any case.

    Raises:
        UnknownNameError: Names the nearest one.
    """
    if isinstance(name, Target):
        return name
    found = TARGETS.get(name.lower())
    if found is None:
        raise UnknownNameError("target", name, TARGETS, listed="optkit targets")
    return found
