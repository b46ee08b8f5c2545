"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from optkit import sentences
from optkit.evaluate import Budget
from optkit.report import AccuracyRecord, Achieved, FidelityRecord, LayerRecord, Report
from optkit.targets import called

# Longer lists are cut here; report.json has all of them.
_LONGEST = 15

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --line: #d8dee4; --paper: #ffffff; --panel: #f6f8fa;
  --bar: #0969da; --other: #8c959f; --good: #1a7f37; --warn: #9a6700; --bad: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117;
  --panel: #151b23; --bar: #4493f8; --other: #6e7681; --good: #3fb950; --warn: #d29922; --bad: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 50rem; }
.soft { color: var(--soft); font-size: .92rem; }
.verdict { border-left: 5px solid var(--good); background: var(--panel); padding: .9rem 1.1rem; border-radius: 4px; }
.verdict.undecided { border-color: var(--warn); } .verdict.missed { border-color: var(--bad); }
.verdict strong { font-size: 1.08rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .8rem; margin: 1.1rem 0 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; }
td { border-bottom: 1px solid var(--line); padding: .35rem .9rem .35rem 0; vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
td.k { white-space: nowrap; overflow-wrap: normal; }
tr.shipped td { font-weight: 600; background: var(--panel); }
tr.explained td { border-bottom: 0; padding-bottom: 0; } tr.explained + tr td { padding-top: 0; }
td.bar { width: 30%; min-width: 6rem; padding-top: .6rem; }
td.short { width: 6rem; padding-top: .6rem; }
.wide { overflow-x: auto; }
svg { display: block; } svg.line { height: .8rem; width: 100%; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.b { fill: var(--bar); } .o { fill: var(--other); } .f0 { fill: var(--bar); } .f1 { fill: var(--other); } .f2 { fill: var(--warn); }
code, pre { font: .88rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto; }
ul { margin: .4rem 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .35rem; vertical-align: -1px; }
"""


def page(report: Report) -> str:
    """The page; the same report gives the same page."""
    manifest = report.manifest
    title = f"{manifest.model.name} for {called(manifest.target)}"
    parts = [
        f"<p class=soft>optkit {_e(manifest.versions.get('optkit', ''))} report</p><h1>{_e(title)}</h1>",
        _verdict(report),
        _tiles(report),
        _latency(report),
        _scenario(report),
        _accuracy(manifest.accuracy) if manifest.accuracy is not None else _fidelity(manifest.fidelity),
        _paragraphs(sentences.predicted(report), "soft"),
        _saturation(report),
        _size(report),
        _formats(manifest.achieved, report),
        _candidates(report),
        _layers(report.layers),
        _units(report),
        _passes(report),
        _operators(report.operator_seconds),
        _left_out(report),
        _evidence(report),
        _again(report),
        _machine(report),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_e(title)}: optkit</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _e(text: object) -> str:
    return escape(str(text))


def _paragraphs(lines: Iterable[str], kind: str = "") -> str:
    return "".join(f"<p{f' class={kind}' if kind else ''}>{_e(line)}</p>" for line in lines)


def _verdict(report: Report) -> str:
    state = "missed" if report.missed else "undecided" if report.inconclusive or _undecided(report) else ""
    lists = [
        (name, lines)
        for name, lines in (
            ("Missed", report.missed),
            ("Undecided", report.inconclusive),
            ("Advice", report.advice),
        )
        if lines
    ]
    more = "".join(
        f"<p><b>{name}</b></p><ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"
        for name, lines in lists
    )
    return f'<div class="verdict {state}"><strong>{_e(sentences.outcome(report))}</strong><p>{_e(sentences.prose(report))}</p>{more}</div>'


def _undecided(report: Report) -> bool:
    a = report.manifest.accuracy
    return a is not None and a.met == "inconclusive"


def _tiles(report: Report) -> str:
    manifest, tiles = report.manifest, []
    if report.latency is not None:
        low, high = report.latency.ci95
        how = "measured on this machine" if manifest.evidence.timed_on_device else "estimate"
        tiles.append(
            (
                f"{report.latency.speedup:.2f}x",
                "speed-up over ONNX Runtime fp32",
                f"95% {low:.2f} to {high:.2f}, {how}",
            )
        )
    after = manifest.size.after
    share = f"{after / manifest.size.before * 100:.0f}%" if manifest.size.before else "-"
    tiles.append(
        (share, "of the size", f"{sentences.megabytes(manifest.size.before)} to {sentences.megabytes(after)}")
    )
    if (a := manifest.accuracy) is not None:
        tiles.append(
            (
                sentences.number(a.candidate),
                a.metric,
                f"{sentences.number(a.reference)} before, n = {a.n}: {a.met or 'no limit'}",
            )
        )
    elif (f := manifest.fidelity) is not None:
        tiles.append(
            (
                f"{f.cosine:.4f}",
                "cosine to the fp32 reference",
                "fidelity, not accuracy: " + ("met" if f.met else "missed"),
            )
        )
    if manifest.achieved is not None and manifest.achieved.formats:
        name, most = max(manifest.achieved.formats.items(), key=lambda kv: kv[1])
        tiles.append((sentences.percent(most), f"of the products in {name}", sentences.read_back(report)))
    cells = "".join(
        f"<div class=tile><b>{_e(big)}</b>{_e(what)}<div class=soft>{_e(small)}</div></div>"
        for big, what, small in tiles
    )
    return f"<div class=tiles>{cells}</div>"


def _bar(share: float, kind: str = "b") -> str:
    width = max(0.0, min(1.0, share)) * 100
    return f'<svg class=line viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect class="{kind}" width="{width:.2f}" height="8"/></svg>'


def _bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """``(name, value, value in words, kind)``, each with a bar; the largest fills the column."""
    largest = max((value for _, value, _, _ in rows), default=0.0) or 1.0
    cells = "".join(
        f"<tr><td>{_e(name)}</td><td class=n>{_e(shown)}</td><td class=bar>{_bar(value / largest, kind)}</td></tr>"
        for name, value, shown, kind in rows
    )
    return f"<table>{cells}</table>"


def _table(columns: Sequence[str], rows: Iterable[str]) -> str:
    """Columns that start with ``>`` hold numbers; ``rows`` are ready."""
    head = "".join(
        f"<th{' class=n' if c.startswith('>') else ''}>{_e(c.removeprefix('>'))}</th>" for c in columns
    )
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _row(cells: Iterable[tuple[str, str]], kind: str = "") -> str:
    """``(class, html)`` for each cell; classes are ours and need no escaping."""
    inside = "".join(f'<td class="{k}">{html}</td>' if k else f"<td>{html}</td>" for k, html in cells)
    return f'<tr class="{kind}">{inside}</tr>' if kind else f"<tr>{inside}</tr>"


def _latency(report: Report) -> str:
    found = report.latency
    if found is None:
        first, *rest = sentences.untimed(report)
        return f"<h2>Latency</h2><p>{_e(first[:1].upper() + first[1:])}.</p>{_paragraphs([f'{line[:1].upper()}{line[1:]}.' for line in rest])}"
    figures, how = sentences.latency(found)
    bars = _bars(
        [
            (
                "ONNX Runtime, fp32, default settings",
                found.reference_ms,
                sentences.milliseconds(found.reference_ms),
                "o",
            ),
            ("this artifact", found.candidate_ms, sentences.milliseconds(found.candidate_ms), "b"),
        ]
    )
    walls = f"By the wall clock: {sentences.milliseconds(found.wall_reference_ms)} and {sentences.milliseconds(found.wall_candidate_ms)}."
    return f"<h2>Latency</h2>{bars}<p>{_e(figures)}</p>{_paragraphs((how + '.', walls), 'soft')}"


def _accuracy(a: AccuracyRecord) -> str:
    lines = sentences.accuracy(a)
    return f"<h2>Accuracy</h2>{_interval(a)}<p>{_e(lines[0])}</p>{_paragraphs(lines[1:], 'soft')}"


def _interval(a: AccuracyRecord) -> str:
    """The drop with its interval on an axis, and the drop that is allowed."""
    allowed = None if a.budget is None else Budget.parse(a.budget).absolute(a.reference)
    marks = [m for m in (0.0, a.drop, *a.ci95, allowed) if m is not None and math.isfinite(m)]
    low, high = min(marks), max(marks)
    margin = (high - low) * 0.08 or 1.0
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return 10 + (min(max(value, low), high) - low) / (high - low) * 580

    color = {"met": "good", "missed": "bad", "inconclusive": "warn", None: "ink"}[a.met]
    start, end = (x(v) for v in a.ci95)
    drawn = [
        '<line x1="10" y1="34" x2="590" y2="34" stroke="var(--line)"/>',
        f'<line x1="{x(0):.1f}" y1="14" x2="{x(0):.1f}" y2="40" stroke="var(--soft)"/>',
        f'<text x="{x(0):.1f}" y="56" text-anchor="middle">no drop</text>',
        f'<line x1="{start:.1f}" y1="26" x2="{end:.1f}" y2="26" stroke="var(--{color})" stroke-width="4" stroke-linecap="round"/>',
        f'<circle cx="{x(a.drop):.1f}" cy="26" r="6" fill="var(--{color})"/>',
    ]
    if allowed is not None:
        at = x(allowed)
        anchor = "end" if at > 520 else "middle"
        shift = 26 if abs(at - x(0)) < 90 else 0
        drawn += [
            f'<line x1="{at:.1f}" y1="10" x2="{at:.1f}" y2="{40 + shift / 2:.0f}" stroke="var(--bad)" stroke-dasharray="4 3"/>',
            f'<text x="{at:.1f}" y="{56 + shift / 1.6:.0f}" text-anchor="{anchor}">allowed: {_e(sentences.number(allowed))} ({_e(a.budget)})</text>',
        ]
    label = f"drop {sentences.number(a.drop)}, interval {sentences.number(a.ci95[0])} to {sentences.number(a.ci95[1])}"
    return f'<svg viewBox="0 0 600 80" style="max-width: 40rem; width: 100%" role="img" aria-label="{_e(label)}">{"".join(drawn)}</svg>'


def _fidelity(f: FidelityRecord | None) -> str:
    if f is None:
        return "<h2>Accuracy</h2><p>Neither accuracy nor fidelity was measured.</p>"
    lines = sentences.fidelity(f)
    return f"<h2>Fidelity</h2><p>{_e(lines[0])}</p>{_paragraphs(lines[1:], 'soft')}"


def _scenario(report: Report) -> str:
    if report.scenario is None:
        return ""
    lines = sentences.scenario(report.scenario)
    return f"<h2>Cores</h2><p>{_e(lines[0])}</p>{_paragraphs(lines[1:], 'soft')}"


def _saturation(report: Report) -> str:
    lines = sentences.saturation(report)
    return f"<h2>Saturation</h2>{_paragraphs(lines)}" if lines else ""


def _size(report: Report) -> str:
    manifest = report.manifest
    after = manifest.size.after
    bars = _bars(
        [
            (
                "the model as it was given",
                manifest.size.before,
                sentences.megabytes(manifest.size.before),
                "o",
            ),
            ("this artifact", after, sentences.megabytes(after), "b"),
        ]
    )
    return f"<h2>Size</h2>{bars}<p>{_e(sentences.size(report))}</p>"


def _formats(achieved: Achieved | None, report: Report) -> str:
    if achieved is None:
        return ""
    x, rects, keys = 0.0, [], []
    for index, (name, share) in enumerate(sorted(achieved.formats.items(), key=lambda kv: -kv[1])):
        kind = f"f{min(index, 2)}"
        rects.append(f'<rect class="{kind}" x="{x:.2f}" width="{share * 100:.2f}" height="8"/>')
        color = ("bar", "other", "warn")[min(index, 2)]
        keys.append(
            f'<span style="white-space: nowrap; margin-right: 1.2rem"><i class=key style="background: var(--{color})"></i>{_e(name)} {_e(sentences.percent(share))}</span>'
        )
        x += share * 100
    shown = f'<svg class=line style="height: 1.3rem" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{"".join(rects)}</svg><p>{"".join(keys)}</p>'
    weights = ", ".join(
        f"{kind} {sentences.megabytes(size)}"
        for kind, size in sorted(achieved.weights.items(), key=lambda kv: -kv[1])
    )
    places = ", ".join(f"{where} {sentences.percent(share)}" for where, share in achieved.placement.items())
    kept = sentences.kept_float(report)
    ran = report.profiled
    known = "read from the runtime's profile of one run" if ran else sentences.read_back(report)
    notes = [
        f"Share of the multiply-accumulates by the arithmetic that {'did' if ran else 'does'} them, {known}.",
        f"Quantized: {achieved.scheme}.",
        f"Weights as stored: {weights or 'none'}. Nodes {'ran on' if ran else 'are shown by'}: {places or 'unknown'}.",
    ]
    if chosen := sentences.bits(report):
        notes.append(f"{chosen[:1].upper()}{chosen[1:]}.")
    if kept:
        notes.append(
            f"{len(kept)} of {sentences.count(len(report.layers), 'layer')} went back to float because quantizing them hurts most."
        )
    return f"<h2>Formats</h2>{shown if achieved.formats else ''}{_paragraphs(notes[:1], 'soft')}{_paragraphs(notes[1:])}"


def _candidates(report: Report) -> str:
    order = sorted(report.candidates, key=lambda c: (c.verdict != sentences.SHIPPED, -(c.speedup or 0.0)))
    largest = max((c.speedup or 0.0 for c in order), default=0.0) or 1.0
    a, judged = report.manifest.accuracy, any(c.metric is not None for c in order)
    color = {sentences.SHIPPED: "good", "missed": "bad", "failed": "bad", "inconclusive": "warn"}
    metric = (
        (f">{a.metric if a is not None else 'metric'}", ">Drop", ">95% up to") if judged else (">Cosine",)
    )
    columns = ("Candidate", ">Speed-up", "", ">Size", *metric, "Verdict")
    rows = []
    for c in order:
        won = c.verdict == sentences.SHIPPED
        bar = "" if c.speedup is None else _bar(c.speedup / largest, "b" if won else "o")
        cells = (
            ("k", _e(c.name)),
            ("n", "" if c.speedup is None else f"{c.speedup:.2f}x"),
            ("short", bar),
            ("n", "" if c.bytes is None else _e(sentences.megabytes(c.bytes))),
            *(("n", _e(text)) for text in sentences.metric(c)[: 3 if judged else 1]),
            ("k", f'<span class="{color.get(c.verdict, "")}">{_e(c.verdict)}</span>'),
        )
        rows.append(
            _row(cells, " ".join(k for k, on in (("shipped", won), ("explained", bool(c.reason))) if on))
        )
        if c.reason:
            rows.append(f'<tr><td colspan="{len(columns)}" class=soft>{_e(c.reason)}</td></tr>')
    return f"<h2>What was tried</h2>{_table(columns, rows)}" if rows else ""


def _units(report: Report) -> str:
    """Every operation that not all units may run, or of which there is something to know."""
    told = [r for r in report.eligibility if r.reason]
    if not report.eligibility:
        return ""
    rows = [
        _row((("", _e(r.node)), ("k", _e(r.op)), ("k", _e(", ".join(r.predicted))), ("", _e(r.reason))))
        for r in told[:_LONGEST]
    ]
    head, *_ = sentences.units(report)
    table = _table(("Operation", "", "May run on", "Because"), rows) if rows else ""
    return f"<h2>Compute units, predicted</h2>{_paragraphs([head[:1].upper() + head[1:] + '.'])}{table}{_more(len(told))}"


def _layers(layers: Sequence[LayerRecord]) -> str:
    if not layers:
        return ""
    order = sorted(layers, key=lambda r: r.sqnr_db)
    noise = {r.node: 10 ** (-r.sqnr_db / 10) for r in order}
    total = sum(noise.values()) or 1.0
    rows = [
        _row(
            (
                ("", _e(r.node)),
                ("n", f"{r.sqnr_db:.1f} dB"),
                ("n", _e(sentences.percent(noise[r.node] / total))),
                ("bar", _bar(noise[r.node] / (noise[order[0].node] or 1.0), "o" if r.kept_float else "b")),
                ("k", "float" if r.kept_float else "quantized" if r.bits is None else f"{r.bits} bits"),
            )
        )
        for r in order[:_LONGEST]
    ]
    note = "What quantizing one layer alone does to the outputs: signal to noise (more is better), and its share of all noise."
    return f"<h2>Layers that quantization hurts most</h2>{_paragraphs((note,), 'soft')}{_table(('Layer', '>SQNR', '>Share of noise', '', 'Now'), rows)}{_more(len(order))}"


def _more(length: int) -> str:
    return f"<p class=soft>and {length - _LONGEST} more, in report.json</p>" if length > _LONGEST else ""


def _passes(report: Report) -> str:
    if not report.manifest.passes:
        return "<h2>Passes</h2><p>None: the graph is as it was given.</p>"
    rows = []
    for p in report.manifest.passes:
        seconds = report.pass_seconds.get(p.name)
        rows.append(
            _row(
                (
                    ("k", _e(p.name)),
                    ("n", f"{p.changes:,}"),
                    ("n", f"{p.nodes_before:,}"),
                    (
                        "n",
                        f"{p.nodes_after:,}"
                        + (
                            f" ({p.nodes_after - p.nodes_before:+,})"
                            if p.nodes_after != p.nodes_before
                            else ""
                        ),
                    ),
                    ("n", "" if seconds is None else _e(sentences.milliseconds(seconds * 1e3))),
                )
            )
        )
    return (
        f"<h2>Passes</h2>{_table(('Pass', '>Changes', '>Nodes before', '>Nodes after', '>CPU time'), rows)}"
    )


def _operators(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    if not total:
        return ""
    order = sorted(seconds.items(), key=lambda kv: (-kv[1], kv[0]))
    rows = [(name, value, sentences.percent(value / total), "b") for name, value in order[:_LONGEST]]
    note = "Shares of one run under the runtime's profiler, by the runtime's own operators; profiling itself costs time, so these are shares, not latencies."
    return f"<h2>Where the time goes</h2>{_paragraphs((note,), 'soft')}{_bars(rows)}{_more(len(order))}"


def _left_out(report: Report) -> str:
    lines = sentences.left_out(report.manifest)
    if not lines:
        return ""
    return f"<h2>Left out</h2><p>Programs among which {_e(report.manifest.target)} does not choose, and why</p>{_paragraphs(lines, 'soft')}"


def _evidence(report: Report) -> str:
    rows = [
        _row(
            (
                ("k", f'<span class="{"good" if done else "soft"}">{"done" if done else "not done"}</span>'),
                ("k", _e(name)),
                ("", _e(meaning)),
            )
        )
        for name, meaning, done in sentences.evidence(report.manifest.evidence)
    ]
    left = "".join(f"<li>{_e(step)}</li>" for step in report.manifest.deferred)
    more = f"<p><strong>{_e(sentences.deferred(report))}</strong></p><ul>{left}</ul>" if left else ""
    return f"<h2>Evidence</h2>{_paragraphs(('Each step stands for itself; what says “not done” was not done.',), 'soft')}{_table(('', 'Step', 'What it means'), rows)}{more}"


def _again(report: Report) -> str:
    manifest = report.manifest
    rows = [
        _row(
            (("", _e(f.path)), ("n", _e(sentences.megabytes(f.bytes))), ("", f"<code>{_e(f.sha256)}</code>"))
        )
        for f in manifest.files
    ]
    note = f"With the recipe beside this page (digest {manifest.recipe_digest[:12]}), the same data and the same versions, the files come out the same, byte for byte."
    use = 'import optkit\noutputs = optkit.load("build").run({"input": array})'
    return (
        f"<h2>Again, and in use</h2><pre>{_e(sentences.command(report))}</pre>{_paragraphs((note,), 'soft')}<pre>{_e(use)}</pre>"
        f"{_table(('File', '>Size', 'SHA-256'), rows)}"
    )


def _ceilings(report: Report) -> tuple[str, ...]:
    return () if report.ceilings is None else sentences.peaks(report.ceilings)


def _machine(report: Report) -> str:
    spent, manifest = report.resources, report.manifest
    data = (
        "none"
        if manifest.data is None
        else sentences.count(manifest.data.batches, "batch")
        + (" drawn at random" if manifest.data.random else "")
    )
    rows = [
        *report.machine.items(),
        ("versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())),
        (
            "backend",
            f"{manifest.backend}: "
            + (", ".join(f"{k} = {v}" for k, v in manifest.options.items()) or "defaults"),
        ),
        *((("ceilings" if i == 0 else ""), line) for i, line in enumerate(_ceilings(report))),
        ("calibration data", data),
        (
            "cost",
            f"{spent.cpu_seconds:.1f} CPU-seconds, {spent.wall_seconds:.1f} s, peak memory {sentences.megabytes(spent.peak_rss_bytes)}",
        ),
        *((("loading" if i == 0 else ""), note) for i, note in enumerate(manifest.notes)),
    ]
    return f"<h2>Machine and versions</h2>{_table(('', ''), (_row((('k', _e(name)), ('', _e(value)))) for name, value in rows))}"
