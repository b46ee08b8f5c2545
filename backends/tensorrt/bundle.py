"""What a TensorRT artifact holds beside the graph: profiles, golden inputs and outputs, and the programs for the device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit import closeness
from optkit.kernels import cuda

MODEL, BUNDLE, ENGINE = "model.onnx", "bundle.json", "engine.plan"
# The same graph in words that TensorRT alone reads, where there are such.
SPELLED = "tensorrt.onnx"
# Whose engine it is, by the package that runs it.
TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
# What only the mode that builds on the device needs.
_BUILD = ("build_engine.py", "building.py")
_PROGRAMS = ("device.py", "closeness.py", "runtime.py", "engine.py", "verify.py", "bench.py")
_SCRIPTS = Path(__file__).resolve().parent / "scripts"
# TensorRT-RTX has the same interface under a name of its own, and its engine is there from the start.
_RTX = (
    ("import tensorrt as trt", "import tensorrt_rtx as trt"),
    ("pip install tensorrt-cu13", "pip install tensorrt-rtx-cu13"),
    ("python build_engine.py builds it", "compile the model again"),
)
# Programs that are modules of optkit too.
_SHARED = {"device.py": cuda.__file__, "closeness.py": closeness.__file__}


def write(
    path: Path,
    *,
    target: str,
    arch: str,
    profile: Mapping[str, Sequence[Sequence[int]]],
    min_cosine: float,
    tf32: bool,
    rtx: bool,
    source: str = MODEL,
) -> None:
    """Write ``bundle.json`` and the programs into ``path``.

    Args:
        min_cosine: How close outputs on the device have to be to the golden ones.
        rtx: Whether the engine is TensorRT-RTX's and there already; else TensorRT builds it on the device.
        source: The file that TensorRT reads.
    """
    facts = {
        "target": target, "arch": arch, "profile": {k: [list(s) for s in v] for k, v in profile.items()},
        "min_cosine": min_cosine, "tf32": tf32, "runtime": RTX if rtx else TENSORRT, "source": source,
    }  # fmt: skip
    (path / BUNDLE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in (*_PROGRAMS, *(() if rtx else _BUILD)):
        (path / name).write_text(program(name, rtx=rtx), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """What ``write`` put into ``bundle.json``."""
    return json.loads((path / BUNDLE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def program(name: str, *, rtx: bool) -> str:
    """The text of a program, for TensorRT or for TensorRT-RTX."""
    text = Path(_SHARED.get(name, _SCRIPTS / name)).read_text(encoding="utf-8")
    for own, other in _RTX if rtx else ():
        text = text.replace(own, other)
    return text
