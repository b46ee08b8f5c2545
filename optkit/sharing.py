"""How an artifact shares the cores of this machine: threads for one request at a time, or streams for many, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.bench import interleave, median_ratio, rates
from optkit.graph import weight_bytes
from optkit.reference import LARGE, ReferenceSession
from optkit.report import ScenarioRecord, Tried
from optkit.targets import host

if TYPE_CHECKING:
    from optkit.candidate import Built
    from optkit.compilation import Compilation
    from optkit.evaluate import Run
    from optkit.recipe import Recipe

# Threads in all, and streams that share them.
Way = tuple[int, int]
# How much better the second way is than the first, with the interval.
Gain = Callable[[Way, Way], tuple[float, tuple[float, float]]]

# More threads are taken where they gain at least this: they are cores that others cannot use.
_WORTH = 1.1
# More streams are taken where they gain at least this: throughput is what was asked for.
_MORE = 1.03
_ROUNDS, _SECONDS = 20, 3.0
_OFFLINE_ROUNDS, _OFFLINE_SECONDS = 5, 0.3
# MLPerf's SingleStream reports the 90th percentile.
_PERCENTILE = 90


def counts(most: int) -> list[int]:
    """1, 2, 4 ... and ``most``."""
    found = [1]
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return found if most == 1 else [*found, most]


def share(work: Compilation, recipe: Recipe, best: Built) -> ScenarioRecord | None:
    """Choose the threads of ``best`` or, where throughput is the goal, its streams; its options are changed accordingly.

    What the caller's own options fix is measured and not changed. None for targets that are not at hand, and for backends
    whose threads cannot be set.
    """
    engine, options = work.resolved(best.recipe)
    if not work.target.runs_here:
        return None
    fixed = bool(recipe.options.get("threads", 0)) or recipe.options.get("streams", 0) > 1
    offline = recipe.goal == "throughput"
    ways: dict[Way, Any] = {}
    if fixed:
        threads, streams = engine.parallelism(options)
        ways[threads or host.cores(), streams] = options
    else:
        for n in counts(host.cores()):
            way = (n, n if offline else 1)
            ways[way] = engine.parallel(options, threads=way[0], streams=way[1])
    if None in ways.values():
        return None
    source = work.loaded.original
    large = weight_bytes(work.loaded.model) > LARGE
    with work.progress.task("try streams" if offline else "try threads"), ExitStack() as stack:
        reference = stack.enter_context(
            closing(
                ReferenceSession(source, threads=host.cores(), large=large, precise=not work.target.saturates)
            )
        )
        sessions = {
            pair: stack.enter_context(engine.load(best.folder, work.target, ways[pair])) for pair in ways
        }
        runs = {pair: session.run for pair, session in sessions.items()}
        record = (_offline if offline else _single)(work, reference.run, runs, fixed)
    if not fixed:
        chosen = ways[record.threads, record.streams]
        best.recipe = best.recipe.model_copy(update={"options": chosen.model_dump(mode="json")})
    return record


def _single(work: Compilation, reference: Run, runs: Mapping[Way, Run], fixed: bool) -> ScenarioRecord:
    """One request at a time."""
    named = {"reference": reference, **{str(way): run for way, run in runs.items()}}
    found = interleave(named, work.feeds, rounds=_ROUNDS, budget=_SECONDS * len(named), seed=work.seed)
    wall = {way: found[str(way)][:, 1] for way in runs}
    best = _best(runs, lambda a, b: median_ratio(wall[a], wall[b], seed=work.seed), _WORTH)
    first = found[str(next(iter(runs)))]
    ratio, ci95 = median_ratio(found["reference"][:, 1], wall[best], seed=work.seed)
    tried = {way: float(np.percentile(times, _PERCENTILE)) * 1e3 for way, times in wall.items()}
    return ScenarioRecord(
        scenario="SingleStream", threads=best[0], streams=best[1], candidate=tried[best],
        reference=float(np.percentile(found["reference"][:, 1], _PERCENTILE)) * 1e3, speedup=ratio, ci95=ci95, fixed=fixed,
        tried=tuple(Tried(threads=t, streams=s, value=v) for (t, s), v in tried.items()), loaded=_loaded(first),
    )  # fmt: skip


def _offline(work: Compilation, reference: Run, runs: Mapping[Way, Run], fixed: bool) -> ScenarioRecord:
    """As many requests at a time as there are streams."""
    first = interleave({"first": next(iter(runs.values()))}, work.feeds, rounds=5)["first"]
    named = {"reference": (reference, 1), **{str(way): (run, way[1]) for way, run in runs.items()}}
    found = rates(named, work.feeds, rounds=_OFFLINE_ROUNDS, seconds=_OFFLINE_SECONDS, seed=work.seed)
    best = _best(runs, lambda a, b: median_ratio(found[str(b)], found[str(a)], seed=work.seed), _MORE)
    ratio, ci95 = median_ratio(found[str(best)], found["reference"], seed=work.seed)
    tried = {way: float(np.median(found[str(way)])) for way in runs}
    return ScenarioRecord(
        scenario="Offline", threads=best[0], streams=best[1], candidate=tried[best],
        reference=float(np.median(found["reference"])), speedup=ratio, ci95=ci95, fixed=fixed,
        tried=tuple(Tried(threads=t, streams=s, value=v) for (t, s), v in tried.items()), loaded=_loaded(first),
    )  # fmt: skip


def _best(ways: Iterable[Way], gain: Gain, worth: float) -> Way:
    """The first way, unless a later one is ``worth`` times better than the best before it, with its interval above 1."""
    best, *others = ways
    for way in others:
        ratio, (low, _) = gain(best, way)
        if ratio >= worth and low > 1:
            best = way
    return best


def _loaded(times: np.ndarray) -> bool:
    """Whether wall-clock ran more than 20 % ahead of the CPU time of what runs on one thread."""
    return float(np.median(times[:, 1])) > 1.2 * float(np.median(times[:, 0]))
