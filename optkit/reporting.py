"""What an artifact says about itself: manifest, report and page, filled in from what was built and measured."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

import optkit
from optkit.artifact import MANIFEST, PAGE, RECIPE, REPORT, Artifact
from optkit.candidate import Built
from optkit.compilation import Compilation
from optkit.data import CalibrationData, spelled
from optkit.evaluate import Comparison
from optkit.finish import finalize
from optkit.frontend import Loaded
from optkit.graph import count_nodes, count_parameters, digest, graphs, weight_bytes
from optkit.page import page
from optkit.passes.base import Progress
from optkit.readback import achieved, unmet
from optkit.recipe import Recipe
from optkit.report import (
    AccuracyRecord,
    Achieved,
    Ceilings,
    DataFacts,
    EligibilityRecord,
    EstimateRecord,
    Evidence,
    FidelityRecord,
    FileRecord,
    Latency,
    LeftOutRecord,
    Manifest,
    ModelFacts,
    Report,
    Resources,
    Roofline,
    ScenarioRecord,
    Size,
    dump,
)  # fmt: skip
from optkit.roofline import against, ceilings, moved, weights_read
from optkit.search import Choice
from optkit.targets.host import machine

if TYPE_CHECKING:
    from optkit.backends.base import Executed


def clocks() -> tuple[float, float]:
    """CPU seconds of this process and of its children that have ended (vendors' compilers run in some), and wall-clock seconds."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime, time.perf_counter()


def resources(started: tuple[float, float]) -> Resources:
    """What was spent since; the peak is that of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu, wall = (now - before for now, before in zip(clocks(), started, strict=True))
    return Resources(cpu_seconds=cpu, wall_seconds=wall, peak_rss_bytes=peak)


def write_up(
    work: Compilation,
    plan: Recipe,
    choice: Choice,
    scenario: ScenarioRecord | None,
    started: tuple[float, float],
) -> Report:
    """Read back what was built and write everything but the model into its folder."""
    best = choice.best
    executed = work.executed(best)
    facts = achieved(executed, best)
    choice.missed.extend(unmet(best.recipe.require, facts))
    resolved = best.recipe.model_copy(update={"candidates": (), "repair": False})
    (best.folder / RECIPE).write_text(resolved.yaml(), encoding="utf-8")
    manifest = _manifest(work, best, resolved, facts)
    (best.folder / MANIFEST).write_text(dump(manifest), encoding="utf-8")
    operators: dict[str, float] = {}
    for e in executed:
        operators[e.op] = operators.get(e.op, 0.0) + e.seconds
    host = machine()
    # Ceilings of this machine say nothing of a target that is elsewhere, and matter only beside a latency.
    peaks = None if best.speedup is None else ceilings(host.get("processor", ""))
    report = Report(
        schema=1, manifest=manifest, latency=_latency(best, work, executed, peaks), ceilings=peaks, estimate=_estimate(best),
        goal=plan.goal, scenario=scenario, candidates=tuple(choice.records), layers=tuple(best.layers),
        eligibility=_eligibility(work, best),
        pass_seconds=best.seconds, operator_seconds=dict(sorted(operators.items(), key=lambda kv: -kv[1])),
        missed=tuple(choice.missed), inconclusive=tuple(choice.inconclusive), advice=tuple(choice.advice),
        resources=resources(started), machine=host,
    )  # fmt: skip
    _write(best.folder, report)
    return report


def _manifest(work: Compilation, best: Built, resolved: Recipe, facts: Achieved) -> Manifest:
    engine, options = work.resolved(best.recipe)
    packages = ("numpy", "onnx", "onnx-ir", "onnxruntime", *work.loaded.packages, *engine.packages)
    return Manifest(
        schema=1, model=_model_facts(work.loaded), target=work.target.name, backend=engine.name,
        options=best.recipe.options, recipe_digest=resolved.digest, passes=tuple(best.records), data=_data_facts(work.data),
        achieved=facts, accuracy=_accuracy_record(best.accuracy), fidelity=_fidelity_record(best, work),
        size=Size(before=_source_bytes(work.loaded), after=best.bytes),
        evidence=_evidence(work, best), deferred=_deferred(work, best),
        mode=engine.mode(options), predicted=engine.prediction(work.target), saturation=best.saturation,
        left_out=tuple(LeftOutRecord(**asdict(one)) for one in engine.left_out(best.folder, work.target, options)),
        notes=work.notes,
        versions={name: version(name) for name in packages} | {"optkit": optkit.__version__},
        files=_files(best.folder),
    )  # fmt: skip


def _files(folder: Path) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(path=f.relative_to(folder).as_posix(), bytes=f.stat().st_size, sha256=digest(f))
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    )


def _data_facts(data: CalibrationData | None) -> DataFacts | None:
    return None if data is None else DataFacts(sha256=data.digest(), batches=len(data), random=data.random)


def finish_here(folder: Path, report: Report, started: tuple[float, float], progress: Progress) -> Report:
    """Do what is left on the device of this machine, as ``optkit finalize`` does, and say so in the report."""
    found = finalize(folder, progress=progress)
    done = {"manifest": Artifact(folder).manifest, "finished": found, "resources": resources(started)}
    report = report.model_copy(update=done)
    _write(folder, report)
    return report


def _write(folder: Path, report: Report) -> None:
    (folder / REPORT).write_text(dump(report), encoding="utf-8")
    (folder / PAGE).write_text(page(report), encoding="utf-8")


def _evidence(work: Compilation, best: Built) -> Evidence:
    """What was done. What runs here was run and timed; of other targets the backend knows."""
    if work.target.runs_here:
        everything = dict.fromkeys(
            ("emitted", "compiled", "inspected", "executed_cpu", "ran_on_device"), True
        )
        return Evidence(**everything, timed_on_device=best.speedup is not None)
    engine, options = work.resolved(best.recipe)
    found = engine.evidence(best.folder, work.target, options) - {"ran_on_device", "timed_on_device"}
    return Evidence(**dict.fromkeys(sorted(found | {"emitted", "executed_cpu"}), True))


def _eligibility(work: Compilation, best: Built) -> tuple[EligibilityRecord, ...]:
    if work.target.runs_here:
        return ()
    engine, options = work.resolved(best.recipe)
    found = engine.eligibility(best.folder, work.target, options)
    return tuple(EligibilityRecord(node=e.name, op=e.op, predicted=e.units, reason=e.reason) for e in found)


def _deferred(work: Compilation, best: Built) -> tuple[str, ...]:
    if work.target.runs_here:
        return ()
    engine, options = work.resolved(best.recipe)
    limits = best.recipe.limits
    steps = list(engine.deferred(best.folder, work.target, options))
    if limits.max_latency_ms is not None or limits.min_speedup > 1:
        known = (
            "what was measured"
            if work.finishes(best)
            else f"a measurement: there is no {work.target.name} here"
        )
        steps.append(f"hold the limits on speed against {known}")
    return tuple(steps)


def _estimate(best: Built) -> EstimateRecord | None:
    e = best.estimate
    if e is None:
        return None
    return EstimateRecord(
        floor_ms=e.floor * 1e3, low_ms=e.low * 1e3, high_ms=e.high * 1e3, bound=e.bound, inputs=e.inputs
    )


def _model_facts(loaded: Loaded) -> ModelFacts:
    return ModelFacts(
        name=loaded.name, sha256=None if loaded.path is None else digest(loaded.path), nodes=count_nodes(loaded.model),
        parameters=count_parameters(loaded.model), bytes=weight_bytes(loaded.model),
    )  # fmt: skip


def _source_bytes(loaded: Loaded) -> int:
    if loaded.path is None:
        return weight_bytes(loaded.model)
    tensors = (v.const_value for g in graphs(loaded.model) for v in g.initializers.values())
    outside = {Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)}
    return loaded.path.stat().st_size + sum(p.stat().st_size for p in outside)


def _accuracy_record(a: Comparison | None) -> AccuracyRecord | None:
    if a is None:
        return None
    return AccuracyRecord(
        metric=a.metric,
        reference=a.reference,
        candidate=a.candidate,
        drop=a.drop,
        ci95=a.ci95,
        n=a.n,
        method=a.method,
        budget=a.budget,
        met=a.verdict,
        needed=a.needed,
        constant=a.constant,
    )


def _fidelity_record(built: Built, work: Compilation) -> FidelityRecord | None:
    f = built.fidelity
    if f is None:
        return None
    return FidelityRecord(
        cosine=f.cosine, sqnr_db=f.sqnr, top1_agreement=f.agreement, batches=f.n, inputs=work.inputs,  # type: ignore[arg-type]
        met=f.shapes_equal and f.cosine >= built.recipe.limits.min_cosine,
    )  # fmt: skip


def _latency(
    built: Built, work: Compilation, executed: Sequence[Executed], peaks: Ceilings | None
) -> Latency | None:
    s = built.speedup
    if s is None or peaks is None:
        return None
    # The ceilings are those of one thread.
    reached = _reached(built, work, executed, s.candidate.median, peaks) if s.threads == 1 else None
    return Latency(
        reference_ms=s.reference.median * 1e3, candidate_ms=s.candidate.median * 1e3, candidate_p99_ms=s.candidate.p99 * 1e3,
        wall_reference_ms=s.reference.wall * 1e3, wall_candidate_ms=s.candidate.wall * 1e3, speedup=s.ratio, ci95=s.ci95,
        runs=s.candidate.runs, threads=s.threads, loaded=s.loaded, inputs=spelled(work.feeds[0]), roofline=reached,
    )  # fmt: skip


def _reached(
    built: Built, work: Compilation, executed: Sequence[Executed], seconds: float, peaks: Ceilings
) -> Roofline | None:
    """The median over the inputs that were timed, as the latency is."""
    weights, found, ran = weights_read(work.loaded.model), list[Roofline](), {}
    for feeds in work.feeds:
        shapes = tuple(x.shape for x in feeds.values())
        if shapes not in ran:
            ran[shapes] = executed if feeds is work.feeds[0] else work.executed(built, feeds)
        one = against(ran[shapes], weights, moved(feeds, work.reference.run(feeds)), seconds, peaks)
        if one is None:
            return None
        found.append(one)
    return sorted(found, key=lambda r: r.floor_ms)[len(found) // 2]
