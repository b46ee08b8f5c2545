"""Build kernels for targets that are not at hand, and say what can be known of them: nothing here ran on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.errors import UsageError
from optkit.estimate import of_kernel
from optkit.kernels import KERNELS
from optkit.kernels.build import build
from optkit.kernels.gates import Gate, LeftOut, gates, left_out
from optkit.kernels.numerics import Launch, errors, interpret, launch, rivals, sanitize
from optkit.kernels.occupancy import Occupancy, of_record
from optkit.targets.gpu import Capability

if TYPE_CHECKING:
    from optkit.backends.base import Estimate
    from optkit.kernels.base import Kernel, Problem
    from optkit.targets import Target

ROWS = 4096  # of a launch that a floor is told for


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One kernel for one problem and target.

    Attributes:
        record: What the worker read from the machine code.
        gates: Conditions on it.
        occupancy: Blocks on a multiprocessor.
        estimate: Computed, for ``shapes``.
        shapes: Of the inputs.
        cached: Whether it had been compiled before.
    """

    kernel: str
    problem: Problem
    target: str
    record: Mapping[str, Any]
    gates: tuple[Gate, ...]
    occupancy: Occupancy
    estimate: Estimate
    shapes: tuple[tuple[int, ...], ...]
    cached: bool

    @property
    def passed(self) -> bool:
        """Whether all gates hold or are waived."""
        return all(gate.passed or gate.waived for gate in self.gates)


def chosen(names: Sequence[str]) -> list[Kernel]:
    """The kernels called ``names``; all where there are none.

    Raises:
        UnknownNameError: Names the nearest one.
    """
    return [KERNELS[name]() for name in (names or list(KERNELS))]


def sheets(
    names: Sequence[str], targets: Sequence[Target], *, rows: int = ROWS, fresh: bool = False
) -> list[Sheet]:
    """The examples of kernels for targets.

    Raises:
        BackendUnavailableError: Triton is not installed.
        ModelError: Triton refuses a program.
        UsageError: A target is no GPU that kernels are compiled for, or no target has the formats of any problem.
    """
    for target in targets:
        if target.capability is None or target.capability < (8, 0):
            raise UsageError(
                f"kernels are compiled for NVIDIA's GPUs from sm_80 on and for AMD's gfx942; {target.name} is {target.arch}",
                hint="choose another --target",
            )
    wanted = _wanted(names, targets)
    if not wanted:
        raise UsageError("; ".join(refused(names, targets)), hint="choose another --target")
    jobs = [(k.program(p, t.capability), t.capability) for k, p, t in wanted if t.capability is not None]
    built = build(jobs, fresh=fresh)
    return [
        _sheet(kernel, problem, target, one.record, rows, one.cached)
        for (kernel, problem, target), one in zip(wanted, built, strict=True)
    ]


def _wanted(names: Sequence[str], targets: Sequence[Target]) -> list[tuple[Kernel, Problem, Target]]:
    return [
        (kernel, problem, target)
        for kernel in chosen(names)
        for problem in kernel.examples
        for target in targets
        if target.capability is not None and kernel.unsupported(problem, target.capability) is None
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A program that a device may choose for an example.

    Attributes:
        left_out: Why it is not shipped; empty where it is.
    """

    target: str
    left_out: tuple[LeftOut, ...]


def finalists(names: Sequence[str], targets: Sequence[Target]) -> list[Finalist]:
    """All that a bundle for the examples would hold or leave out; the targets have the formats of some, as for ``sheets``.

    Raises:
        BackendUnavailableError: Triton is not installed.
        ModelError: Triton refuses a program.
    """
    wanted = [
        (kernel, target, program)
        for kernel, problem, target in _wanted(names, targets)
        if target.capability is not None
        for program in kernel.finalists(problem, target.capability)
    ]
    built = build([(program, t.capability) for _, t, program in wanted if t.capability is not None])
    return [
        Finalist(target=target.name, left_out=tuple(left_out(kernel.name, program, one.record)))
        for (kernel, target, program), one in zip(wanted, built, strict=True)
    ]


def refused(names: Sequence[str], targets: Sequence[Target]) -> list[str]:
    """What ``sheets`` leaves out, and why: problems in formats that a target does not have."""
    found = []
    for kernel in chosen(names):
        for target in targets:
            assert target.capability is not None
            whys = (kernel.unsupported(problem, target.capability) for problem in kernel.examples)
            found += [
                f"{kernel.name} for {target.name}: {why}" for why in dict.fromkeys(whys) if why is not None
            ]
    return found


def _sheet(
    kernel: Kernel, problem: Problem, target: Target, record: Mapping[str, Any], rows: int, cached: bool
) -> Sheet:
    shapes = kernel.shapes(problem, rows)
    operations, moved = kernel.work(problem, shapes)
    return Sheet(
        kernel=kernel.name, problem=problem, target=target.name, record=record, gates=gates(record),
        occupancy=of_record(record),
        estimate=of_kernel(operations, moved, record["program"]["products"] or "fp32", target),
        shapes=tuple(shapes), cached=cached,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """A kernel in Triton's interpreter against float64.

    Attributes:
        rows: Of the inputs.
        steps: Largest error of any output, in steps of its format.
        allowed: What the arithmetic explains.
    """

    kernel: str
    problem: Problem
    rows: int
    steps: float
    allowed: float


def numerics(names: Sequence[str], capability: Capability) -> list[Numerics]:
    """The small problems of kernels, at sizes around a block's, in the interpreter; of other finalists one size.

    Raises:
        BackendUnavailableError: Triton is not installed.
        ModelError: The interpreter fails its own test, or a kernel writes where it may not.
    """
    cases: list[tuple[int, Launch]] = []
    for kernel in chosen(names):
        for problem in kernel.small:
            if kernel.unsupported(problem, capability) is None:
                sizes = kernel.edges(problem, capability)
                cases += [(rows, launch(kernel, problem, capability, rows)) for rows in sizes]
                cases += [(max(sizes), one) for one in rivals(kernel, problem, capability)]
    found = []
    for (rows, one), outputs in zip(cases, interpret([one for _, one in cases]), strict=True):
        steps = [e.steps for e in errors(one, outputs)]
        worst = float(np.max(np.where(np.isnan(steps), np.inf, steps)))
        allowed = one.kernel.allowed(one.problem)
        found.append(
            Numerics(kernel=one.kernel.name, problem=one.problem, rows=rows, steps=worst, allowed=allowed)
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a kernel does to memory, by the sanitizer.

    Attributes:
        rows: Of the inputs.
        fault: The access outside the tensors or the race, in words; empty where there is none.
        unjudged: Why nothing can be said; empty where all was checked.
        steps: Largest error of any output against float64, in steps of its format; None where it stopped.
    """

    kernel: str
    problem: Problem
    rows: int
    fault: str
    unjudged: str
    steps: float | None


def memory(names: Sequence[str], capability: Capability) -> list[Memory]:
    """The small problems of kernels, at the least and the most rows that are worth a test.

    Raises:
        BackendUnavailableError: Triton or the sanitizer is not installed.
        ModelError: The process died.
    """
    cases = [
        (kernel, problem, rows)
        for kernel in chosen(names)
        for problem in kernel.small
        if kernel.unsupported(problem, capability) is None
        for rows in sorted({f(kernel.edges(problem, capability)) for f in (min, max)})
    ]
    launches = [launch(kernel, problem, capability, rows) for kernel, problem, rows in cases]
    found = []
    for (kernel, problem, rows), one, verdict in zip(
        cases, launches, sanitize(launches, capability), strict=True
    ):
        steps = max(e.steps for e in errors(one, verdict.outputs)) if verdict.outputs else None
        found.append(
            Memory(
                kernel=kernel.name, problem=problem, rows=rows, fault=verdict.fault, unjudged=verdict.unjudged, steps=steps
            )
        )  # fmt: skip
    return found
