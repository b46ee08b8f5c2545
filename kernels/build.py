"""Compile programs for architectures in a worker process, once: what was built is found again by the hash of all it came from."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optkit.errors import BackendUnavailableError, ModelError
from optkit.kernels.base import Program
from optkit.targets.gpu import ARCHITECTURES, Capability, code_kind

HINT = "pip install 'optkit[triton]'"
# Beside the machine code; the record last: it says that the others are whole.
_PARTS = ("ttir", "json")
# A child has this long, and more for each of its jobs: machines that compile are often full.
_SECONDS, _EACH = 600, 20
# Contraction of a * b + c: the default of Triton changes between versions. Line numbers would name the folder of the sources on this
# machine, and are two thirds of a file.
_SETTINGS = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_DISABLE_LINE_INFO": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A program as machine code.

    Attributes:
        record: What the worker read from it; see ``optkit.kernels.triton.worker``.
        code: The file, in the cache.
        cached: Whether it was there already.
    """

    record: Mapping[str, Any]
    code: Path
    cached: bool


def installed() -> bool:
    """Whether Triton is there; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def need_triton() -> None:
    """Refuse to go on without Triton.

    Raises:
        BackendUnavailableError: It is not installed.
    """
    if not installed():
        raise BackendUnavailableError("kernels are compiled with triton, which is not installed", hint=HINT)


def root() -> Path:
    """Where the compiled programs are kept."""
    named = os.environ.get("OPTKIT_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "optkit") / "kernels"


@cache
def _sources() -> str:
    """Of everything that machine code depends on beside the program: our sources, and the compiler's version."""
    folder = Path(__file__).parent / "triton"
    files = [folder / "worker.py", folder / "sass.py", *sorted((folder / "device").glob("*.py"))]
    text = hashlib.sha256(json.dumps([version("triton"), _SETTINGS]).encode())
    for file in files:
        text.update(file.name.encode() + file.read_bytes())
    return text.hexdigest()


def key(program: Program, capability: Capability) -> str:
    """What a compiled program is filed under."""
    facts = json.dumps([_sources(), program.digest(), *capability])
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def build(jobs: Sequence[tuple[Program, Capability]], *, fresh: bool = False) -> list[Built]:
    """Each program for its architecture, in order.

    Args:
        jobs: Programs with architectures.
        fresh: Compile also what is in the cache.

    Raises:
        BackendUnavailableError: Triton is not installed.
        ModelError: Triton or the assembler refuses a program; says which and why.
    """
    need_triton()
    keys = [key(*job) for job in jobs]
    folder = root()
    folder.mkdir(parents=True, exist_ok=True)
    names = {k: _files(k, job[1]) for k, job in zip(keys, jobs, strict=True)}
    have = {k: not fresh and all((folder / name).is_file() for name in names[k]) for k in keys}
    missing = {k: job for k, job in zip(keys, jobs, strict=True) if not have[k]}
    if missing:
        _compile(missing, folder)
    found = []
    for k in keys:
        record = json.loads((folder / f"{k}.json").read_bytes())
        found.append(Built(record=record, code=folder / names[k][0], cached=have[k]))
    return found


def _files(key: str, capability: Capability) -> list[str]:
    """The machine code first."""
    return [f"{key}.{part}" for part in (code_kind(ARCHITECTURES[capability].arch), *_PARTS)]


def _compile(jobs: Mapping[str, tuple[Program, Capability]], folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as name:
        work = Path(name)
        rows = [{"key": k, "program": p.record(), "capability": list(c)} for k, (p, c) in jobs.items()]
        (work / "jobs.json").write_text(json.dumps(rows))
        # A cache of Triton's own would hand out what another version of a helper made.
        environment = {"TRITON_CACHE_DIR": str(work / "triton"), **_SETTINGS}
        child(work, "optkit.kernels.triton.worker", environment, len(jobs))
        refused = []
        for k, (program, capability) in jobs.items():
            file = work / f"{k}.json"
            record = json.loads(file.read_bytes()) if file.is_file() else {"error": "nothing was written"}
            if "error" in record:
                refused.append(f"{program.function} for {ARCHITECTURES[capability].arch}: {record['error']}")
                continue
            for name in _files(k, capability):
                shutil.move(work / name, folder / name)
        if refused:
            raise ModelError("Triton does not compile " + "; ".join(refused))


def child(work: Path, module: str, environment: Mapping[str, str], jobs: int) -> None:
    """Run a module of ours on a folder with so many jobs, in a process that may die.

    Raises:
        ModelError: It did, or took too long; the last line of what it said.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | dict(environment)
    command, most = [sys.executable, "-m", module, str(work)], _SECONDS + _EACH * jobs
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=most, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{module} did not finish within {most} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ModelError(f"{module} ended with {done.returncode}: {said[:500]}")
