"""``optkit bench``: how long a run takes, alone or in turn with another model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

if TYPE_CHECKING:
    from optkit.bench import Timing

# Different batches that the runs take in turn.
_BATCHES = 4


@command
def bench(
    terminal: Terminal,
    model: options.ModelOrArtifact,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Time this model or artifact in turn with it.",
            show_default=False,
        ),
    ] = None,
    calib: options.Calib = None,
    shape: options.Shape = None,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="Size of a free first axis, without data.")
    ] = 1,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", min=1, help="Threads of one operator.")
    ] = 1,
    runs: Annotated[int, typer.Option("--runs", metavar="N", min=5, help="Counted runs of each.")] = 40,
    json: options.Json = False,
) -> int:
    """Time MODEL on this machine: median and 99th percentile, after warm-up.

    On one thread CPU time counts, which others on the machine do not stretch; on several, wall-clock time. With
    --against both are timed in turn and the ratio is given with a 95% interval.
    """  # fmt: skip
    from optkit import sentences
    from optkit.bench import interleave, speedup, timing
    from optkit.cli.render import table
    from optkit.cli.running import feeds, opened, spelled

    batches, inputs = feeds(model, calib, shape or (), batch, _BATCHES)
    clock = "CPU time" if threads == 1 else "wall-clock time"
    with ExitStack() as stack:
        one = stack.enter_context(opened(model, threads=threads))
        if against is None:
            found = None
            with terminal.progress.task("time"):
                times = interleave({"model": one.run}, batches, rounds=runs)["model"]
            rows = {model: timing(times, threads=threads)}
        else:
            other = stack.enter_context(opened(against, threads=threads))
            with terminal.progress.task("time"):
                found = speedup(other.run, one.run, batches, rounds=runs, threads=threads)
            rows = {against: found.reference, model: found.candidate}
    if json:
        document: dict[str, Any] = {
            "threads": threads,
            "clock": clock,
            "inputs": spelled(batches[0]),
            "data": inputs,
        }
        document |= {"model": {"name": model, **_milliseconds(rows[model])}}
        if found is not None and against is not None:
            document |= {
                "against": {"name": against, **_milliseconds(rows[against])},
                "speedup": found.ratio,
                "ci95": found.ci95,
                "loaded": found.loaded,
            }
        terminal.json(document)
        return 0
    shown = [
        (name, sentences.milliseconds(t.median * 1e3), sentences.milliseconds(t.p99 * 1e3), sentences.milliseconds(t.wall * 1e3), str(t.runs))
        for name, t in rows.items()
    ]  # fmt: skip
    terminal.result(table(("Model", ">Median", ">99th percentile", ">Wall-clock", ">Runs"), shown))
    if found is not None:
        terminal.result("")
        terminal.result(
            f"{model}: {found.ratio:.2f}x the speed of {against} ({sentences.interval(found.ci95)})"
        )
    terminal.say(
        f"measured on this machine, {sentences.count(threads, 'thread')}, {clock}; inputs {spelled(batches[0])}, {inputs}"
    )
    if found is not None and found.loaded:
        terminal.say("others were using the machine: trust the ratio more than the times")
    return 0


def _milliseconds(t: Timing) -> dict[str, float | int]:
    fields = asdict(t)
    return {f"{name}_ms": fields[name] * 1e3 for name in ("median", "p99", "wall")} | {
        "runs": t.runs,
        "warmup": t.warmup,
    }
