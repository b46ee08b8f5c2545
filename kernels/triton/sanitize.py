"""A process of its own that executes what Triton makes of programs: ``python -m optkit.kernels.triton.sanitize FOLDER``.

Triton's first intermediate form is run by ``ttsem`` on the CPU. Every access is held against the tensors that the launch was
given, and what one block of the grid writes against what the others read and write: the interpreter sees neither.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ttsem.sanitize import KernelFault, Unjudged, session

from optkit.kernels.triton.tensors import array, tensor


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One launch: arrays in from ``<key>.npz``, arrays out to ``<key>.out.npz``, and what was found."""
    module, _, name = job["program"]["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    program, given = job["program"], dict(job["scalars"])
    with np.load(folder / f"{job['key']}.npz") as arrays:
        for argument, fmt in job["pointers"].items():
            given[argument] = tensor(arrays[argument], fmt)
    major, minor = job["capability"]
    try:
        with session(cc=10 * major + minor, cuda_is_cpu=False) as state:
            function[tuple(job["grid"])](
                **given, **program["constants"], num_warps=program["warps"], num_stages=program["stages"]
            )
    except KernelFault as fault:
        return {"fault": str(fault), "unjudged": ""}
    except Unjudged as why:
        return {"fault": "", "unjudged": str(why)}
    found = {n: array(given[n], job["pointers"][n]) for n in job["outputs"]}
    np.savez(folder / f"{job['key']}.out.npz", allow_pickle=False, **found)
    unchecked = "too many accesses to tell whether blocks race" if state.races_unchecked else ""
    return {"fault": "", "unjudged": unchecked}


def main(folder: Path) -> None:
    """All launches, in order."""
    jobs = json.loads((folder / "jobs.json").read_bytes())
    (folder / "verdicts.json").write_text(json.dumps([run(job, folder) for job in jobs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
