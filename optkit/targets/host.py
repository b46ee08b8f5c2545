"""The processor at hand, as the operating system describes it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optkit.targets.spec import Target

_INFO = Path("/proc/cpuinfo")
# Instruction sets that matter to products of matrices, weakest first.
TOLD = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def described(text: str) -> dict[str, str]:
    """The fields of the first processor in the text of ``/proc/cpuinfo``."""
    first = text.strip().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def flags(fields: Mapping[str, str]) -> frozenset[str]:
    """Instruction sets; x86 calls them flags, arm64 features."""
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _text() -> str:
    lines: list[str] = []
    if _INFO.is_file():
        with _INFO.open(encoding="utf-8", errors="replace") as file:
            # A large server lists hundreds of processors, and the first says all.
            for line in file:
                if not line.strip() and lines:
                    break
                lines.append(line)
    return "".join(lines)


@cache
def fields() -> dict[str, str]:
    """What is known of the processor at hand; empty where there is no ``/proc/cpuinfo``."""
    return described(_text())


def features() -> frozenset[str]:
    """Instruction sets of the processor at hand; empty where they are not known."""
    return flags(fields())


def level(rows: Sequence[Target], have: frozenset[str]) -> Target | None:
    """Of ``rows``, weakest first, the last that a processor with the instruction sets ``have`` is one of."""
    fit = [row for row in rows if any(group <= have for group in row.features)]
    return fit[-1] if fit else None


def detected(row: Target, rows: Sequence[Target], have: frozenset[str]) -> tuple[Target, ...]:
    """``row`` with what is known of this machine, and ``rows`` with whether this machine is one of them."""
    mine = level(rows, have)
    told = " ".join((platform.machine(), *(f for f in TOLD if f in have)))
    here = replace(row, arch=told, features=(have,) if have else ())
    if mine is not None:
        # Processors have bfloat16 products beside AMX too, which is no level of its own.
        more = {"bf16"} if have & {"avx512_bf16", "bf16"} else set()
        here = replace(here, formats=mine.formats | more, saturates=mine.saturates)
    return (here, *(replace(r, runs_here=r is mine) for r in rows))


def machine() -> dict[str, str]:
    """The processor and system at hand, as reports name what measurements were taken on; no host name."""
    facts = {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()}
    if known := fields():
        facts["processor"] = known.get("model name", "")
        facts["features"] = " ".join(f for f in TOLD if f in features())
    return facts


def cores() -> int:
    """Physical cores that this process may use; logical ones where threads of one core cannot be told apart."""
    usable = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    seen = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        seen.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return max(1, len(seen))
