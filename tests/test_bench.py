"""Time here is a clock that the timed callables themselves turn: nothing depends on how fast the machine is."""

from __future__ import annotations

import gc
import itertools
import types

import numpy as np
import pytest

from optkit import bench
from optkit.bench import interleave, race, speedup, timing


class _Clock:
    """CPU time and wall-clock that go on only when something runs."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.calls: list[tuple[str, int]] = []

    def callable(self, name: str, seconds, wall: float = 1.0):
        """Takes the next of ``seconds`` of CPU time, and ``wall`` times as long by the wall."""
        each = itertools.cycle(np.atleast_1d(seconds).tolist())

        def run(feeds):
            took = next(each)
            self.cpu, self.wall = self.cpu + took, self.wall + took * wall
            self.calls.append((name, feeds["x"]))
            return {}

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    fake = types.SimpleNamespace(process_time=lambda: clock.cpu, perf_counter=lambda: clock.wall)
    monkeypatch.setattr(bench, "time", fake)
    return clock


FEEDS = [{"x": i} for i in range(3)]


def _counted(times):
    """What calls take of which ``times`` count: two that warm up, and one before each that counts."""
    return [1.0, 1.0, *itertools.chain.from_iterable((1.0, t) for t in times)]


def test_every_callable_runs_once_a_round_on_the_same_feeds(clock):
    runs = {name: clock.callable(name, 1.0) for name in "abc"}
    times = interleave(runs, FEEDS, rounds=7, warmup=2)
    assert {name: t.shape for name, t in times.items()} == {name: (7, 2) for name in "abc"}
    warm, counted = clock.calls[:6], clock.calls[6:]
    assert warm == [("a", 0), ("b", 0), ("c", 0)] * 2
    rounds = [counted[i : i + 3] for i in range(0, 21, 3)]
    for index, calls in enumerate(rounds):
        assert sorted(name for name, _ in calls) == ["a", "b", "c"]
        assert {x for _, x in calls} == {index % 3}


def test_the_order_within_a_round_is_random_and_the_same_for_a_seed(clock):
    def order(seed):
        clock.calls.clear()
        interleave({n: clock.callable(n, 1.0) for n in "ab"}, FEEDS, rounds=20, warmup=0, seed=seed)
        return [name for name, _ in clock.calls]

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    # Neither always goes first: what the one before leaves in caches falls on both.
    assert 4 <= first[::2].count("a") <= 16


def test_cpu_time_and_wall_clock_are_kept_apart(clock):
    times = interleave({"a": clock.callable("a", [0.5, 1.5], wall=3.0)}, FEEDS, rounds=4, warmup=0)
    assert times["a"].tolist() == [[0.5, 1.5], [1.5, 4.5], [0.5, 1.5], [1.5, 4.5]]


@pytest.mark.parametrize(("budget", "rounds"), [(None, 40), (1000, 40), (20.5, 11), (3, 5), (0, 5)])
def test_a_budget_ends_the_rounds_but_never_before_the_fifth(clock, budget, rounds):
    times = interleave({n: clock.callable(n, 1.0) for n in "ab"}, FEEDS, rounds=40, budget=budget)
    assert {len(t) for t in times.values()} == {rounds}


def test_garbage_is_not_collected_while_the_clock_runs_and_again_afterwards(clock):
    seen = []

    def run(feeds):
        seen.append(gc.isenabled())
        return {}

    interleave({"a": run}, FEEDS, rounds=3, warmup=0)
    assert seen == [False] * 3
    assert gc.isenabled()

    def fails(feeds):
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        interleave({"a": fails}, FEEDS, rounds=3, warmup=0)
    assert gc.isenabled()


def test_a_summary_holds_median_and_percentile_of_cpu_time_and_median_of_the_wall(clock):
    times = np.stack([np.arange(1, 102.0), np.arange(1, 102.0) * 2], 1)
    found = timing(times, warmup=3)
    assert (found.median, found.p99, found.wall, found.runs, found.warmup) == (51, 100, 102, 101, 3)
    # CPU times of several threads add up, so the wall counts.
    assert timing(times, threads=2).median == 102


def test_the_ratio_is_the_median_of_the_ratios_within_rounds(clock):
    reference = [4.0, 9.0, 10.0, 8.0, 100.0]
    candidate = [2.0, 3.0, 5.0, 4.0, 50.0]
    found = speedup(
        clock.callable("a", _counted(reference)),
        clock.callable("b", _counted(candidate)),
        FEEDS,
        rounds=5,
    )
    # 2, 3, 2, 2, 2; of the medians it would be 9 / 4.
    assert found.ratio == 2
    assert 2 <= found.ci95[0] <= found.ratio <= found.ci95[1] <= 3
    assert (found.reference.median, found.candidate.median) == (9, 4)
    assert found.candidate.runs == 5


@pytest.mark.parametrize(("candidate", "runs"), [([2.0], 3), ([1.0], 8), ([2.0, 2.0, 1.0], 8)])
def test_what_is_hopeless_in_every_round_is_timed_no_further(clock, candidate, runs):
    # A single round that is not below 0.8 keeps it in.
    found = speedup(
        clock.callable("a", [1.0]),
        clock.callable("b", _counted(candidate * 8)),
        FEEDS,
        rounds=8,
        hopeless=0.8,
    )
    assert found.candidate.runs == runs


def test_a_machine_that_becomes_slower_meanwhile_does_not_change_the_ratio(clock):
    slower = np.linspace(1, 10, 30)
    warm = [1.0, 1.0]
    found = speedup(
        clock.callable("a", [*warm, *(3 * slower)]),
        clock.callable("b", [*warm, *(2 * slower)]),
        FEEDS,
        rounds=30,
    )
    assert found.ratio == pytest.approx(1.5)
    assert found.ci95 == pytest.approx((1.5, 1.5))


def test_the_interval_holds_the_true_ratio_and_shrinks_with_rounds(clock):
    random, held, widths = np.random.default_rng(0), 0, {10: [], 40: []}
    for trial in range(60):
        for rounds in (10, 40):
            a, b = 2 * random.lognormal(0, 0.1, rounds), random.lognormal(0, 0.1, rounds)
            found = speedup(
                clock.callable("a", _counted(a)),
                clock.callable("b", _counted(b)),
                FEEDS,
                rounds=rounds,
                seed=trial,
            )
            widths[rounds].append(found.ci95[1] - found.ci95[0])
            held += found.ci95[0] <= 2 <= found.ci95[1]
    # 95 % of 120, less three standard deviations of a count; a bootstrap of a median is a little short with 10 rounds.
    assert held / 120 >= 0.88
    assert np.mean(widths[40]) < 0.7 * np.mean(widths[10])


@pytest.mark.parametrize(
    ("wall", "threads", "loaded"), [(1.0, 1, False), (1.15, 1, False), (1.3, 1, True), (0.5, 4, False)]
)
def test_a_wall_clock_that_runs_ahead_tells_of_other_users(clock, wall, threads, loaded):
    runs = [clock.callable(n, 1.0, wall=wall) for n in "ab"]
    assert speedup(*runs, FEEDS, rounds=5, threads=threads).loaded == loaded


def test_a_candidate_below_the_resolution_of_the_clock_gives_a_finite_ratio(clock):
    found = speedup(clock.callable("a", 1e-6), clock.callable("b", 0.0), FEEDS, rounds=5)
    assert np.isfinite(found.ratio)


def test_a_race_gives_each_its_ratio_to_the_reference_from_the_same_rounds(clock):
    reference = clock.callable("reference", 6.0)
    candidates = [clock.callable("a", 3.0), clock.callable("b", 2.0)]
    found = race(reference, candidates, FEEDS, rounds=8)
    assert [s.ratio for s in found] == [2.0, 3.0]
    assert [s.candidate.median for s in found] == [3.0, 2.0]
    rounds = [[name for name, _ in clock.calls[i : i + 6]] for i in range(6, len(clock.calls), 6)]
    assert len(rounds) == 8
    for calls in rounds:
        # Each right behind a call of its own, which finds the caches as others left them.
        assert calls[::2] == calls[1::2]
        assert sorted(calls[::2]) == ["a", "b", "reference"]
