"""``optkit bench``: how long a run takes, alone or in turn with another model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command
from optkit.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from optkit.bench import Timing

# Different batches that the runs take in turn.
_BATCHES = 4
_SCENARIOS = ("single-stream", "offline")
# Rounds of offline, and the seconds of each.
_ROUNDS, _SECONDS = 7, 0.5


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
    scenario: Annotated[
        str,
        typer.Option(
            "--scenario",
            metavar="NAME",
            help="single-stream: one request at a time; offline: samples per second of many.",
        ),
    ] = "single-stream",
    streams: Annotated[
        int | None,
        typer.Option(
            "--streams",
            metavar="N",
            min=1,
            help="Requests at the same time, on one thread each; for offline.",
            show_default="one a core",
        ),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", metavar="N", min=5, help="Counted runs of each.")] = 40,
    json: options.Json = False,
) -> int:
    """Time MODEL on this machine: median and 99th percentile, after warm-up; or samples per second.

    The scenarios are MLPerf's, for seconds instead of minutes. On one thread CPU time counts, which others on the machine do not stretch; on several, wall-clock time. With
    --against both are timed in turn and the ratio is given with a 95% interval.
    """  # fmt: skip
    from optkit import sentences
    from optkit.bench import interleave, speedup, timing
    from optkit.cli.render import table
    from optkit.cli.running import feeds, opened
    from optkit.data import spelled

    if scenario.lower() not in _SCENARIOS:
        raise UnknownNameError("scenario", scenario, _SCENARIOS)
    offline = scenario.lower() == "offline"
    if streams is not None and not offline:
        raise UsageError(
            "--streams is for --scenario offline", hint="--threads sets the threads of one request"
        )
    if offline and threads != 1:
        raise UsageError(
            "--threads is for --scenario single-stream", hint="--streams N runs N requests on one thread each"
        )
    batches, inputs = feeds(model, calib, shape or (), batch, _BATCHES)
    if offline:
        names = [name for name in (model, against) if name is not None]
        _offline(terminal, names, batches, inputs, streams, as_json=json)
        return 0
    clock = "CPU time" if threads == 1 else "wall-clock time"
    with ExitStack() as stack:
        one = stack.enter_context(opened(model, threads=threads, timed=True))
        if against is None:
            found = None
            with terminal.progress.task("time"):
                times = interleave({"model": one.run}, batches, rounds=runs)["model"]
            rows = {model: timing(times, threads=threads)}
        else:
            other = stack.enter_context(opened(against, threads=threads, timed=True))
            with terminal.progress.task("time"):
                found = speedup(other.run, one.run, batches, rounds=runs, threads=threads)
            rows = {against: found.reference, model: found.candidate}
    if json:
        document: dict[str, Any] = {
            "scenario": "SingleStream",
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
            f"{model}: {found.ratio:.2f}x the speed of {against} ({sentences.interval(found.ci95)}), the median of pairs"
        )
    terminal.say(
        f"measured on this machine, {sentences.count(threads, 'thread')}, {clock}; inputs {spelled(batches[0])}, {inputs}"
    )
    if found is not None and found.loaded:
        terminal.say("others were using the machine: trust the ratio more than the times")
    return 0


def _offline(
    terminal: Terminal,
    names: Sequence[str],
    batches: Sequence[Mapping[str, np.ndarray]],
    inputs: str,
    streams: int | None,
    *,
    as_json: bool,
) -> None:
    """Samples per second of one model, or of two in turn."""
    from optkit import sentences
    from optkit.bench import median_ratio, rates, samples
    from optkit.cli.render import table
    from optkit.cli.running import opened
    from optkit.data import spelled
    from optkit.targets.host import cores

    count = streams or cores()
    with ExitStack() as stack:
        runs = {
            name: (stack.enter_context(opened(name, streams=count, timed=True)).run, count) for name in names
        }
        with terminal.progress.task("time"):
            found = rates(runs, batches, rounds=_ROUNDS, seconds=_SECONDS)
    middle = {name: median(r.tolist()) for name, r in found.items()}
    ratio = median_ratio(found[names[0]], found[names[1]]) if len(names) > 1 else None
    if as_json:
        document: dict[str, Any] = {
            "scenario": "Offline", "streams": count, "clock": "wall-clock time", "inputs": spelled(batches[0]), "data": inputs,
            "batch": samples(batches[0]),
        }  # fmt: skip
        for key, name in zip(("model", "against"), names, strict=False):
            document[key] = {"name": name, "samples_per_second": middle[name], "rounds": _ROUNDS}
        if ratio is not None:
            document |= {"speedup": ratio[0], "ci95": ratio[1]}
        terminal.json(document)
        return
    rows = [(name, f"{middle[name]:,.4g}", str(_ROUNDS)) for name in reversed(names)]
    terminal.result(table(("Model", ">Samples/s", ">Rounds"), rows))
    if ratio is not None:
        terminal.result("")
        terminal.result(
            f"{names[0]}: {ratio[0]:.2f}x the throughput of {names[1]} ({sentences.interval(ratio[1])})"
        )
    terminal.say(
        f"Offline, measured on this machine, {sentences.count(count, 'stream')} of one thread, wall-clock time; "
        f"inputs {spelled(batches[0])}, {inputs}"
    )


def _milliseconds(t: Timing) -> dict[str, float | int]:
    fields = asdict(t)
    return {f"{name}_ms": fields[name] * 1e3 for name in ("median", "p99", "wall")} | {
        "runs": t.runs,
        "warmup": t.warmup,
    }
