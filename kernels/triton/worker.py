"""A process of its own that compiles programs: ``python -m optkit.kernels.triton.worker FOLDER``.

Reads ``jobs.json`` and writes ``<key>.cubin`` or ``<key>.hsaco``, ``<key>.ttir`` and ``<key>.json`` for each job into the folder.
No driver and no GPU is needed. What is reported of a program is read from the very bytes that are shipped; for AMD's GPUs, whose
disassembler Triton does not bring, from the assembly that they are assembled from.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optkit.kernels.triton.sass import code, mixes, tool
from optkit.targets.gpu import ARCHITECTURES, code_kind, is_amd

_ALIGNMENT = 16
# What the metadata of AMD's code say, and what its lines begin with.
_SAID = re.compile(r"^ +\.(vgpr_count|sgpr_count|private_segment_fixed_size): +(\d+)", re.MULTILINE)
_TARGET = re.compile(r"^\s*\.amdgcn_target \"\S*?(gfx\w+)\"", re.MULTILINE)
_MNEMONIC = re.compile(r"^\t([a-z][a-z0-9_]+)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def build(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile one program; the record of what came out, for NVIDIA's GPUs but for the instructions."""
    program, (major, minor) = job["program"], job["capability"]
    module, _, name = program["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    given = {argument["name"]: argument for argument in program["arguments"]}
    constants = program["constants"]
    if set(function.arg_names) != set(given) | set(constants):
        odd = sorted(set(function.arg_names) ^ (set(given) | set(constants)))
        raise ValueError(f"{program['function']}: the program and the source disagree on {', '.join(odd)}")
    signature = {n: given[n]["type"] if n in given else "constexpr" for n in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", _ALIGNMENT]]
        for index, n in enumerate(function.arg_names)
        if n in given and given[n]["aligned"]
    }
    source = ASTSource(function, signature, constexprs=dict(constants), attrs=aligned)
    limits = ARCHITECTURES[major, minor]
    compiled = triton.compile(
        source,
        target=GPUTarget("hip", limits.arch, limits.lanes)
        if is_amd((major, minor))
        else GPUTarget("cuda", major * 10 + minor, limits.lanes),
        # Programs ask for warps of 32 threads.
        options={"num_warps": max(1, program["warps"] * 32 // limits.lanes), "num_stages": program["stages"]},
    )
    binary, meta = compiled.asm[code_kind(limits.arch)], compiled.metadata
    if meta.num_ctas != 1 or meta.launch_cooperative_grid or getattr(meta, "launch_pdl", False):
        raise ValueError(f"{program['function']} asks for clusters or a cooperative launch")
    file = folder / f"{job['key']}.{code_kind(limits.arch)}"
    file.write_bytes(binary)
    (folder / f"{job['key']}.ttir").write_text(str(compiled.asm["ttir"]), encoding="utf-8")
    found = (
        _of_assembly(compiled.asm["amdgcn"])
        if is_amd((major, minor))
        else _of_cubin(file, compiled.asm["ptx"])
    )
    return {
        "key": job["key"],
        "entry": meta.name,
        "capability": [major, minor],
        "sha256": hashlib.sha256(binary).hexdigest(),
        "bytes": len(binary),
        "triton": triton.__version__,
        "fp_fusion": os.environ["TRITON_DEFAULT_FP_FUSION"],
        "signature": {n: t for n, t in signature.items() if t != "constexpr"},
        # Of the entry, in order; behind them it takes two more pointers.
        "parameters": [n for n, t in signature.items() if t != "constexpr"],
        "trailing_pointers": ["global_scratch", "profile_scratch"],
        "warps": meta.num_warps,
        # All that Triton asks for is dynamic; the KiB that cuobjdump adds from sm_90 on is the system's.
        "shared": meta.shared,
        # Bytes a block behind each of the trailing pointers; NULL where there are none.
        "scratch": meta.global_scratch_size,
        "scratch_align": meta.global_scratch_align,
        "profile_scratch": meta.profile_scratch_size,
        "lanes": limits.lanes,
        **found,
        "program": program,
    }


def _of_cubin(file: Path, ptx: str) -> dict[str, Any]:
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert arch is not None
    registers, stack, local = _usage(file)
    return {
        "arch": arch[1],
        "registers": registers,
        "stack": max(stack, local),
    }


def _of_assembly(text: str) -> dict[str, Any]:
    said = {name: int(n) for name, n in _SAID.findall(text)}
    arch = _TARGET.search(text)
    assert arch is not None
    counts = collections.Counter(_MNEMONIC.findall(text))
    return {
        "arch": arch[1],
        # Of a lane, those that matrix instructions add up in among them; and of a wave.
        "registers": said["vgpr_count"],
        "scalars": said["sgpr_count"],
        "stack": said["private_segment_fixed_size"],
        "instructions": dict(sorted(counts.items())),
    }


def _usage(file: Path) -> tuple[int, int, int]:
    found = _USAGE.search(tool("cuobjdump", "-res-usage", str(file)))
    if found is None:
        raise RuntimeError("cuobjdump does not tell the registers")
    return int(found[1]), int(found[2]), int(found[3])


def count(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Add the instructions to records of NVIDIA's machine code of one architecture."""
    codes = [code((folder / f"{record['key']}.cubin").read_bytes()) for record in records]
    for record, mix in zip(records, mixes(codes, records[0]["arch"]), strict=True):
        record["instructions"] = mix


def main(folder: Path) -> None:
    """All jobs, in order; a job that fails leaves its reason in its record."""
    records: list[dict[str, Any]] = []
    uncounted = collections.defaultdict(list)
    for job in json.loads((folder / "jobs.json").read_bytes()):
        try:
            record = build(job, folder)
        except Exception as error:  # noqa: BLE001  (compilers raise whatever they like; the parent reports it)
            record = {"key": job["key"], "error": f"{type(error).__name__}: {str(error).strip()[-800:]}"}
        else:
            if "instructions" not in record:
                uncounted[record["arch"]].append(record)
        records.append(record)
    for rows in uncounted.values():
        try:
            count(rows, folder)
        except RuntimeError as error:
            for row in rows:
                row["error"] = str(error)
    for record in records:
        (folder / f"{record['key']}.json").write_text(
            json.dumps(record, indent=1, sort_keys=True), encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
