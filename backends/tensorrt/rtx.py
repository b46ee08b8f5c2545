"""TensorRT-RTX, which parses and compiles without a GPU: a real engine for cards that it knows, a proxy for others."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optkit.errors import ModelError
from optkit.targets import Target

logger = logging.getLogger(__name__)

_CHILD = "import sys; from optkit.backends.tensorrt.child import main; main(*sys.argv[1:])"
_SECONDS = 3600
PACKAGE = "tensorrt-rtx-cu13"

# What TensorRT-RTX 1.7.1 compiles for ("ComputeCapability"). Its support matrix leaves out 8.0, and for 7.5 the compiler
# refuses products in float32, which norms and reductions around half-precision layers need.
CAPABILITIES = {
    (7, 5): "SM75",
    (8, 0): "SM80",
    (8, 6): "SM86",
    (8, 9): "SM89",
    (12, 0): "SM120",
    (12, 1): "SM121",
}
_MATRIX = frozenset({"SM86", "SM89", "SM120", "SM121"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What TensorRT-RTX said.

    Attributes:
        refused: Nodes that the parser refuses: ``(node, operator, reason)``.
        message: Why nothing was built; empty where it was.
        sha256: Of the engine.
    """

    version: str
    parsed: bool
    built: bool
    refused: Sequence[tuple[str, str, str]] = ()
    message: str = ""
    bytes: int = 0
    sha256: str = ""


def installed() -> bool:
    """Whether the package is there; it is not loaded into this process."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def capability(target: Target) -> str | None:
    """What TensorRT-RTX calls the compute capability of ``target``; None where it compiles nothing for it."""
    return CAPABILITIES.get(target.capability or (0, 0))


def native(target: Target) -> str | None:
    """The capability of ``target`` where an engine of TensorRT-RTX is what it should run, else None."""
    name = capability(target)
    return name if name in _MATRIX else None


def proxy(target: Target) -> str:
    """The capability to try a graph for ``target`` on: the nearest that has the same number formats."""
    if "nvfp4" in target.formats:
        return "SM120"
    if "fp8" in target.formats:
        return "SM89"
    return capability(target) or "SM86"


def build(
    source: Path,
    engine: Path,
    capabilities: Sequence[str],
    profile: Mapping[str, Sequence[Sequence[int]]],
    *,
    tf32: bool = False,
) -> Verdict:
    """Parse ``source`` and compile it into the file ``engine``.

    Raises:
        ModelError: The process died, or did not end in time.
        OSError: The engine cannot be written.
    """
    asked = {
        "source": str(source), "engine": str(engine), "capabilities": list(capabilities), "tf32": tf32,
        "profile": {k: [list(s) for s in v] for k, v in profile.items()},
    }  # fmt: skip
    # -P keeps the working directory, which may hold anything, off the child's path.
    command = [sys.executable, "-P", "-c", _CHILD, json.dumps(asked, sort_keys=True)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, text=True, errors="replace",
            timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"TensorRT-RTX did not finish within {_SECONDS} seconds") from error
    logger.debug("stderr of TensorRT-RTX: %s", done.stderr[-4000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        last = (done.stderr.strip().splitlines() or [""])[-1][:300]
        raise ModelError(
            f"the process in which TensorRT-RTX builds died ({how}){': ' if last else ''}{last}",
            hint="try another --precision, or --set options.mode=bundle to build on the device",
        )
    found = json.loads(lines[-1])
    if code := found.get("unwritten"):
        raise OSError(code, os.strerror(code), str(engine))
    refused = [
        (r["name"] or "?", r["op"], f"{r['code'].lower().replace('_', ' ')}: {r['why']}")
        for r in found["refused"]
    ]
    return Verdict(
        version=found["version"], parsed=found["parsed"], built=found["built"], refused=refused,
        message=found.get("message", ""), bytes=found.get("bytes", 0), sha256=found.get("sha256", ""),
    )  # fmt: skip
