"""A report in words, the same on the command line and on the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from optkit.backends.base import Finished
from optkit.bench import NOISE
from optkit.report import (
    AccuracyRecord,
    CandidateRecord,
    Ceilings,
    Evidence,
    FidelityRecord,
    Latency,
    Manifest,
    Report,
    Roofline,
    ScenarioRecord,
)
from optkit.targets import called

# Layers that are named one by one.
_LISTED = 6
# Times the samples at hand that one might still collect.
_MANY = 100
# An interval of a speed-up wider than this that holds no difference shows no likeness either.
_WIDE = 0.2
# What else a result depends on, as backends call it and as it is said.
_SYSTEMS = {"cuda_driver": "CUDA driver", "macos": "macOS"}
# Of the candidate: what ``CandidateRecord.verdict`` says.
SHIPPED = "shipped"

EVIDENCE: Mapping[str, str] = {
    "emitted": "its files were written",
    "compiled": "the runtime that will run it accepted them",
    "inspected": "what it consists of was read back from the running artifact",
    "executed_cpu": "its numbers were compared with the fp32 reference on a CPU",
    "proxy_compiled": "a vendor's compiler built it for another, similar target",
    "ran_on_device": "it ran on the target",
    "timed_on_device": "it was timed on the target",
}


def _digits(x: float) -> str:
    """Three digits, zeros included."""
    return f"{x:#.3g}".rstrip(".")


def megabytes(size: float) -> str:
    """``340 kB``, ``91.0 MB``: three digits, units of 10^3 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            return f"{_digits(size / unit)} {name}"
    return f"{size:.0f} bytes"


def milliseconds(ms: float) -> str:
    """``12.3 ms``, ``17.3 us``: three digits."""
    for unit, name in ((1e3, "s"), (1.0, "ms")):
        if ms >= 0.9995 * unit:
            return f"{_digits(ms / unit)} {name}"
    return f"{_digits(ms * 1e3)} us"


def count(n: int, what: str) -> str:
    """``1 node``, ``12 nodes``, ``8 batches``."""
    ending = "" if n == 1 else "es" if what.endswith(("ch", "s", "x")) else "s"
    return f"{n:,} {what}{ending}"


def number(x: float) -> str:
    """A metric, with as many digits as tell it from its neighbours."""
    if not math.isfinite(x):
        return "unbounded" if not math.isnan(x) else "unknown"
    return f"{x:.4f}" if abs(x) < 1000 else f"{x:.6g}"


def interval(ci95: tuple[float, float], digits: int = 2) -> str:
    """``95% 1.20 to 1.31``."""
    return f"95% {ci95[0]:.{digits}f} to {ci95[1]:.{digits}f}"


def percent(share: float) -> str:
    """``97.3%``, and ``<0.1%`` rather than nothing."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share * 100:.1f}%".replace("100.0%", "100%")


def shipped(report: Report) -> CandidateRecord | None:
    """The candidate that became the artifact."""
    return next((c for c in report.candidates if c.verdict == SHIPPED), None)


def faster(latency: Latency) -> str:
    """``2.41x faster than``, where the interval lies beyond what two sessions of the same file differ by; before what it is held against."""
    low, high = latency.ci95
    if low > 1 + NOISE:
        return f"{latency.speedup:.2f}x faster than"
    if high < 1 - NOISE:
        return f"{1 / latency.speedup:.2f}x slower than"
    if high - low > _WIDE:
        return f"neither faster nor slower for certain ({low:.2f} to {high:.2f}x) than"
    return "as fast as"


def headline(report: Report) -> str:
    """What came out, in one sentence."""
    manifest = report.manifest
    parts = []
    if report.latency is not None:
        parts.append(f"{faster(report.latency)} ONNX Runtime fp32")
    parts.append(smaller(report))
    how = "" if manifest.predicted is None else " as predicted"
    if manifest.accuracy is not None:
        parts.append(f"{manifest.accuracy.metric} {judged(manifest.accuracy)}{how}")
    elif manifest.fidelity is not None:
        parts.append(
            f"fidelity {'met' if manifest.fidelity.met else 'missed'}{how} (accuracy was not measured)"
        )
    return f"{manifest.model.name} for {called(manifest.target)}: {', '.join(parts)}"


def prose(report: Report) -> str:
    """What came out, for someone who has never seen such a report."""
    manifest, parts = report.manifest, []
    if (found := report.latency) is not None:
        times = f"{milliseconds(found.candidate_ms)} instead of {milliseconds(found.reference_ms)} a run"
        parts.append(f"It runs {faster(found)} the original does in ONNX Runtime, fp32 ({times})")
    parts.append(
        f"the model is {smaller(report)} ({megabytes(manifest.size.before)} before, {megabytes(manifest.size.after)} now)"
    )
    if (a := manifest.accuracy) is not None:
        parts.append(
            f"{a.metric} went from {number(a.reference)} to {number(a.candidate)} on {count(a.n, 'sample')}: {judged(a)}"
        )
    elif (f := manifest.fidelity) is not None:
        parts.append(
            f"its outputs are close to the original's (cosine {f.cosine:.4f}), which is not an accuracy"
        )
    return "; ".join(parts) + "."


def outcome(report: Report) -> str:
    """Whether the request was met."""
    one, a = shipped(report), report.manifest.accuracy
    if (steps := report.manifest.deferred) and not report.missed and not report.inconclusive:
        return f"What can be checked here was met; {count(len(steps), 'step')} must be done on {report.manifest.target}."
    what = f"{one.name} was shipped" if one is not None else "an artifact was written"
    if report.missed:
        return f"The request was not met; {what}, the best that is feasible."
    if report.inconclusive:
        return f"The samples do not decide whether the request was met; {what}."
    if a is not None and a.met == "inconclusive":
        return f"Shipped {'the artifact' if one is None else one.name}; whether its {a.metric} keeps the limit, {count(a.n, 'sample')} do not decide."
    return f"The request was met: {what}."


def smaller(report: Report) -> str:
    """``3.9x smaller``."""
    before, after = report.manifest.size.before, report.manifest.size.after
    if not before or not after or abs(before / after - 1) < 0.02:
        return "of the same size"
    return f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"


def size(report: Report) -> str:
    """Nodes, bytes and parameters before and after."""
    manifest = report.manifest
    after = manifest.passes[-1].nodes_after if manifest.passes else manifest.model.nodes
    run = (
        ""
        if manifest.achieved is None or not report.profiled
        else f", of which the runtime makes {sum(manifest.achieved.operators.values()):,}"
    )
    return (
        f"{manifest.model.nodes:,} -> {count(after, 'node')}{run}; {megabytes(manifest.size.before)} -> "
        f"{megabytes(manifest.size.after)} ({smaller(report)}); {count(manifest.model.parameters, 'parameter')}"
    )


def latency(record: Latency) -> tuple[str, str]:
    """The figures, and how they were taken."""
    figures = (
        f"{milliseconds(record.reference_ms)} -> {milliseconds(record.candidate_ms)} a run: {record.speedup:.2f}x "
        f"({interval(record.ci95)}), 99th percentile {milliseconds(record.candidate_p99_ms)}"
    )
    threads = count(record.threads, "thread")
    clock = "CPU time" if record.threads == 1 else "wall-clock time"
    how = f"measured on this machine, {threads}, {clock}, {record.runs} runs in turn with ONNX Runtime fp32, the ratio that of pairs; inputs {record.inputs}"
    if record.roofline is not None:
        figures += f"; {reached(record.roofline)}"
    if record.loaded:
        how += "; others were using the machine"
    return figures, how


def scenario(record: ScenarioRecord) -> tuple[str, ...]:
    """How the artifact shares the cores, what that gives, and what else was tried."""
    offline = record.scenario == "Offline"

    def said(value: float) -> str:
        return f"{value:,.4g} samples/s" if offline else milliseconds(value)

    shared = count(record.threads, "thread")
    if offline:
        shared = f"{count(record.streams, 'stream')} of {count(max(1, record.threads // record.streams), 'thread')}"
    what = "" if offline else " at the 90th percentile"
    lines = [
        f"{record.scenario}, {shared}: {said(record.candidate)}{what}; ONNX Runtime fp32 with its defaults "
        f"{said(record.reference)}: {record.speedup:.2f}x ({interval(record.ci95)}, by pairs), wall-clock time"
    ]
    unit = "stream" if offline else "thread"
    if record.fixed:
        lines.append(f"the options fix the {unit}s, so no other number was tried")
    elif len(record.tried) > 1:
        tried = ", ".join(
            f"{count(t.streams if offline else t.threads, unit)} {said(t.value)}" for t in record.tried
        )
        lines.append(f"tried: {tried}; the artifact keeps the {unit}s")
    if record.loaded:
        lines.append("others were using the machine, which makes more threads look worse than they are")
    return tuple(lines)


def untimed(report: Report) -> tuple[str, ...]:
    """Why there is no latency beside the reference's, and what is known instead."""
    if report.finished is not None:
        return measured(report.finished)
    e, target = report.estimate, report.manifest.target
    said = f"not measured: there is no {target} here"
    if e is None:
        return (said,)
    return (
        said,
        f"floor {milliseconds(e.floor_ms)} (bound by {e.bound}), estimate {milliseconds(e.low_ms)} to {milliseconds(e.high_ms)}: "
        f"computed from the data sheet{f' for {e.inputs}' if e.inputs else ''}",
    )


def measured(found: Finished) -> tuple[str, ...]:
    """On which device a run was timed, and how long it took."""
    return measured_on(found), *(
        f"{', '.join(f'{name} {shape}' for name, shape in b['inputs'].items())}: {milliseconds(b['median_ms'])} a run, "
        f"99th percentile {milliseconds(b['p99_ms'])}, {b['runs']} runs"
        for b in found.batches
    )


def measured_on(found: Finished) -> str:
    """``measured on NVIDIA L4, CUDA driver 13000``."""
    named = (f"{said} {found.device[key]}" for key, said in _SYSTEMS.items() if key in found.device)
    return ", ".join((f"measured on {found.device['device']}", *named))


def deferred(report: Report) -> str:
    """``DEFERRED: 2 steps``."""
    steps = len(report.manifest.deferred)
    return f"DEFERRED: {count(steps, 'step')} that need{'s' if steps == 1 else ''} {report.manifest.target}"


def reached(found: Roofline) -> str:
    """``62% of this machine's roofline (floor 1.27 ms, bound by compute)``."""
    return f"{percent(found.share)} of this machine's roofline (floor {milliseconds(found.floor_ms)}, bound by {found.bound})"


def peaks(found: Ceilings) -> tuple[str, ...]:
    """The ceilings that a roofline is made of, and where they come from."""
    rates = [
        f"{fmt} {_digits(rate / 1e9)} G operations/s ({found.sources[fmt]})"
        for fmt, rate in sorted(found.operations.items())
    ]
    note = "measured on this machine, one thread by CPU time, best of several runs"
    if found.loaded:
        note += f"; others were using the machine (wall-clock {found.stretched:.1f} times CPU time)"
    memory = f"memory {_digits(found.bytes / 1e9)} GB/s"
    if found.cached:
        size = max(s for s in found.cached if found.reading(s) == max(found.cached.values()))
        memory += f", up to {_digits(found.cached[size] / 1e9)} GB/s for {size >> 20} MiB that caches hold"
    return f"{', '.join(rates)}; {memory}", note


def predicted(report: Report) -> tuple[str, ...]:
    """What accuracy and fidelity are, where they are no measurement of the target; empty where they are."""
    manifest = report.manifest
    if manifest.predicted is None:
        return ()
    return (f"predicted by emulation for {manifest.target}: {manifest.predicted}",)


def saturation(report: Report) -> tuple[str, ...]:
    """Which layers saturate in 16 bits and what was done about it; empty for targets where none does."""
    manifest, s = report.manifest, report.manifest.saturation
    if s is None:
        return ()
    if not s.layers:
        return (f"no product runs in int8, so nothing saturates on {manifest.target}",)
    kept = (
        f"{len(s.narrowed)} of {count(s.layers, 'int8 layer')} saturated on the calibration data: 7-bit weights in "
        + "; ".join(f"{name} ({channels} channels)" for name, channels in list(s.narrowed.items())[:_LISTED])
        + (f" and {len(s.narrowed) - _LISTED} more" if len(s.narrowed) > _LISTED else "")
        if s.narrowed
        else f"none of {count(s.layers, 'int8 layer')} was narrowed to 7 bits"
    )
    left = f"{len(s.at_risk)} could saturate on other inputs" if s.at_risk else "none can saturate any more"
    return kept, f"{left}, by their weights alone"


def left_out(manifest: Manifest) -> tuple[str, ...]:
    """Every program that the device cannot choose, as what the compiler made of it does not pass a gate."""
    return tuple(f"{one.kernel} ({one.config}): {one.gate}: {one.found}" for one in manifest.left_out)


def judged(a: AccuracyRecord) -> str:
    """``met``, ``missed`` or what is undecided, against the budget."""
    if a.met is None:
        return "measured, without a limit"
    return f"{a.met} (allowed drop {a.budget})"


def accuracy(a: AccuracyRecord) -> tuple[str, ...]:
    """The metric before and after, the drop with its interval, and what that means."""
    low, high = a.ci95
    figures = f"{a.metric} {number(a.reference)} -> {number(a.candidate)}, drop {number(a.drop)} (95% {number(low)} to {number(high)}), n = {a.n}"
    verdict = {
        "met": f"met: the whole interval is within the allowed drop of {a.budget}",
        "missed": f"missed: the drop is beyond the allowed {a.budget}",
        "inconclusive": f"inconclusive: the drop is within the allowed {a.budget}, the interval reaches beyond it",
        None: "no limit was given",
    }[a.met]
    if a.met == "inconclusive" and not a.constant:
        if a.needed is None:
            verdict += "; more samples would decide"
        elif a.needed <= _MANY * a.n:
            verdict += f"; about {count(a.needed, 'sample')} would decide"
        else:
            verdict += "; the drop is so near to it that more samples would hardly decide"
    lines = figures, f"{verdict} ({a.method} interval, same samples for both)"
    if a.constant:
        same = f"every sample scored {a.reference:g} for both: nothing is known unless score() looks at the outputs"
        return *lines, same
    return lines


def fidelity(f: FidelityRecord) -> tuple[str, ...]:
    """Closeness to the reference, never called accuracy."""
    agreement = (
        "" if f.top1_agreement is None else f", same largest output in {percent(f.top1_agreement)} of rows"
    )
    return (
        f"cosine {f.cosine:.5f}, SQNR {f.sqnr_db:.1f} dB to the fp32 reference{agreement}: {'met' if f.met else 'missed'}",
        f"on {count(f.batches, 'batch')} of {f.inputs}; this is not an accuracy: without --eval there is no metric",
    )


def formats(report: Report) -> tuple[str, ...]:
    """Which arithmetic really ran."""
    achieved = report.manifest.achieved
    if achieved is None:
        return ("not read back",)
    shares = sorted(achieved.formats.items(), key=lambda kv: -kv[1])
    ran = ", ".join(f"{name} {percent(share)}" for name, share in shares) or "no products"
    return (f"{ran} of the multiply-accumulates, {read_back(report)}", achieved.scheme)


def read_back(report: Report) -> str:
    """Where the formats are known from."""
    if report.profiled:
        return "as the runtime's profile shows"
    if report.manifest.evidence.proxy_compiled:
        return "as a vendor's compiler built it for another, similar target"
    return "as read back from what was built"


def evidence(record: Evidence) -> tuple[tuple[str, str, bool], ...]:
    """Every step by name, what it means, and whether it was done."""
    done = record.model_dump()
    return tuple((name.replace("_", " "), meaning, bool(done[name])) for name, meaning in EVIDENCE.items())


def gathered(record: Evidence) -> tuple[str, str]:
    """What was done and what was not, by name."""
    done = [name for name, _, yes in evidence(record) if yes]
    left = [name for name, _, yes in evidence(record) if not yes]
    return f"done: {', '.join(done) or 'nothing'}", f"not done: {', '.join(left) or 'nothing'}"


def kept_float(report: Report) -> tuple[str, ...]:
    """Layers that were measured and went back to float."""
    return tuple(layer.node for layer in report.layers if layer.kept_float)


def bits(report: Report) -> str:
    """How many layers have weights of how many bits, where the recipe had several to choose from; else empty."""
    found = Counter(layer.bits for layer in report.layers if layer.bits is not None)
    if not found:
        return ""
    parts = [f"{n} of {b} bits" for b, n in sorted(found.items())]
    return f"{count(len(report.layers), 'layer')} by what quantizing each alone does to the outputs: {', '.join(parts)}"


def units(report: Report) -> tuple[str, ...]:
    """The best part of the target for how many operations, and why it is not a better one; empty where nothing is predicted."""
    records = report.eligibility
    if not records:
        return ()
    best = Counter(r.predicted for r in sorted(records, key=lambda r: -len(r.predicted)))
    places = ", ".join(f"{n} on the {unit}" for (unit, *_), n in best.items())
    lines = [
        f"predicted from documented rules, not observed: of {count(len(records), 'operation')} at best {places}"
    ]
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for r in records:
        if r.reason:
            reasons.setdefault((r.predicted[0], r.reason), Counter())[r.op] += 1
    for (unit, reason), ops in sorted(reasons.items(), key=lambda kv: -sum(kv[1].values())):
        kinds = ", ".join(f"{n} {op}" for op, n in ops.most_common(4))
        lines.append(f"{unit}: {kinds}{', …' if len(ops) > 4 else ''}: {reason}")
    return tuple(lines)


def metric(candidate: CandidateRecord) -> tuple[str, str, str]:
    """What a candidate was judged by: the metric, its drop and the end of the interval; or the cosine alone."""
    if candidate.metric is None:
        return ("" if candidate.cosine is None else f"{candidate.cosine:.4f}"), "", ""
    drop = "" if candidate.drop is None else number(candidate.drop)
    return number(candidate.metric), drop, "" if candidate.ci95 is None else number(candidate.ci95[1])


def command(report: Report) -> str:
    """The command line that builds the same bytes again."""
    manifest = report.manifest
    parts = ["optkit", "compile", manifest.model.name, "--recipe", "recipe.yaml"]
    if manifest.data is not None:
        parts += ["--calib", "random" if manifest.data.random else "DATA"]
    if manifest.accuracy is not None:
        parts += ["--eval", "FILE"]
    return " ".join(parts)
