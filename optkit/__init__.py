"""optkit compiles trained models for the hardware they will run on, and proves that they are still right.

    artifact, report = optkit.compile("model.onnx", target="cpu", data=batches, evaluate=evaluator, out="build/")
    outputs = optkit.load("build/").run({"x": x})
    session = optkit.training(model, "int8-qat", example=(x,), steps=1000)  # inside a training loop

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
    from optkit.training_callbacks import lightning_callback, trainer_callback
    from optkit.training_loop import Fit, finetune
    from optkit.training_start import training

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "optkit.artifact",
    "CalibrationData": "optkit.data",
    "Evaluator": "optkit.evaluate",
    "Fit": "optkit.training_loop",
    "OptkitError": "optkit.errors",
    "Recipe": "optkit.recipe",
    "Report": "optkit.report",
    "Target": "optkit.targets",
    "compile": "optkit.compiler",
    "finetune": "optkit.training_loop",
    "lightning_callback": "optkit.training_callbacks",
    "load": "optkit.artifact",
    "trainer_callback": "optkit.training_callbacks",
    "training": "optkit.training_start",
}

__all__ = [
    "Artifact",
    "CalibrationData",
    "Evaluator",
    "Fit",
    "OptkitError",
    "Recipe",
    "Report",
    "Target",
    "compile",
    "finetune",
    "lightning_callback",
    "load",
    "trainer_callback",
    "training",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'optkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
