"""Tables, and the summary of a compilation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optkit import sentences

if TYPE_CHECKING:
    from rich.table import Table

    from optkit.cli.terminal import Terminal
    from optkit.report import Report

# Reasons why operations may not run on the best unit of a target that the summary tells.
_REASONS = 4
# Programs that were left out, of which it tells why.
_LEFT_OUT = 4


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table; columns whose heading starts with ``>`` are numbers and aligned to the right."""
    from rich import box
    from rich.table import Table

    rows = list(rows)
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    # Short names stay whole where a terminal is narrow.
    whole = max((len(row[0]) for row in rows), default=0) <= 30
    for index, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=side, overflow="fold", no_wrap=whole and index == 0)
    for row in rows:
        made.add_row(*row)
    return made


def facts(rows: Iterable[tuple[str, Sequence[str]]]) -> Table:
    """Names on the left, and a line or more for each on the right."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2), pad_edge=False)
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for name, lines in rows:
        for index, line in enumerate(lines):
            made.add_row(name if index == 0 else "", line)
    return made


def summary(report: Report, folder: Path) -> list[str | Table]:
    """What a stranger has to know after a compilation."""
    manifest, one = report.manifest, sentences.shipped(report)
    rows: list[tuple[str, Sequence[str]]] = []
    if one is not None:
        rows.append(("Shipped", (one.name + (f": {one.reason}" if one.reason else ""),)))
    rows.append(("Model", (sentences.size(report),)))
    if manifest.mode is not None:
        rows.append(("Mode", (manifest.mode,)))
    if report.latency is not None:
        rows.append(("Latency", sentences.latency(report.latency)))
    else:
        rows.append(("Latency", sentences.untimed(report)))
    if report.scenario is not None:
        rows.append(("Cores", sentences.scenario(report.scenario)))
    if manifest.accuracy is not None:
        rows.append(("Accuracy", (*sentences.accuracy(manifest.accuracy), *sentences.predicted(report))))
    if manifest.fidelity is not None:
        rows.append(("Fidelity", (*sentences.fidelity(manifest.fidelity), *sentences.predicted(report))))
    if lines := sentences.saturation(report):
        rows.append(("Saturation", lines))
    rows.append(("Formats", sentences.formats(report)))
    if lines := sentences.units(report):
        rows.append(("Units", lines[:_REASONS]))
    if chosen := sentences.bits(report):
        rows.append(("Weights", chosen))
    if kept := sentences.kept_float(report):
        rows.append(
            (
                "In float",
                (
                    f"{len(kept)} of {len(report.layers)} layers, because quantizing them hurts most: {_some(kept)}",
                ),
            )
        )
    if lines := sentences.left_out(manifest):
        rows.append(
            (
                "Left out",
                (
                    *lines[:_LEFT_OUT],
                    *(
                        [f"and {len(lines) - _LEFT_OUT} more, in the report"]
                        if len(lines) > _LEFT_OUT
                        else []
                    ),
                ),
            )
        )
    if not manifest.evidence.ran_on_device:
        rows.append(("Evidence", sentences.gathered(manifest.evidence)))
    if manifest.data is not None:
        drawn = (
            "; drawn at random: nothing that was measured on them says how good the model is"
            if manifest.data.random
            else ""
        )
        rows.append(("Data", (f"{sentences.count(manifest.data.batches, 'calibration batch')}{drawn}",)))
    spent = report.resources
    rows.append(
        (
            "Cost",
            (
                f"{spent.cpu_seconds:.1f} CPU-seconds, {spent.wall_seconds:.1f} s, peak memory {sentences.megabytes(spent.peak_rss_bytes)}",
            ),
        )
    )
    for name, lines in (
        ("Notes", manifest.notes),
        ("Missed", report.missed),
        ("Undecided", report.inconclusive),
        ("Advice", report.advice),
    ):
        if lines:
            rows.append((name, lines))
    parts: list[str | Table] = [sentences.headline(report), ""]
    if len(report.candidates) > 1:
        parts += [*candidates(report), ""]
    end: list[str | Table] = ["", sentences.outcome(report), f"Report: {folder / 'report.html'}"]
    if manifest.deferred:
        end += [sentences.deferred(report), *(f"  {step}" for step in manifest.deferred)]
    return [*parts, facts(rows), *end]


def candidates(report: Report) -> list[str | Table]:
    """Everything that was tried, the artifact first; and why what did not ship did not."""
    order = sorted(report.candidates, key=lambda c: (c.verdict != sentences.SHIPPED, -(c.speedup or 0)))
    judged = any(c.metric is not None for c in order)
    accuracy = report.manifest.accuracy
    name = (
        (f">{accuracy.metric if accuracy is not None else 'metric'}", ">Drop", ">At most")
        if judged
        else (">Cosine",)
    )
    rows = [
        (
            c.name,
            "" if c.speedup is None else f"{c.speedup:.2f}x",
            "" if c.bytes is None else sentences.megabytes(c.bytes),
            *sentences.metric(c)[: 3 if judged else 1],
            c.verdict,
        )
        for c in order
    ]
    parts: list[str | Table] = [table(("Candidate", ">Speed-up", ">Size", *name, "Verdict"), rows)]
    reasons = [(c.name, (c.reason,)) for c in order if c.reason and c.verdict != sentences.SHIPPED]
    return [*parts, "", facts(reasons)] if reasons else parts


def _some(names: Sequence[str], most: int = 6) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def show(terminal: Terminal, parts: Iterable[str | Table]) -> None:
    """Print to stderr."""
    for part in parts:
        terminal.say(part)
