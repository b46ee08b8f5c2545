"""What the machine code of a program has to be like before it is shipped; nothing here runs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optkit.kernels.occupancy import of_record
from optkit.targets.gpu import ARCHITECTURES, formats, is_amd

if TYPE_CHECKING:
    from optkit.kernels.base import Program

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
# Reads of global memory, and how many bytes of it a thread gets: NVIDIA's by a part of the name, 4 where none says otherwise;
# AMD's by the end. What copies tiles without threads is wide whatever it is called.
_READ = re.compile(r"^(LDG|LDGSTS)\b|^(global|buffer|flat)_load_")
_TILES = re.compile(r"^(UTMALDG|UBLKCP)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "ENL2": 32}
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_WIDE, _TILE = 16, 1 << 10
# Of the bytes that its instructions read, so many have to be read 16 at a time: scales and biases, which are read once, count
# like the operands, which are read in a loop.
_SHARE = 0.25


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
    read = [(n, size) for name, n in mix.items() if (size := read_size(name))]
    wide, count, moved = (
        sum(n * size for n, size in read if size >= _WIDE), sum(n for n, _ in read), sum(n * size for n, size in read),
    )  # fmt: skip
    share = wide / moved if moved else 0.0
    rows.append(
        ("128-bit loads", f"{share:.0%} of the bytes of {count} reads of global memory", share >= _SHARE)
    )
    waived = program["waived"]
    return tuple(Gate(name=n, found=f, passed=ok, waived=waived.get(n, "")) for n, f, ok in rows)


def read_size(instruction: str) -> int:
    """Bytes that a thread reads of global memory; 0 where it is no such read."""
    if _TILES.match(instruction):
        return _TILE
    if not _READ.match(instruction):
        return 0
    if instruction.islower():
        kind = instruction.partition("_load_")[2]
        return next((n for end, n in reversed(_AMD_BYTES.items()) if end in kind), 4)
    return max((n for part, n in _BYTES.items() if part in instruction.split(".")), default=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A finalist that is not shipped, and a condition that it does not keep; see ``Gate``."""

    kernel: str
    config: str
    gate: str
    found: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.config}): {self.gate}: {self.found}"


def left_out(kernel: str, program: Program, record: Mapping[str, Any]) -> list[LeftOut]:
    """Why a program of a kernel is not shipped; empty where it may be."""
    return [
        LeftOut(kernel=kernel, config=program.config, gate=g.name, found=g.found)
        for g in gates(record)
        if not g.passed and not g.waived
    ]


def failures(record: Mapping[str, Any]) -> list[str]:
    """The conditions that do not hold and are not waived, in words."""
    return [f"{g.name}: {g.found}" for g in gates(record) if not g.passed and not g.waived]
