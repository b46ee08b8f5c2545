"""Translate the models of the suite into Core AI, experimental, and run them in its runtime for Linux: error, size, seconds.

    python -m optkit.benchmarks.coreai --only magika --out results/

Each model goes through ``coreai-fp32``, ``coreai-fp16`` and ``coreai-w8`` at the sizes of its first calibration batch. The error
is the largest difference of an output to ONNX Runtime's (its own rewrites off, float32, the file as published) as a share of
the largest value of that output. In float32 it passes up to what roundings, or twice what ONNX Runtime's own rewrites, move
the outputs. Nothing is timed but the translation: this runtime says nothing about devices.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends import BACKENDS
from optkit.benchmarks import suite
from optkit.benchmarks.coreml import difference
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.benchmarks.tables import processors, table
from optkit.data import CalibrationData
from optkit.errors import OptkitError
from optkit.evaluate import load_python
from optkit.frontend import load
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target

RECIPES = ("coreai-fp32", "coreai-fp16", "coreai-w8")
# As for the model families: what may differ in float32 by roundings, or by twice what ONNX Runtime's own rewrites move.
_ROUNDING, _ALIKE = 1e-4, 2


def measure(name: str) -> dict[str, Any]:
    """One model of the suite by every recipe."""
    path, module = suite.fetch(name), load_python(EVALUATORS / SUITE[name].evaluator, "evaluator")
    feeds = dict(next(iter(module.calibration())))
    reference, usual = ReferenceSession(path, optimize=False), ReferenceSession(path)
    expected = reference.run(feeds)
    allowed = max(_ROUNDING, _ALIKE * difference(expected, usual.run(feeds)))
    return {
        "name": name,
        "bytes": path.stat().st_size,
        "allowed": float(f"{allowed:.2g}"),
        "recipes": {recipe: _one(path, recipe, feeds, expected) for recipe in RECIPES},
    }


def _one(
    path: Path, recipe: str, feeds: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    backend, device = BACKENDS["coreai"](), target("coreai")
    with tempfile.TemporaryDirectory(prefix=f"optkit-{recipe}-") as name:
        folder = Path(name)
        try:
            start = time.process_time()
            model = load(path, check=False)
            context = Context(
                target=device, data=CalibrationData([dict(feeds)]), placements=backend.placements
            )
            run_passes(model, Recipe.load(recipe).passes, context)
            legalize(model, backend, device, name=path.name)
            options = backend.fit(backend.options(), {k: v.shape for k, v in feeds.items()})
            backend.lower(model, device, options, folder)
            took = time.process_time() - start
            with backend.load(folder, device, options) as session:
                error = difference(dict(expected), session.run(feeds))
        except OptkitError as problem:
            return {"reason": " ".join(str(problem).split())[:300]}
        return {"error": float(f"{error:.2g}"), "bytes": backend.size(folder), "seconds": round(took, 2)}


def markdown(result: Mapping[str, Any]) -> str:
    """The page for readers."""
    lines = [
        "# Core AI (experimental)",
        "",
        f"{processors(result)}. " + ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items()) + ".",
        "",
        "Executed by the runtime in Apple's Linux wheel (coreai-core 1.0.0b3, a beta), not on Apple hardware. The error is the largest",
        f"difference to ONNX Runtime as a share of the largest value; float32 passes up to {_ROUNDING:g}, or {_ALIKE} times what ONNX Runtime's",
        "own rewrites move the outputs. Seconds are CPU time of passes and translation.",
        "Written by `python -m optkit.benchmarks.coreai`, which says how.",
        "",
        "| model | MB | fp32 | error | seconds | MB | error in fp16 | MB | error with int8 weights | MB |",
        "|" + " --- |" * 10,
    ]  # fmt: skip
    reasons = []
    for row in result["models"]:
        plain, half, small = (row["recipes"][r] for r in RECIPES)
        if "reason" in plain:
            lines.append(f"| {row['name']} | {row['bytes'] / 1e6:.1f} | fail |" + " - |" * 7)
        else:
            verdict = "pass" if plain["error"] <= row["allowed"] else "fail"
            lines.append(
                f"| {row['name']} | {row['bytes'] / 1e6:.1f} | {verdict} | {plain['error']:.1e} | {plain['seconds']:.1f} "
                f"| {plain['bytes'] / 1e6:.1f} | {_cells(half)} | {_cells(small)} |"
            )
        reasons += [
            f"* {row['name']}, {r}: {c['reason']}" for r, c in row["recipes"].items() if "reason" in c
        ]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def _cells(cell: Mapping[str, Any]) -> str:
    return "fail | -" if "reason" in cell else f"{cell['error']:.1e} | {cell['bytes'] / 1e6:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    table("coreai", __doc__, arguments, known=tuple(SUITE), measure=measure, markdown=markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
