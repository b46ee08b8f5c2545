"""optkit compiles trained models for the hardware they will run on, and proves that they are still right.

    artifact, report = optkit.compile("model.onnx", target="cpu", data=batches, evaluate=evaluator, out="build/")
    outputs = optkit.load("build/").run({"x": x})

Public names are resolved on first use, so that importing optkit imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.artifact import Artifact, load
    from optkit.compiler import compile
    from optkit.data import CalibrationData
    from optkit.errors import OptkitError
    from optkit.evaluate import Evaluator
    from optkit.recipe import Recipe
    from optkit.report import Report
    from optkit.targets import Target

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "optkit.artifact",
    "CalibrationData": "optkit.data",
    "Evaluator": "optkit.evaluate",
    "OptkitError": "optkit.errors",
    "Recipe": "optkit.recipe",
    "Report": "optkit.report",
    "Target": "optkit.targets",
    "compile": "optkit.compiler",
    "load": "optkit.artifact",
}

__all__ = [
    "Artifact",
    "CalibrationData",
    "Evaluator",
    "OptkitError",
    "Recipe",
    "Report",
    "Target",
    "compile",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'optkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
