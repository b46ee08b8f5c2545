"""What each technique of post-training quantization gives back: SQNR of the outputs, without retraining.

    python -m optkit.benchmarks.ptq --model efficientnet_lite0 --model minilm_l6
    python -m optkit.benchmarks.ptq --model minilm_l6 --backend openvino --alpha 0.5 --alpha 0.8

Each model is quantized as ``int8-static`` says, alone and with one technique on top, and with all; with ``--alpha`` alone and
with SmoothQuant of each alpha. SQNR is that of all float outputs together against the fp32 model, in dB, as ONNX Runtime
computes them, on batches that calibration has not seen; the seconds are CPU time of all passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from optkit.backends import BACKENDS
from optkit.backends.base import Backend
from optkit.benchmarks import suite
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.data import CalibrationData
from optkit.evaluate import fidelity, load_python
from optkit.frontend import load
from optkit.passes.base import Context
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target

EQUALIZE, SMOOTH = ["equalize-layers"], ["smooth-activations"]
INSERT: list[Any] = [{"smooth-activations": {"insert": True}}]
CORRECT, ADAPT = {"bias_correction": True}, {"rounding": "adaptive"}


class Technique(NamedTuple):
    """One row of the table.

    Attributes:
        before: Passes in front of the quantization.
        options: Of ``quantize-static``.
    """

    name: str
    before: list[Any]
    options: dict[str, Any]


TECHNIQUES = (
    Technique("int8-static", [], {}),
    Technique("+ MSE ranges", [], {"method": "mse"}),
    Technique("+ equalize-layers", EQUALIZE, {}),
    Technique("+ smooth-activations", SMOOTH, {}),
    Technique("+ smooth-activations, insert", INSERT, {}),
    Technique("+ bias_correction", [], CORRECT),
    Technique("+ adaptive rounding", [], ADAPT),
    Technique("+ correction and adaptive", [], {**CORRECT, **ADAPT}),
    Technique("+ MSE and correction", [], {"method": "mse", **CORRECT}),
    Technique("+ smooth (insert) and correction", INSERT, CORRECT),
)


def recipe_of(technique: Technique) -> Recipe:
    """What ``technique`` does, without the clean-up."""
    quantize = {"quantize-static": {"placement": "default", **technique.options}}
    return Recipe.load({"recipe": 1, "passes": [*technique.before, quantize]})


def smoothed(alphas: Sequence[float]) -> Sequence[Technique]:
    """SmoothQuant of each alpha, and nothing else, beside the bare quantization."""
    passes = ([{"smooth-activations": {"insert": True, "alpha": alpha}}] for alpha in alphas)
    return (TECHNIQUES[0], *(Technique(f"+ alpha {a:g}", p, {}) for a, p in zip(alphas, passes, strict=True)))


def measure(
    name: str, techniques: Sequence[Technique], backend: Backend, samples: int, unseen: int
) -> dict[str, Any]:
    """SQNR and CPU seconds of every technique on one model, quantized where ``backend`` wants it."""
    path, module = suite.fetch(name), load_python(EVALUATORS / SUITE[name].evaluator, "evaluator")
    batches = list(module.calibration(samples))
    held_out = getattr(module, "unseen", None)
    tests = (
        list(held_out(unseen))
        if held_out is not None
        else list(islice((s[0] for s in module.samples()), unseen))
    )
    reference = ReferenceSession(path)
    row: dict[str, Any] = {"model": name, "calibration": samples, "unseen": len(tests)}
    base = Recipe.load("int8-static")
    exact = [p for p in base.passes if p.exact]
    for technique in techniques:
        *front, quantize = recipe_of(technique).passes
        model = load(path)
        data = CalibrationData(batches, name=name).check(model)
        context = Context(target=target("cpu"), data=data, placements=backend.placements)
        start = time.process_time()
        # What scales weights needs them next to their layers: before the products become Gemm.
        clean = exact.index(next(p for p in exact if p.name == "matmul-to-gemm"))
        run_passes(model, [*exact[:clean], *front, *exact[clean:], quantize], context)
        seconds = time.process_time() - start
        session = ReferenceSession(model)
        found = fidelity(reference.run, session.run, tests)
        session.close()
        row[technique.name] = {"sqnr_db": found.sqnr, "cosine": found.cosine, "seconds": seconds}
    reference.close()
    return row


def table(rows: Sequence[dict[str, Any]], techniques: Sequence[Technique]) -> str:
    """Techniques by models."""
    lines = [f"| SQNR, dB | {' | '.join(row['model'] for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name in (t.name for t in techniques):
        cells = (f"{row[name]['sqnr_db']:.1f} ({row[name]['seconds']:.0f} s)" for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; with ``--json`` one document a model."""
    parser = argparse.ArgumentParser(prog="python -m optkit.benchmarks.ptq", description=__doc__)
    parser.add_argument("--model", action="append", choices=sorted(SUITE), required=True)
    parser.add_argument("--backend", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument(
        "--alpha", action="append", type=float, help="of SmoothQuant, instead of the techniques"
    )
    parser.add_argument("--samples", type=int, default=32, help="of calibration data")
    parser.add_argument("--unseen", type=int, default=16, help="batches that SQNR is measured on")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    techniques = smoothed(given.alpha) if given.alpha else TECHNIQUES
    rows = []
    for name in given.model:
        row = measure(name, techniques, BACKENDS[given.backend](), given.samples, given.unseen)
        rows.append(row)
        if given.json:
            print(json.dumps(row))
    if not given.json:
        print(table(rows, techniques))
    return 0


if __name__ == "__main__":
    sys.exit(main())
