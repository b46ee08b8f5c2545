"""Every kernel for every architecture: compile, inspect, compute; ``python -m optkit.benchmarks.kernels [--write]``.

Nothing here runs on a GPU. With ``--write`` the table goes to ``results/kernels.md`` beside this file.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.benchmarks.machine import processor
from optkit.kernels.gates import failures
from optkit.targets import target
from optkit.workbench import chosen, numerics, sheets

if TYPE_CHECKING:
    from optkit.kernels.base import Problem
    from optkit.workbench import Sheet

# One of each kind of architecture.
_TARGETS = ("a100", "l4", "h100", "b200", "rtx5090", "mi300x")
_FILE = Path(__file__).parent / "results" / "kernels.md"


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _kind(problem: Problem) -> tuple[Any, ...]:
    return problem["format"], problem.get("stored")


def _cell(sheet: Sheet) -> str:
    return f"{sheet.record['registers']} / {sheet.record['shared']} / {sheet.occupancy.share:.0%}"


def main(arguments: list[str]) -> int:
    """Print the table; the exit code is 1 where a gate or a number fails."""
    targets = [target(name) for name in _TARGETS]
    before = _cpu()
    found = sheets((), targets, fresh=True)
    cold = _cpu() - before
    started = time.perf_counter()
    sheets((), targets)
    warm = time.perf_counter() - started
    before = _cpu()
    numbers = [n for t in targets if t.capability for n in numerics((), t.capability)]
    spent = _cpu() - before
    bad = [f"{s.kernel} {dict(s.problem)} {s.target}: {why}" for s in found for why in failures(s.record)]
    bad += [
        f"{n.kernel} {dict(n.problem)} {n.rows} rows: {n.steps:.3g} > {n.allowed}"
        for n in numbers
        if not n.steps <= n.allowed
    ]
    lines = [
        "# Kernels, compiled and inspected without a GPU",
        "",
        "Registers a thread / bytes of shared memory a block / occupancy; every program passes its gates unless listed below.",
        "The error is the largest in Triton's interpreter against float64, in steps of the format, over all architectures' programs;",
        "of parts of sums, which are float32, in steps of what is multiplied.",
        "Where a program is missing (-), the architecture does not have the number format. Nothing of this ran on a GPU.",
        "",
        f"| kernel | problem | {' | '.join(t.arch for t in targets)} | error |",
        f"|---|---|{'---|' * len(targets)}---|",
    ]
    for kernel in chosen(()):
        for problem in kernel.examples:
            row = {s.target: s for s in found if s.kernel == kernel.name and s.problem == problem}
            own = [n for n in numbers if n.kernel == kernel.name]
            alike = [n.steps for n in own if _kind(n.problem) == _kind(problem)] or [n.steps for n in own]
            words = " ".join(str(v) for k, v in problem.items() if k not in ("epsilon", "total"))
            cells = [_cell(row[t.name]) if t.name in row else "-" for t in targets]
            lines.append(f"| {kernel.name} | {words} | {' | '.join(cells)} | {max(alike):.2f} |")
    lines += [
        "",
        f"{len(found)} programs of {len(chosen(()))} kernels: {cold:.0f} CPU-seconds to compile and inspect, "
        f"{warm:.1f} s from the cache; {len(numbers)} launches in the interpreter, {spent:.0f} CPU-seconds; {processor()['name']}.",
        f"Failures: {len(bad)}",
        *(f"* {line}" for line in bad),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if "--write" in arguments:
        _FILE.write_text(text, encoding="utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
