"""What calibration costs, beside running the model: CPU time by kind of range, and memory by number of samples.

    python -m optkit.benchmarks.calibration --model minilm_l6 --model resnet50_shaped

Plain is ONNX Runtime's own inference of the same batches on the same file, one thread, without loading it. Calibration
is everything that static quantization does to learn the ranges, loading included: what the pass takes on a fresh memo
less what it takes when the ranges are known. Batches are in memory where time is measured, and made as they are read
where memory is. Each figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from optkit.backends import BACKENDS
from optkit.benchmarks import suite
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.memory import Peak, now
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.data import CalibrationData
from optkit.evaluate import load_python
from optkit.frontend import load
from optkit.passes.base import Context
from optkit.passes.quantization.observers import Method
from optkit.passes.quantization.static import QuantizeStatic
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target

METHODS: tuple[Method, ...] = ("min-max", "percentile", "entropy", "mse")
_FEW, _MANY = 16, 256


def measure(name: str, method: Method, samples: int, *, streamed: bool) -> dict[str, Any]:
    """CPU seconds and peak memory of calibrating one model.

    With ``streamed``, each batch is made when it is read, as users' functions do: that costs little memory, and time
    that is not calibration's. Without, all are made beforehand.
    """
    path = suite.fetch(name)
    module = load_python(EVALUATORS / SUITE[name].evaluator, "evaluator")
    model = load(path)
    batches = (lambda: module.calibration(samples)) if streamed else list(module.calibration(samples))
    data = CalibrationData(batches, name=name).check(model)
    backend = BACKENDS["onnxruntime"]()
    context = Context(target=target("cpu"), data=data, placements=backend.placements)
    exact = [p for p in Recipe.load("int8-static").passes if p.exact]
    run_passes(model, exact, context)
    quantize = QuantizeStatic(method=method)
    before, _ = now()
    with Peak() as peak:
        start = time.process_time()
        quantize.run(model.clone(), context)
        first = time.process_time() - start
    start = time.process_time()
    quantize.run(model, context)  # the ranges are in the memo now
    rest = time.process_time() - start
    session = ReferenceSession(path)
    plain = 0.0
    for batch in data:
        start = time.process_time()
        session.run(batch)
        plain += time.process_time() - start
    return {
        "model": name,
        "method": method,
        "samples": samples,
        "batches": len(data),
        "streamed": streamed,
        "plain_seconds": round(plain, 3),
        "calibration_seconds": round(first - rest, 3),
        "ratio": round((first - rest) / plain, 2),
        "peak_anonymous_mb": round(peak.anonymous / 1e6),
        "anonymous_before_mb": round(before / 1e6),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", action="append", choices=sorted(SUITE), help="may be repeated")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, beside the lines on stdout")
    options = parser.parse_args(arguments)
    methods = options.method or METHODS
    rows = []
    for name in options.model or ("minilm_l6", "resnet50_shaped"):
        plans = [(method, _MANY, False) for method in methods]
        plans += [(method, samples, True) for method in methods for samples in (_FEW, _MANY)]
        for method, samples, streamed in plans:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(measure, name, method, samples, streamed=streamed).result())
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        record = {"schema": 1, "processor": processor(), "versions": versions(), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
