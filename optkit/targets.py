"""Known hardware: what it can do, with the source of every number beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from optkit.errors import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One piece of hardware.

    Attributes:
        name: As in ``--target``.
        vendor: ``intel``, ``amd``, ``arm`` … or ``any`` for the machine at hand.
        arch: The instruction set or architecture, as the vendor writes it.
        backends: What can lower for it, best first.
        formats: Number formats with hardware support.
        runs_here: Whether an artifact for it can be run and timed on this machine.
        memory: Bytes, or None where it depends on the machine.
        bandwidth: Bytes per second, or None where it has to be measured.
        peak: Operations per second by format; empty where it has to be measured.
        source: Where the numbers come from.
    """

    name: str
    vendor: str
    arch: str
    backends: tuple[str, ...]
    formats: frozenset[str]
    runs_here: bool = False
    memory: int | None = None
    bandwidth: float | None = None
    peak: Mapping[str, float] = field(default_factory=dict)
    source: str = ""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            vendor="any",
            arch="this machine",
            backends=("onnxruntime", "openvino"),
            formats=frozenset({"fp32", "int8"}),
            runs_here=True,
            source="measured where it runs",
        ),
    )
}


def target(name: str | Target) -> Target:
    """The target called ``name``, in any case.

    Raises:
        UnknownNameError: Names the nearest one.
    """
    if isinstance(name, Target):
        return name
    found = TARGETS.get(name.lower())
    if found is None:
        raise UnknownNameError("target", name, TARGETS)
    return found
