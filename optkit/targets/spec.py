"""What is known about a piece of hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
        features: Instruction sets by Linux's names: the processor has all of at least one group.
        saturates: Whether products of u8 and s8 are added in pairs that saturate in 16 bits before they are accumulated.
        memory: Bytes, or None where it depends on the machine.
        bandwidth: Bytes per second, or None where it has to be measured.
        peak: Operations per second by format, dense; empty where it has to be measured.
        system: Oldest system that an artifact for it has to run on, such as ``iOS18``; empty where there is no such thing.
        specification: Newest version of Core ML's file format that ``system`` reads, or None.
        compute_units: Parts of the device that its runtime may choose among, best first; empty where there is no choice.
        source: Where the numbers come from.
        capability: CUDA compute capability, ``(9, 0)``.
        units: Streaming multiprocessors or compute units.
        l2: Bytes of the last cache that all units share.
        shared: Bytes of shared memory that one block may ask for.
        convolves: Whether products and attention run best as convolutions of one element over ``[B, C, 1, S]``, in small parts.
        axes: How many axes a tensor may have at most, or has where it is computed with best; None where any will do.
        lacks: Why a number format is refused, by format.
        experimental: Whether what is made for it may change, or fail, with the next version of what runs it.
    """

    name: str
    vendor: str
    arch: str
    backends: tuple[str, ...]
    formats: frozenset[str]
    runs_here: bool = False
    features: tuple[frozenset[str], ...] = ()
    saturates: bool = False
    memory: int | None = None
    bandwidth: float | None = None
    peak: Mapping[str, float] = field(default_factory=dict)
    system: str = ""
    specification: int | None = None
    compute_units: tuple[str, ...] = ()
    source: str = ""
    capability: tuple[int, int] | None = None
    units: int | None = None
    l2: int | None = None
    shared: int | None = None
    convolves: bool = False
    axes: int | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    experimental: bool = False

    def refusal(self, fmt: str) -> str | None:
        """Why ``fmt`` cannot be computed in on this hardware; None where it can."""
        if fmt in self.formats:
            return None
        return self.lacks.get(fmt, f"{self.name} ({self.arch}) has no hardware support for {fmt}")

    @property
    def floatless(self) -> bool:
        """Whether it computes in integers alone, so that no model runs on it as it was trained."""
        return not self.formats & {"fp32", "fp16"}
