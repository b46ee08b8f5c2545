"""A process of its own that compiles programs: ``python -m optkit.kernels.triton.worker FOLDER``.

Reads ``jobs.json`` and writes ``<key>.cubin``, ``<key>.ttir`` and ``<key>.json`` for each job into the folder. No driver and no
GPU is needed. What is reported of a program is read from the very bytes that are shipped.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_ALIGNMENT = 16
_OPCODE = re.compile(
    r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE
)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def build(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile one program; the record of what came out."""
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
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", major * 10 + minor, 32),
        options={"num_warps": program["warps"], "num_stages": program["stages"]},
    )
    binary, meta = compiled.asm["cubin"], compiled.metadata
    if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.launch_pdl:
        raise ValueError(f"{program['function']} asks for clusters or a cooperative launch")
    file = folder / f"{job['key']}.cubin"
    file.write_bytes(binary)
    (folder / f"{job['key']}.ttir").write_text(str(compiled.asm["ttir"]), encoding="utf-8")
    arch = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert arch is not None
    registers, stack, local = _usage(file)
    return {
        "key": job["key"],
        "entry": meta.name,
        "capability": [major, minor],
        "arch": arch[1],
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
        "registers": registers,
        "stack": max(stack, local),
        "instructions": _instructions(file),
        "program": program,
    }


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout


def _usage(file: Path) -> tuple[int, int, int]:
    found = _USAGE.search(_tool("cuobjdump", "-res-usage", str(file)))
    if found is None:
        raise RuntimeError("cuobjdump does not tell the registers")
    return int(found[1]), int(found[2]), int(found[3])


def _instructions(file: Path) -> dict[str, int]:
    # Opcodes are all that is counted: no analysis of the data's flow.
    counts = collections.Counter(_OPCODE.findall(_tool("nvdisasm", "-c", "-ndf", str(file))))
    return dict(sorted(counts.items()))


def main(folder: Path) -> None:
    """All jobs, in order; a job that fails leaves its reason in its record."""
    for job in json.loads((folder / "jobs.json").read_bytes()):
        try:
            record = build(job, folder)
        except Exception as error:  # noqa: BLE001  (compilers raise whatever they like; the parent reports it)
            record = {"key": job["key"], "error": f"{type(error).__name__}: {str(error).strip()[-800:]}"}
        (folder / f"{job['key']}.json").write_text(
            json.dumps(record, indent=1, sort_keys=True), encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
