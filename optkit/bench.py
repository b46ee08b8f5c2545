"""Time two things fairly on a machine that others use too: in turn, in one process, by CPU time, as a ratio."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from optkit.evaluate import Run

# Two sessions of the same file differ by up to this share: where their memory lies decides what collides in the caches.
NOISE = 0.02
# Uncounted calls right before each counted one, where two are compared: a model that runs for itself finds the caches as it
# left them, and not full of what another computed. Integers in OpenVINO lose a tenth of their speed to the difference.
_SETTLE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: Of CPU time, which a busy machine does not stretch; with several threads, whose CPU times add up, of
            wall-clock time.
        p99: 99th percentile of the same.
        wall: Median of wall-clock time.
        runs: Counted calls, after ``warmup`` others.
    """

    median: float
    p99: float
    wall: float
    runs: int
    warmup: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """Reference time over candidate time.

    Attributes:
        ratio: Median over rounds of the ratio within a round.
        ci95: 95 % interval of that median, from a bootstrap over rounds.
        loaded: Whether wall-clock ran more than 20 % ahead of CPU time: others used the machine.
    """

    reference: Timing
    candidate: Timing
    ratio: float
    ci95: tuple[float, float]
    threads: int
    loaded: bool


def interleave(
    runs: Mapping[str, Run],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    rounds: int,
    warmup: int = 2,
    settle: int = 0,
    seed: int = 0,
    budget: float | None = None,
    decided: Callable[[Mapping[str, np.ndarray]], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Time every callable once a round, in random order, all on the same feeds.

    Args:
        feeds: Inputs, taken in turn, one a round.
        rounds: Counted rounds; fewer, but at least 5, when ``budget`` CPU seconds are used up.
        settle: Uncounted calls right before each counted one: with many callables in turn, each finds the caches full of the
            others' weights, which costs small models more than large ones.
        decided: Asked after each round from the third on, with what will be returned: whether that is enough.

    Returns:
        ``[rounds, 2]`` seconds for each name: CPU time and wall-clock.
    """
    for _ in range(warmup):
        for run in runs.values():
            run(feeds[0])
    calls = {name: partial(clock, run, feeds, settle=settle) for name, run in runs.items()}
    share = None if budget is None else budget / (1 + settle)
    collecting = gc.isenabled()
    gc.disable()
    try:
        return alternate(calls, rounds=rounds, seed=seed, budget=share, decided=decided)
    finally:
        if collecting:
            gc.enable()


def alternate(
    calls: Mapping[str, Callable[[int], tuple[float, float]]],
    *,
    rounds: int,
    seed: int = 0,
    budget: float | None = None,
    decided: Callable[[Mapping[str, np.ndarray]], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Call each once a round, in random order, with the number of the round; what they return, CPU time and wall-clock, as arrays.

    Args:
        budget: CPU seconds, of those returned, after which no more rounds are begun; there are at least 5.
        decided: As for ``interleave``.
    """
    rng, names = np.random.default_rng(seed), list(calls)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    spent = 0.0
    for index in range(rounds):
        for k in rng.permutation(len(names)):
            one = calls[names[k]](index)
            times[names[k]].append(one)
            spent += one[0]
        if index >= 2 and decided is not None and decided({k: np.asarray(t) for k, t in times.items()}):
            break
        if budget is not None and index >= 4 and spent > budget:
            break
    return {name: np.asarray(t) for name, t in times.items()}


def clock(
    run: Callable[[Mapping[str, np.ndarray]], object],
    feeds: Sequence[Mapping[str, np.ndarray]],
    index: int,
    *,
    settle: int = 0,
) -> tuple[float, float]:
    """CPU time and wall-clock of a call on the feeds of round ``index``, after ``settle`` calls that are not counted."""
    given = feeds[index % len(feeds)]
    for _ in range(settle):
        run(given)
    wall, cpu = time.perf_counter(), time.process_time()
    run(given)
    return time.process_time() - cpu, time.perf_counter() - wall


def timing(times: np.ndarray, warmup: int = 2, *, threads: int = 1) -> Timing:
    """Summarize ``[rounds, 2]`` seconds."""
    clock = times[:, 0 if threads == 1 else 1]
    return Timing(
        median=float(np.median(clock)),
        p99=float(np.percentile(clock, 99)),
        wall=float(np.median(times[:, 1])),
        runs=len(times),
        warmup=warmup,
    )


def speedup(
    reference: Run,
    candidate: Run,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    rounds: int = 30,
    threads: int = 1,
    budget: float | None = None,
    seed: int = 0,
    hopeless: float = 0.0,
) -> Speedup:
    """How much faster ``candidate`` is than ``reference``, measured in turn.

    Args:
        hopeless: No more is measured of what stays below this ratio in each of the first rounds.
    """
    clock = 0 if threads == 1 else 1

    def decided(times: Mapping[str, np.ndarray]) -> bool:
        return bool((times["reference"][:, clock] < hopeless * times["candidate"][:, clock]).all())

    runs = {"reference": reference, "candidate": candidate}
    times = interleave(runs, feeds, rounds=rounds, settle=_SETTLE, budget=budget, seed=seed, decided=decided)
    return _compared(times["reference"], times["candidate"], threads=threads, seed=seed)


def race(
    reference: Run,
    candidates: Sequence[Run],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    rounds: int = 30,
    budget: float | None = None,
    seed: int = 0,
) -> list[Speedup]:
    """As ``speedup`` on one thread, with all candidates in turn: their ratios may be compared with one another."""
    runs = {"reference": reference} | {f"candidate {k}": run for k, run in enumerate(candidates)}
    times = interleave(runs, feeds, rounds=rounds, settle=_SETTLE, budget=budget, seed=seed)
    first, *others = times.values()
    return [_compared(first, times, threads=1, seed=seed) for times in others]


def _compared(a: np.ndarray, b: np.ndarray, *, threads: int, seed: int) -> Speedup:
    """How much faster ``b`` is than ``a``, each ``[rounds, 2]`` seconds."""
    clock = 0 if threads == 1 else 1
    ratio, ci95 = median_ratio(a[:, clock], b[:, clock], seed=seed)
    wall, cpu = float(np.median(a[:, 1])), float(np.median(a[:, 0]))
    return Speedup(
        reference=timing(a, threads=threads), candidate=timing(b, threads=threads), ratio=ratio, ci95=ci95, threads=threads,
        loaded=threads == 1 and wall > 1.2 * cpu,
    )  # fmt: skip


def samples(feeds: Mapping[str, np.ndarray]) -> int:
    """How many samples a batch holds: the first axis of its first input that has one."""
    return next((len(x) for x in feeds.values() if np.ndim(x) > 0), 1)


def rate(run: Run, feeds: Sequence[Mapping[str, np.ndarray]], *, streams: int, seconds: float) -> float:
    """Samples a second of wall-clock time with ``streams`` requests in flight, each batch as soon as the one before is done.

    Args:
        run: May be called by several threads at the same time.
        feeds: Inputs, which every stream takes in turn.
        seconds: How long requests are started; those in flight are then finished and count, with the time that they take.

    What a run raises ends the measurement.
    """
    gate = threading.Barrier(streams + 1)

    def work(stream: int) -> int:
        gate.wait()
        end, done = time.perf_counter() + seconds, 0
        for index in itertools.count(stream):
            run(feeds[index % len(feeds)])
            done += samples(feeds[index % len(feeds)])
            if time.perf_counter() >= end:
                break
        return done

    with ThreadPoolExecutor(streams) as pool:
        working = [pool.submit(work, k) for k in range(streams)]
        gate.wait()
        start = time.perf_counter()
        total = sum(w.result() for w in working)
        return total / (time.perf_counter() - start)


def rates(
    runs: Mapping[str, tuple[Run, int]],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    rounds: int = 5,
    seconds: float = 0.3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The ``rate`` of every run, with its number of streams, once a round, in random order.

    Returns:
        ``[rounds]`` samples a second for each name.
    """
    rng, names = np.random.default_rng(seed), list(runs)
    for run, _ in runs.values():
        run(feeds[0])
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for k in rng.permutation(len(names)):
            run, streams = runs[names[k]]
            found[names[k]].append(rate(run, feeds, streams=streams, seconds=seconds))
    return {name: np.asarray(r) for name, r in found.items()}


def median_ratio(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median over rounds of ``a / b`` within a round, and its 95 % interval from a bootstrap over rounds."""
    ratios = a / np.maximum(b, 1e-9)
    rng = np.random.default_rng(seed)
    medians = np.median(ratios[rng.integers(len(ratios), size=(1000, len(ratios)))], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(ratios)), (float(low), float(high))
