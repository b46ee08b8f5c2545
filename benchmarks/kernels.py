"""Every kernel for every architecture: compile, inspect, compute; ``python -m optkit.benchmarks.kernels [--write]``.

Nothing here runs on a GPU. With ``--write`` the table goes to ``results/kernels.md`` beside this file.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from optkit.kernels.gates import failures
from optkit.targets import target
from optkit.workbench import chosen, numerics, sheets

# One of each kind of architecture.
_TARGETS = ("a100", "l4", "h100", "b200", "rtx5090")
_FILE = Path(__file__).parent / "results" / "kernels.md"


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


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
        "The error is the largest in Triton's interpreter against float64, in steps of the format, over all architectures' programs.",
        "Nothing of this ran on a GPU.",
        "",
        f"| kernel | problem | {' | '.join(s.record['arch'] for s in found[: len(targets)])} | error |",
        f"|---|---|{'---|' * len(targets)}---|",
    ]
    for start in range(0, len(found), len(targets)):
        row = found[start : start + len(targets)]
        first = row[0]
        fmt = first.problem["format"]
        worst = max(n.steps for n in numbers if n.kernel == first.kernel and n.problem["format"] == fmt)
        problem = " ".join(str(v) for k, v in first.problem.items() if k not in ("epsilon", "total"))
        cells = [f"{s.record['registers']} / {s.record['shared']} / {s.occupancy.share:.0%}" for s in row]
        lines.append(f"| {first.kernel} | {problem} | {' | '.join(cells)} | {worst:.2f} |")
    lines += [
        "",
        f"{len(found)} programs of {len(chosen(()))} kernels: {cold:.0f} CPU-seconds to compile and inspect, "
        f"{warm:.1f} s from the cache; {len(numbers)} launches in the interpreter, {spent:.0f} CPU-seconds.",
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
