"""What saturation in 16 bits costs on processors without VNNI, and what 7-bit weights where it happens give back.

    python -m optkit.benchmarks.saturation --model ppocr4_rec --model minilm_l6 --model efficientnet_lite0

Each model is quantized as ``int8-static`` says, with weights in 8 bits everywhere and as optkit does it for the target.
The metric is that of the model's evaluator, on the same samples in each row; on the target it is predicted by emulation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optkit.backends import BACKENDS
from optkit.benchmarks import suite
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.data import CalibrationData
from optkit.evaluate import Evaluator, compare, load_python
from optkit.frontend import load
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.saturation import narrowed, products
from optkit.targets import target


def measure(name: str, where: str, samples: int) -> dict[str, Any]:
    """The metric of one model in fp32, in exact int8, and on the target called ``where`` with both kinds of weights."""
    path, file = suite.fetch(name), EVALUATORS / SUITE[name].evaluator
    batches = list(load_python(file, "evaluator").calibration(samples))
    evaluator, backend, there = Evaluator.load(file), BACKENDS["onnxruntime"](), target(where)
    options = backend.options()
    reference = ReferenceSession(path)
    scores = evaluator.scores(reference.run)
    reference.close()
    row: dict[str, Any] = {"model": name, "target": where, "metric": evaluator.metric, "n": len(scores)}
    row["fp32"] = evaluator.total(scores)
    for kind, saturates in (("wide", False), ("narrowed", True)):
        model = load(path)
        data = CalibrationData(batches, name=name).check(model)
        context = Context(
            target=replace(there, saturates=saturates), data=data, placements=backend.placements
        )
        run_passes(model, Recipe.load("int8-static").passes, context)
        found = list(products(model))
        row[f"{kind}_layers"] = len(found)
        row[f"{kind}_at_risk"] = sum(bool(p.at_risk.any()) for p in found)
        row[f"{kind}_in_7_bits"] = sum(narrowed(p.node) is not None for p in found)
        with TemporaryDirectory(prefix="optkit-") as folder:
            backend.lower(model, there, options, Path(folder))
            for how, opened in (("exact", backend.load), ("saturated", backend.predict)):
                with opened(Path(folder), there, options, threads=1) as session:
                    c = compare(evaluator, scores, evaluator.scores(session.run), None)
                row[f"{kind}_{how}"] = {"value": c.candidate, "drop": c.drop, "ci95": c.ci95}
    return row


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    cells = [row["model"], row["metric"], f"{row['fp32']:.4f}"]
    cells += [f"{row[key]['value']:.4f}" for key in ("wide_exact", "wide_saturated", "narrowed_saturated")]
    cells.append(f"{row['narrowed_in_7_bits']} of {row['narrowed_layers']}")
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| model | metric | fp32 | int8, VNNI | int8, saturating | 7 bits where it saturates | layers in 7 bits |\n"
    "|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; with ``--json`` one document a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", choices=sorted(SUITE), required=True)
    parser.add_argument("--target", default="x86-avx2", help="a target that saturates")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if not target(given.target).saturates:
        parser.error(f"{given.target} does not saturate")
    if not given.json:
        print(HEAD)
    for name in given.model:
        row = measure(name, given.target, given.samples)
        print(json.dumps(row) if given.json else line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
