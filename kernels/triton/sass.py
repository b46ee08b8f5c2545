"""How often each instruction occurs in cubins, with one start of NVIDIA's disassembler for all programs of an architecture.

A start takes as long as the instructions of twenty programs, and ``nvdisasm`` takes one file. So it is given their instructions in a
row, without their ELF: branches then go to addresses in place of labels, and names, which are all that is counted, stay the same.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_BYTES = 16  # of an instruction, since Volta
_EXECUTABLE = 4
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)


def tool(name: str, *arguments: str) -> str:
    """What one of the programs that Triton brings says.

    Raises:
        RuntimeError: It fails, with what it says then.
    """
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout


def code(cubin: bytes) -> bytes:
    """All instructions of an ELF file: its executable sections, in order."""
    (at,), (sections,) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<H", cubin, 60)
    rows = [struct.unpack_from("<IIQQQQ", cubin, at + 64 * index) for index in range(sections)]
    return b"".join(
        cubin[start : start + size] for _, _, flags, _, start, size in rows if flags & _EXECUTABLE
    )


def mixes(codes: Sequence[bytes], arch: str) -> list[dict[str, int]]:
    """The instructions of each program for ``arch``, with their modifiers, and how many of each.

    Raises:
        RuntimeError: The disassembler fails, or does not name each instruction.
    """
    if any(not c or len(c) % _BYTES for c in codes):
        raise RuntimeError(f"a program for {arch} is not a whole number of instructions")
    ends = list(itertools.accumulate(len(c) for c in codes))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = tool("nvdisasm", "--binary", arch.replace("sm_", "SM"), "--no-dataflow", file.name)
    rows = [(int(address, 16), name) for address, name in _LINE.findall(text)]
    if [address for address, _ in rows] != list(range(0, ends[-1], _BYTES)):
        raise RuntimeError(f"nvdisasm names {len(rows)} of {ends[-1] // _BYTES} instructions for {arch}")
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in codes]
    for address, name in rows:
        counts[bisect.bisect_right(ends, address)][name] += 1
    return [dict(sorted(count.items())) for count in counts]
