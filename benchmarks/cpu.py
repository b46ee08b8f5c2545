"""Compile the suite for this machine's CPU and compare with ONNX Runtime and its own quantizers.

    python -m optkit.benchmarks.cpu --only ppocr4_rec --out results/

Method: batch as the evaluator gives it, one thread, all variants of a model in turn, each in a process of its own (four
times a new one), random order in each round, each after calls that are not counted, on inputs that no calibration saw; CPU time of the process (a busy
machine stretches wall-clock, not CPU time), median over rounds. Speed-ups are ratios within a round to ONNX Runtime, fp32, default settings, on the file as
published, with a 95 % interval from a bootstrap over processes and rounds. Every quantizer gets the same calibration data. Metrics
are compared sample by sample with the original's. A peer that fails is a row with its error. Each model has a process
of its own.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from optkit.bench import alternate
from optkit.benchmarks import suite
from optkit.benchmarks.apart import Apart, keep
from optkit.benchmarks.bounded import bounded
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.peers import peers
from optkit.benchmarks.results import CpuResult, Machine, ModelResult, Row, Versus, read, render, write
from optkit.benchmarks.suite import EVALUATORS, SUITE
from optkit.benchmarks.variants import OURS, OURS_EXACT, OURS_ORT, REFERENCE, Variant, Work, brief, variants
from optkit.errors import OptkitError, UnknownNameError
from optkit.evaluate import Budget, Evaluator, Run, compare, load_python
from optkit.reference import ReferenceSession
from optkit.report import Ceilings
from optkit.roofline import against, ceilings, moved, weights_read

logger = logging.getLogger("optkit.benchmarks.cpu")  # also where this is the main module

RESULTS = Path(__file__).parent / "results"
BUDGET = "1%"
# Of the cosine, where weights are random: quantization noise adds up through layers that nothing trained to bear it.
_CLOSE = "0.05"
# Inputs, and uncounted calls before a counted one: a dozen variants leave nothing of each other in the caches, and who runs one
# model finds them warm.
_FEEDS, _SETTLE = 16, 3
# Processes that each variant is timed in, one after the other.
_SEATINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much measuring is done.

    Attributes:
        cpu_seconds: Of all timing rounds of a model together.
        samples: Of an evaluation, at most; None for all.
        evaluation: CPU seconds after which the evaluation of a row stops and says on how many samples it stands.
        seconds: Wall-clock of a model, after which it is given up.
    """

    rounds: int
    cpu_seconds: float
    samples: int | None
    evaluation: float
    seconds: float
    exact: bool


FULL = Effort(rounds=60, cpu_seconds=60.0, samples=None, evaluation=120.0, seconds=1800.0, exact=True)
QUICK = Effort(rounds=20, cpu_seconds=20.0, samples=120, evaluation=15.0, seconds=420.0, exact=False)


def measure(name: str, effort: Effort = FULL) -> ModelResult:
    """Everything about one model of the suite."""
    entry, path = SUITE[name], suite.fetch(name)
    file = EVALUATORS / entry.evaluator
    module = load_python(file, "evaluator")
    calibration = list(module.calibration())
    folder = Path(tempfile.mkdtemp(prefix=f"optkit-{name}-"))
    try:
        reference = ReferenceSession(path)
        # Random weights have no metric, and their outputs are no classes: closeness takes the place of accuracy.
        evaluator = (
            _limited(Evaluator.load(file), effort.samples)
            if entry.accurate
            else _closeness(module, reference)
        )
        budget = BUDGET if entry.accurate else _CLOSE
        gate: dict[str, Any] = {"evaluate": evaluator, "max_drop": BUDGET}
        if not entry.accurate:
            gate = {"overrides": [f"limits.min_cosine={1 - float(_CLOSE)}"]}
        data = f"{file}:calibration"
        ours: dict[str, dict[str, Any]] = {
            OURS: {"data": data, **gate},
            OURS_ORT: {"data": data, "backend": "onnxruntime", **gate},
        }
        if effort.exact:
            ours[OURS_EXACT] = {"data": data, "recipe": "fp32"}
        work = Work(model=path, batches=calibration, folder=folder, reference=reference)
        found = list(variants(work, ours, peers(transformer=entry.transformer)))
        feeds = [f for f, _ in islice(evaluator.samples(), _FEEDS)]
        _check(found, feeds[0])
        logger.info("  timing")
        times, seatings = _timed(found, keep(feeds, folder / "feeds.npz"), effort)
        peaks = ceilings(str(processor()["name"]))
        reached = _roofline(path, found, feeds, times, peaks)
        rows, scores = _rows(found, times, seatings, evaluator, budget, effort.evaluation, reached)
        return ModelResult(
            name=name,
            kind=entry.kind,
            requirement=entry.requirement,
            accurate=entry.accurate,
            metric=evaluator.metric,
            calibration=len(calibration),
            rounds=len(times[REFERENCE]),
            rows=rows,
            versus=tuple(_versus(rows, times, seatings, evaluator, scores)),
            ceilings=peaks,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _limited(evaluator: Evaluator, most: int | None) -> Evaluator:
    return replace(evaluator, samples=lambda: islice(evaluator.samples(), most))


def _closeness(module: ModuleType, reference: ReferenceSession) -> Evaluator:
    """Cosine of all outputs to the reference's own, a sample at a time, on inputs that calibration did not see."""
    pairs = [(feeds, _flat(reference.run(feeds))) for feeds in module.unseen()]

    def score(outputs: dict[str, np.ndarray], label: np.ndarray) -> float:
        x = _flat(outputs)
        lengths = float(np.linalg.norm(x) * np.linalg.norm(label))
        return float(x @ label) / lengths if lengths and math.isfinite(lengths) else 0.0

    return Evaluator(samples=lambda: pairs, score=score, metric="cosine to fp32")


def _flat(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([y.reshape(-1).astype(np.float64) for y in outputs.values()])


def _check(found: Sequence[Variant], feeds: Mapping[str, np.ndarray]) -> None:
    """A variant that cannot run is an error row, not the end."""
    for variant in found:
        if variant.run is not None:
            try:
                variant.run(feeds)
            except OptkitError as error:
                variant.run, variant.error = None, brief(str(error))


def _timed(found: Sequence[Variant], feeds: Path, effort: Effort) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """``[rounds, 2]`` seconds, CPU time and wall-clock, of each variant that runs, all in turn, each in its process; and which rounds shared theirs.

    Where the memory of a process lies decides what collides in the caches, so each variant has several, one after the other.
    """
    taken: list[dict[str, np.ndarray]] = []
    for seed in range(_SEATINGS):
        with ExitStack() as stack:
            apart = {
                v.name: stack.enter_context(Apart(v.open, feeds))
                for v in found
                if v.run is not None and v.open is not None
            }
            for one in apart.values():
                one.wait()
            before = sum(len(t[REFERENCE]) for t in taken)
            calls = {name: partial(_later, one, before) for name, one in apart.items()}
            budget = effort.cpu_seconds / (1 + _SETTLE) / _SEATINGS
            rounds = math.ceil(effort.rounds / _SEATINGS)
            taken.append(alternate(calls, rounds=rounds, budget=budget, seed=seed))
    times = {name: np.concatenate([t[name] for t in taken]) for name in taken[0]}
    return times, np.repeat(range(_SEATINGS), [len(t[REFERENCE]) for t in taken])


def _later(one: Apart, before: int, index: int) -> tuple[float, float]:
    """Time a round of those that come after so many others."""
    return one.time(before + index, settle=_SETTLE)


def _roofline(
    path: Path,
    found: Sequence[Variant],
    feeds: Sequence[Mapping[str, np.ndarray]],
    times: Mapping[str, np.ndarray],
    peaks: Ceilings,
) -> dict[str, dict[str, Any]]:
    """What each variant really computes in, and its share of the roofline, for the first inputs and others of their shapes."""
    first = feeds[0]
    alike = [all(f[k].shape == first[k].shape for k in first) for f in feeds]
    rounds = [i for i in range(len(times[REFERENCE])) if alike[i % len(feeds)]]
    weights = weights_read(ir.load(path))
    facts = {}
    for v in found:
        if v.run is None or v.executed is None:
            continue
        try:
            ran, outputs = v.executed(first), v.run(first)
        except Exception as error:  # noqa: BLE001  (a peer's file; without its profile there is no share, and that is all)
            logger.info("  no profile of %s: %s", v.name, brief(str(error)))
            continue
        seconds = float(np.median(times[v.name][rounds, 0]))
        one = against(ran, weights, moved(first, outputs), seconds, peaks)
        total = sum(e.macs for e in ran)
        formats: dict[str, float] = {}
        for e in ran:
            if e.macs:
                formats[e.format] = round(formats.get(e.format, 0.0) + e.macs / total, 4)
        facts[v.name] = {"roofline": None if one is None else one.share, "formats": formats}
    return facts


def _rows(
    found: Sequence[Variant],
    times: Mapping[str, np.ndarray],
    seatings: np.ndarray,
    evaluator: Evaluator,
    budget: str,
    seconds: float,
    reached: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[Row, ...], dict[str, list[Any]]]:
    """A row each, and the scores of each sample of those that were evaluated."""
    rows: list[Row] = []
    kept: dict[str, list[Any]] = {}
    for v in found:
        facts: dict[str, Any] = {}
        if v.run is not None:
            cpu = times[v.name][:, 0]
            facts = {"cpu_ms": float(np.median(cpu) * 1e3), "p99_ms": float(np.percentile(cpu, 99) * 1e3)}
            if v.name != REFERENCE:
                facts["speedup"], facts["speedup_ci95"] = _ratio(times[REFERENCE][:, 0] / cpu, seatings)
            facts |= reached.get(v.name, {})
            logger.info("  evaluating %s", v.name)
            before = kept.get(REFERENCE)
            try:
                scores = _scores(evaluator, v.run, before, Budget.parse(budget), seconds)
            except OptkitError as error:
                v.error = brief(str(error))
            else:
                facts |= _judged(evaluator, before, scores, budget)
                kept[v.name] = scores
        rows.append(
            Row(name=v.name, bytes=v.bytes, note=v.note, make_seconds=v.seconds, error=v.error, **facts)
        )
    return tuple(rows), kept


def _scores(
    evaluator: Evaluator, run: Run, before: Sequence[Any] | None, budget: Budget, seconds: float
) -> list[Any]:
    """Scores of all samples; of fewer where time is up or the metric is beyond saving."""
    start, scores = time.process_time(), list[Any]()
    probe = 0 if before is None else max(32, len(before) // 5)
    for score in evaluator.stream(run):
        scores.append(score)
        if before is None:
            continue
        if len(scores) == probe < len(before):
            early = compare(evaluator, before[:probe], scores, budget)
            if early.ci95[0] > 3 * budget.absolute(early.reference):
                break
        if len(scores) == len(before) or time.process_time() - start > seconds:
            break
    return scores


def _judged(
    evaluator: Evaluator, before: Sequence[Any] | None, scores: Sequence[Any], budget: str
) -> dict[str, Any]:
    """The metric, and against ``before``, the reference's scores, what was lost."""
    if before is None:
        return {"metric": evaluator.total(scores), "n": len(scores)}
    compared = compare(evaluator, before[: len(scores)], scores, Budget.parse(budget))
    return {
        "metric": compared.candidate,
        "drop": compared.drop,
        "drop_ci95": compared.ci95,
        "n": compared.n,
        "verdict": compared.verdict,
    }


def _versus(
    rows: Sequence[Row],
    times: Mapping[str, np.ndarray],
    seatings: np.ndarray,
    evaluator: Evaluator,
    scores: Mapping[str, Sequence[Any]],
) -> Iterator[Versus]:
    """Each of optkit's own against the fastest stock peer whose metric is not beyond the budget."""
    stock = [
        r for r in rows if not r.name.startswith(OURS) and r.cpu_ms is not None and r.verdict != "missed"
    ]
    for ours, rivals in (
        (OURS, stock),
        (OURS_ORT, [r for r in stock if r.name.startswith("ORT ")]),
    ):
        if ours in times and rivals:
            best = min(rivals, key=lambda r: r.cpu_ms or math.inf)
            ratio, ci95 = _ratio(times[best.name][:, 0] / times[ours][:, 0], seatings)
            yield Versus(
                ours=ours, peer=best.name, ratio=ratio, ci95=ci95, **_lost(evaluator, scores, best.name, ours)
            )


def _lost(evaluator: Evaluator, scores: Mapping[str, Sequence[Any]], peer: str, ours: str) -> dict[str, Any]:
    """What ours loses to the peer, on the samples that both were evaluated on."""
    if peer not in scores or ours not in scores:
        return {}
    n = min(len(scores[peer]), len(scores[ours]))
    compared = compare(evaluator, scores[peer][:n], scores[ours][:n], None)
    return {"drop": compared.drop, "drop_ci95": compared.ci95}


def _ratio(ratios: np.ndarray, seatings: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median and its 95 % interval, from a bootstrap over the processes and, within each, over rounds."""
    random = np.random.default_rng(0)
    groups = [ratios[seatings == k] for k in np.unique(seatings)]

    def drawn() -> float:
        chosen = (groups[k] for k in random.integers(len(groups), size=len(groups)))
        return float(np.median(np.concatenate([random.choice(g, len(g)) for g in chosen])))

    low, high = np.percentile([drawn() for _ in range(1000)], (2.5, 97.5))
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
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and samples: all rows in half an hour"
    )
    parser.add_argument("--seconds", type=float, help="wall-clock that one model may take")
    parser.add_argument("--memory", type=float, default=8.0, metavar="GB", help="that one model may hold")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else FULL
    if options.seconds is not None:
        effort = replace(effort, seconds=options.seconds)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("optkit.benchmarks").setLevel(logging.INFO)
    for name in options.only or ():
        if name not in SUITE:
            raise UnknownNameError("model", name, SUITE)
    machine = Machine(processor=processor(), versions=versions())
    found, code = [], 0
    for name in options.only or SUITE:
        print(name, file=sys.stderr)
        start = time.monotonic()
        try:
            one, peak = bounded(
                _measure, name, effort, seconds=effort.seconds, memory=int(options.memory * 1e9)
            )
        except OptkitError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            if error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
            code = 1
            continue
        print(f"  {time.monotonic() - start:.0f} s, {peak / 1e9:.1f} GB", file=sys.stderr)
        found.append(one.model_copy(update={"peak_bytes": peak}))
        # Written after each model: the whole suite takes long.
        file, result = options.out / "cpu.json", CpuResult(machine=machine, models=(found[-1],))
        write(result.merged_into(read(file)) if file.exists() else result, options.out)
    if found:
        render(CpuResult(machine=machine, models=tuple(found)))
    return code


def _measure(name: str, effort: Effort) -> ModelResult:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("optkit.benchmarks").setLevel(logging.INFO)
    ort.set_default_logger_severity(4)
    return measure(name, effort)


if __name__ == "__main__":
    sys.exit(main())
