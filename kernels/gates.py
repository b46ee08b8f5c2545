"""What the machine code of a program has to be like before it is shipped; nothing here runs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optkit.kernels.occupancy import of_record
from optkit.targets.gpu import ARCHITECTURES, formats, is_amd

# Matrix instructions by format of the operands and major compute capability: mma.sync below 9.0 and on 12.x, wgmma on 9.0,
# tcgen05 on 10.x. A tile with fewer than 64 rows has neither of these two: then it is mma.sync everywhere.
_FLOATS = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA", 12: "HMMA"}
_PRODUCTS: dict[str, dict[int, str]] = {
    "fp16": _FLOATS,
    "bf16": _FLOATS,
    "int8": {8: "IMMA", 9: "IGMMA", 10: "UTCIMMA", 12: "IMMA"},
    "fp8": {8: "QMMA", 9: "QGMMA", 10: "UTCQMMA", 12: "QMMA"},
}
# On AMD's GPUs they are called by what they add up and multiply.
_AMD_PRODUCTS = {
    "fp16": re.compile(r"v_mfma_f32_\w+_f16"),
    "bf16": re.compile(r"v_mfma_f32_\w+_bf16"),
    "int8": re.compile(r"v_mfma_i32_\w+_i8"),
}
_AMD_WIDE = re.compile(r"^(global|buffer|flat)_load_dwordx4\b")
_AMD_READ = re.compile(r"^(global|buffer|flat)_load_")
_WIDE = re.compile(r"^(LDG\.E(\.\w+)*\.(128|ENL2\.256)|LDGSTS\.E(\.\w+)*\.128|UTMALDG|UBLKCP)")
_READ = re.compile(r"^(LDG|LDGSTS|UTMALDG|UBLKCP)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One condition.

    Attributes:
        name: What is looked at.
        found: What is there, in words.
        passed: Whether it holds.
        waived: Why it need not; empty where it has to.
    """

    name: str
    found: str
    passed: bool
    waived: str = ""


def gates(record: Mapping[str, Any]) -> tuple[Gate, ...]:
    """Every condition on a compiled program, given its record."""
    major, minor = record["capability"]
    limits, program, mix = ARCHITECTURES[major, minor], record["program"], record["instructions"]
    running = of_record(record)
    kinds = sorted({a["type"].lstrip("*") for a in program["arguments"]})
    legal = {"i8": "int8", "fp8e4nv": "fp8"}
    alien = [k for k in kinds if k[0] != "i" and legal.get(k, k) not in formats((major, minor))]
    rows = [
        (
            "architecture",
            f"code for {record['arch']}",
            # Triton compiles for sm_120a where sm_120 would do: it is the same hardware.
            record["arch"].rstrip("a") == limits.arch.rstrip("a"),
        ),
        ("formats", f"{', '.join(alien)} not on {limits.arch}" if alien else ", ".join(kinds), not alien),
        ("shared memory", f"{record['shared']} of {limits.shared} bytes", record["shared"] <= limits.shared),
        ("stack", f"{record['stack']} bytes", record["stack"] == 0),
        ("occupancy", f"{running.blocks} blocks, {running.share:.0%} of the warps", running.blocks > 0),
    ]
    amd = is_amd((major, minor))
    if program["products"] is not None:
        if amd:
            wanted, named = "MFMA", _AMD_PRODUCTS[program["products"]]
            count = sum(n for name, n in mix.items() if named.fullmatch(name))
        else:
            wanted = _PRODUCTS[program["products"]][8 if program["low"] else major]
            count = sum(n for name, n in mix.items() if name.split(".")[0] == wanted)
        rows.append(("matrix instructions", f"{count} {wanted}", count > 0))
    if program["wide"]:
        broad, any_ = (_AMD_WIDE, _AMD_READ) if amd else (_WIDE, _READ)
        wide = sum(n for name, n in mix.items() if broad.match(name))
        all_ = sum(n for name, n in mix.items() if any_.match(name))
        rows.append(("128-bit loads", f"{wide} of {all_} reads of global memory", wide > 0))
    waived = program["waived"]
    return tuple(Gate(name=n, found=f, passed=ok, waived=waived.get(n, "")) for n, f, ok in rows)


def failures(record: Mapping[str, Any]) -> list[str]:
    """The conditions that do not hold and are not waived, in words."""
    return [f"{g.name}: {g.found}" for g in gates(record) if not g.passed and not g.waived]
