"""Compile the suite for this machine's CPU and compare with ONNX Runtime and its own quantizers.

    python -m optkit.benchmarks.cpu --only ppocr4_rec --out results/

Method: batch as the evaluator gives it, one thread, all variants of a model in turn in one process, random order in
each round, on inputs that no calibration saw; CPU time of the process (a busy machine stretches wall-clock, not CPU
time), median over rounds. Speed-ups are ratios within a round to ONNX Runtime, fp32, default settings, on the file as
published, with a 95 % interval from a bootstrap over rounds. Every quantizer gets the same calibration data. Metrics
are compared sample by sample with the original's. A peer that fails is a row with its error. Each model has a process
of its own.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import optkit
from optkit.bench import interleave
from optkit.benchmarks import suite
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.peers import PEERS, Batches, Peer
from optkit.benchmarks.results import CpuResult, Machine, ModelResult, Row, read, render, write
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.errors import OptkitError, UnknownNameError
from optkit.evaluate import Budget, Evaluator, Run, compare, load_python
from optkit.reference import ReferenceSession

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
BUDGET = "1%"
_REFERENCE = "ORT fp32"
_RANDOM_WEIGHTS = 0.95
_FEEDS, _ROUNDS, _WARMUP, _CPU_SECONDS = 16, 60, 3, 60.0


@dataclass(slots=True)
class _Variant:
    """A way to run the model, or why there is none."""

    name: str
    run: Run | None = None
    bytes: int | None = None
    note: str = ""
    error: str | None = None
    seconds: float = 0.0


def _variant(name: str, make: Callable[[], tuple[Run, int, str]]) -> _Variant:
    variant, start = _Variant(name), time.process_time()
    try:
        variant.run, variant.bytes, variant.note = make()
    except Exception as error:  # noqa: BLE001  (the quantizers raise anything; the row says what)
        variant.error = _brief(f"{type(error).__name__}: {error}")
    variant.seconds = time.process_time() - start
    return variant


def _brief(message: str) -> str:
    """One line without folders, which differ from machine to machine."""
    return re.sub(r"(?:/[\w.@+~-]+)+/", "", " ".join(message.split()))[:300]


def measure(name: str) -> ModelResult:
    """Everything about one model of the suite."""
    entry, path = SUITE[name], suite.fetch(name)
    file = EVALUATORS / entry.evaluator
    evaluator = Evaluator.load(file) if entry.accurate else None
    calibration = list(load_python(file, "evaluator").calibration())
    folder = Path(tempfile.mkdtemp(prefix=f"optkit-{name}-"))
    try:
        reference = ReferenceSession(path)
        variants = [_variant(_REFERENCE, lambda: (reference.run, path.stat().st_size, ""))]
        data = f"{file}:calibration"
        # Random weights have no metric, and their outputs are no classes: only speed is compared, at a looser closeness.
        loose = {"overrides": [f"limits.min_cosine={_RANDOM_WEIGHTS}"]}
        gate = {"evaluate": file, "max_drop": BUDGET} if evaluator else loose
        variants.append(_variant("optkit", lambda: _compile(path, folder / "auto", data=data, **gate)))
        variants.append(
            _variant("optkit, exact only", lambda: _compile(path, folder / "exact", data=data, recipe="fp32"))
        )
        for peer in PEERS:
            variants.append(_variant(peer.name, partial(_peer, peer, path, calibration, folder)))
        feeds = [f for f, _ in islice(evaluator.samples(), _FEEDS)] if evaluator else calibration[:_FEEDS]
        _check(variants, feeds[0])
        times = interleave(
            {v.name: v.run for v in variants if v.run is not None},
            feeds,
            rounds=_ROUNDS,
            warmup=_WARMUP,
            budget=_CPU_SECONDS,
        )
        rows = _rows(variants, times, evaluator)
        runs = len(times[_REFERENCE])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ModelResult(
        name=name,
        kind=entry.kind,
        requirement=entry.requirement,
        accurate=entry.accurate,
        metric=evaluator.metric if evaluator else None,
        calibration=len(calibration),
        rounds=runs,
        rows=rows,
    )


def _compile(path: Path, out: Path, **options: Any) -> tuple[Run, int, str]:
    artifact, report = optkit.compile(path, target="cpu", out=out, **options)
    size = sum(f.bytes for f in artifact.manifest.files)
    shipped = next((c.name for c in report.candidates if c.verdict == "shipped"), "")
    note = "; ".join(
        filter(None, [shipped if shipped != "recipe" else "", *report.missed, *report.inconclusive])
    )
    return artifact.session(threads=1).run, size, note


def _peer(peer: Peer, model: Path, batches: Batches, folder: Path) -> tuple[Run, int, str]:
    path = peer.make(model, batches, folder)
    return ReferenceSession(path).run, path.stat().st_size, ""


def _check(variants: Sequence[_Variant], feeds: Mapping[str, np.ndarray]) -> None:
    """A variant that cannot run is an error row, not the end."""
    for variant in variants:
        if variant.run is not None:
            try:
                variant.run(feeds)
            except OptkitError as error:
                variant.run, variant.error = None, _brief(str(error))


def _rows(
    variants: Sequence[_Variant], times: Mapping[str, np.ndarray], evaluator: Evaluator | None
) -> tuple[Row, ...]:
    rows: list[Row] = []
    before: list[Any] | None = None
    for v in variants:
        facts: dict[str, Any] = {}
        if v.run is not None:
            cpu = times[v.name][:, 0]
            facts = {"cpu_ms": float(np.median(cpu) * 1e3), "p99_ms": float(np.percentile(cpu, 99) * 1e3)}
            if v.name != _REFERENCE:
                facts["speedup"], facts["speedup_ci95"] = _ratio(times[_REFERENCE][:, 0] / cpu)
        if v.run is not None and evaluator is not None:
            logger.info("  evaluating %s", v.name)
            try:
                scores = evaluator.scores(v.run)
            except OptkitError as error:
                v.error = _brief(str(error))
            else:
                facts |= _judged(evaluator, before, scores)
                before = scores if before is None else before
        rows.append(
            Row(name=v.name, bytes=v.bytes, note=v.note, make_seconds=v.seconds, error=v.error, **facts)
        )
    return tuple(rows)


def _judged(evaluator: Evaluator, before: list[Any] | None, scores: list[Any]) -> dict[str, Any]:
    """The metric, and against ``before``, the reference's scores, what was lost."""
    if before is None:
        return {"metric": evaluator.total(scores), "n": len(scores)}
    compared = compare(evaluator, before, scores, Budget.parse(BUDGET))
    return {
        "metric": compared.candidate,
        "drop": compared.drop,
        "drop_ci95": compared.ci95,
        "n": compared.n,
        "verdict": compared.verdict,
    }


def _ratio(ratios: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % interval, from a bootstrap over rounds."""
    drawn = np.random.default_rng(0).integers(len(ratios), size=(1000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    return float(np.median(ratios)), (float(low), float(high))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m optkit.benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a model of the suite; may be repeated"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="where cpu.json and cpu.md go"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("optkit.benchmarks").setLevel(logging.INFO)
    for name in options.only or ():
        if name not in SUITE:
            raise UnknownNameError("model", name, SUITE)
    machine = Machine(processor=processor(), versions=versions())
    found, code = [], 0
    for name in options.only or SUITE:
        print(name, file=sys.stderr)
        # A process each: a crash costs one model, and no model's memory or caches reach the next.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                found.append(pool.submit(_measure, name).result())
            except (OptkitError, BrokenProcessPool) as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                if isinstance(error, OptkitError) and error.hint:
                    print(f"hint: {error.hint}", file=sys.stderr)
                code = 1
                continue
        # Written after each model: the whole suite takes long.
        file, result = options.out / "cpu.json", CpuResult(machine=machine, models=(found[-1],))
        write(result.merged_into(read(file)) if file.exists() else result, options.out)
    if found:
        render(CpuResult(machine=machine, models=tuple(found)))
    return code


def _measure(name: str) -> ModelResult:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("optkit.benchmarks").setLevel(logging.INFO)
    ort.set_default_logger_severity(4)
    return measure(name)


if __name__ == "__main__":
    sys.exit(main())
