"""The road from a file to an artifact."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

import optkit
from optkit.artifact import MANIFEST, PAGE, RECIPE, REPORT, Artifact
from optkit.candidate import Built
from optkit.compilation import Compilation
from optkit.data import spelled
from optkit.errors import UnsupportedOpError
from optkit.evaluate import Comparison, Evaluator
from optkit.finish import finalize
from optkit.frontend import Loaded
from optkit.graph import count_nodes, count_parameters, digest, graphs, weight_bytes
from optkit.page import page
from optkit.passes.base import Progress, Silent
from optkit.readback import achieved, unmet
from optkit.recipe import Recipe
from optkit.report import (
    AccuracyRecord,
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
from optkit.request import Batches, Request, request
from optkit.roofline import against, ceilings, moved, weights_read
from optkit.search import Choice, carry_out, choose
from optkit.sharing import share
from optkit.store import replace_folder, temporary_folder
from optkit.targets import Target
from optkit.targets.host import machine

if TYPE_CHECKING:
    from optkit.backends.base import Executed


def compile(
    source: Any,
    inputs: Any = None,
    *,
    dynamic_shapes: Sequence[str] | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    target: str | Target | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    precision: str | None = None,
    data: Batches | None = None,
    evaluate: Evaluator | str | Path | None = None,
    max_drop: str | float | None = None,
    backend: str | None = None,
    out: str | Path = "build",
    overrides: Sequence[str] = (),
    seed: int | None = None,
    goal: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> tuple[Artifact, Report]:
    """Compile a model, measure it against the reference, and write the artifact.

    Args:
        source: An ``.onnx`` file, its bytes, or a graph; or a PyTorch module, ``(module, inputs)``, an exported program, a
            ``.pt2`` or TorchScript file, a Hugging Face folder, or ``package.module:factory``.
        inputs: Example inputs of a module: a tensor, a tuple of arguments, or a dict of named ones.
        dynamic_shapes: Axes of a module's inputs that stay free: names such as ``batch`` and ``sequence``, or
            ``{input: {axis: name}}``. Each is proved at two other sizes.
        weights: A checkpoint for the module.
        target: Hardware; the recipe's, or ``cpu``.
        recipe: Name of a shipped recipe, a file, or plain data. Without one, ``precision`` names it, or ``auto``.
        precision: As on the command line: ``int8``, ``int8-dyn``, ``fp32`` …
        data: Calibration batches. Without data only exact candidates and dynamic quantization are open.
        evaluate: Samples and a score, or the file that defines them.
        max_drop: How much of the metric may be lost: ``1%`` relative, ``0.01`` absolute.
        backend: Runtime; the recipe's, or the target's best.
        out: Folder to write; an artifact that is there is replaced when the new one is complete.
        overrides: ``key=value`` changes of the recipe.
        goal: ``latency`` (the default), ``throughput`` or ``size``: what is wanted most among what keeps the limits.
        seed: For random choices; the recipe's.
        strict: Whether a gate that the samples cannot decide counts as missed.
        progress: Where to say how far long work is.

    Returns:
        The artifact and its report. ``report.missed`` says in words which limits the request did not keep; the best
        artifact that is feasible ships all the same.

    Raises:
        UsageError: The options, the recipe or the data do not fit.
        ModelError: The model cannot be read or built.
        BackendUnavailableError: A package is missing.
    """
    started = _clocks()
    destination = Path(out)
    asked = request(
        source, inputs=inputs, dynamic_shapes=dynamic_shapes, weights=weights, target=target, recipe=recipe, precision=precision,
        data=data, evaluate=evaluate, max_drop=max_drop, backend=backend, out=destination, overrides=overrides, seed=seed, goal=goal,
    )  # fmt: skip
    with temporary_folder(destination) as folder:
        work = asked.work(folder, progress or Silent())
        choice = _choose(work, asked, strict=strict)
        scenario = share(work, asked.recipe, choice.best)
        report = _finish(work, asked.recipe, choice, scenario, started)
        if work.finishes(choice.best):
            report = _finished(choice.best.folder, report, started, work.progress)
        replace_folder(choice.best.folder, destination)
    return Artifact(destination), report


def _choose(work: Compilation, asked: Request, *, strict: bool) -> Choice:
    if not asked.candidates:
        return carry_out(work, asked.recipe, strict=strict)
    try:
        choice = choose(work, asked.recipe, asked.candidates, strict=strict)
    except UnsupportedOpError as error:
        if asked.closed and asked.target.floatless:
            error.hint = f"give calibration data (--calib FOLDER): {', '.join(asked.closed)} would be tried, which quantizes"
        raise
    if asked.closed:
        choice.advice.append(
            f"with calibration data (--calib) these would be tried too: {', '.join(asked.closed)}"
        )
    if asked.evaluator is None:
        choice.advice.append(
            "with an evaluator (--eval) accuracy would be measured; what is reported is fidelity to the fp32 reference"
        )
    return choice


def _finish(
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
    operators: dict[str, float] = {}
    for e in executed:
        operators[e.op] = operators.get(e.op, 0.0) + e.seconds
    manifest = Manifest(
        schema=1, model=_model_facts(work.loaded), target=work.target.name, backend=work.engine(best.recipe).name,
        options=best.recipe.options, recipe_digest=resolved.digest, passes=tuple(best.records),
        data=None if work.data is None else DataFacts(sha256=work.data.digest(), batches=len(work.data), random=work.data.random),
        achieved=facts, accuracy=_accuracy_record(best.accuracy), fidelity=_fidelity_record(best, work),
        size=Size(before=_source_bytes(work.loaded), after=best.bytes),
        evidence=_evidence(work, best), deferred=_deferred(work, best),
        mode=_mode(work, best), predicted=work.engine(best.recipe).prediction(work.target), saturation=best.saturation,
        left_out=_left_out(work, best),
        notes=work.notes, versions={name: version(name) for name in ("numpy", "onnx", "onnx-ir", "onnxruntime", *work.loaded.packages, *work.engine(best.recipe).packages)} | {"optkit": optkit.__version__},
        files=tuple(FileRecord(path=f.relative_to(best.folder).as_posix(), bytes=f.stat().st_size, sha256=digest(f)) for f in sorted(best.folder.rglob("*")) if f.is_file()),
    )  # fmt: skip
    host = machine()
    # Ceilings of this machine say nothing of a target that is elsewhere, and matter only beside a latency.
    peaks = None if best.speedup is None else ceilings(host.get("processor", ""))
    report = Report(
        schema=1, manifest=manifest, latency=_latency(best, work, executed, peaks), ceilings=peaks, estimate=_estimate(best), goal=plan.goal, scenario=scenario, candidates=tuple(choice.records), layers=tuple(best.layers),
        eligibility=_eligibility(work, best),
        pass_seconds=best.seconds, operator_seconds=dict(sorted(operators.items(), key=lambda kv: -kv[1])),
        missed=tuple(choice.missed), inconclusive=tuple(choice.inconclusive), advice=tuple(choice.advice),
        resources=_resources(started),
        machine=host,
    )  # fmt: skip
    (best.folder / MANIFEST).write_text(dump(manifest), encoding="utf-8")
    _write(best.folder, report)
    return report


def _write(folder: Path, report: Report) -> None:
    (folder / REPORT).write_text(dump(report), encoding="utf-8")
    (folder / PAGE).write_text(page(report), encoding="utf-8")


def _clocks() -> tuple[float, float]:
    """CPU seconds of this process and of those it started that have ended, as compilers of vendors do, and seconds on the wall."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime, time.perf_counter()


def _resources(started: tuple[float, float]) -> Resources:
    """What was spent since; the peak is that of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu, wall = (now - before for now, before in zip(_clocks(), started, strict=True))
    return Resources(cpu_seconds=cpu, wall_seconds=wall, peak_rss_bytes=peak)


def _finished(folder: Path, report: Report, started: tuple[float, float], progress: Progress) -> Report:
    """Do what is left on the device of this machine, as ``optkit finalize`` does, and say so in the report."""
    found = finalize(folder, progress=progress)
    done = {"manifest": Artifact(folder).manifest, "finished": found, "resources": _resources(started)}
    report = report.model_copy(update=done)
    _write(folder, report)
    return report


def _mode(work: Compilation, best: Built) -> str | None:
    engine, options = work.resolved(best.recipe)
    return engine.mode(options)


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


def _left_out(work: Compilation, best: Built) -> tuple[LeftOutRecord, ...]:
    engine, options = work.resolved(best.recipe)
    return tuple(LeftOutRecord(**asdict(one)) for one in engine.left_out(best.folder, work.target, options))


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
