"""Choose among candidates by measurement: the fastest that keeps the limits, with float32 as the floor."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optkit.bench import NOISE
from optkit.candidate import CLEARLY, RANK, Built, losses, ratio, shortfalls
from optkit.errors import BackendUnavailableError, ModelError, OptkitError, PassError, UnsupportedOpError
from optkit.graph import digest
from optkit.recipe import Recipe
from optkit.repair import repair
from optkit.report import CandidateRecord

if TYPE_CHECKING:
    from optkit.compilation import Compilation

logger = logging.getLogger(__name__)

# Rounds of the last measurement, and the CPU seconds that it may take.
_FINAL = (40, 3.0)
# Candidates whose speeds differ by less are alike, as measurements repeat: the more accurate one is taken.
_ALIKE = 1 + NOISE
# What the ranking puts this close to the fastest is timed once more, with the backend's other options, which may gain as much:
# so many at most, all in turn, over so many rounds, in so many CPU seconds, as long as their files together have no more bytes
# than that.
_CLOSE, _RACERS, _RACE, _TOGETHER = 1.25, 4, (30, 8.0), 1 << 30
# Other options are taken when they are faster by this factor: they cost nothing.
_WORTH = 1 + NOISE / 2
# What is below this share of the fastest so far is not timed further.
_BEHIND = 0.8
# Share of the speed of a candidate that the samples leave undecided, for which one that they do not is taken.
_PROVEN = 0.9
# CPU seconds that one evaluation may take for candidates that are as fast to be evaluated too.
_CHEAP = 8.0


@dataclass(slots=True)
class Choice:
    """The outcome.

    Attributes:
        best: What ships.
        records: One line for each thing that was tried.
        missed: Limits that the asked-for recipe did not keep, in words.
        inconclusive: Gates that the data did not decide, in words.
    """

    best: Built
    records: list[CandidateRecord] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    inconclusive: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def choose(
    work: Compilation, recipe: Recipe, recipes: Sequence[tuple[str, Recipe]], *, strict: bool
) -> Choice:
    """Build, time and judge ``recipes``; the first is exact and is the floor.

    Hardware that computes in integers alone has no floor: of what was quantized for it, the closest ships where nothing keeps the limits.
    Candidates are judged in the order of their measured speed, those alike in speed by how close their outputs are to
    the reference's, so that the metric is computed for few of them; the first that keeps the limits ships. One that
    misses a limit is repaired, where the recipe allows it: the layers that hurt most go back to float.

    Raises:
        OptkitError: Why the floor cannot be built; where there is none, why that candidate cannot which comes nearest to it.
    """
    tried: dict[str, CandidateRecord] = {}
    built, floor = _build_all(work, recipes, tried)
    if floor is None:
        # Layers that go back to float are refused.
        recipe = recipe.model_copy(update={"repair": False})
    order = _raced(work, sorted(built, key=lambda b: -ratio(b)))
    needed = built[0] if floor is not None or len(built) == 1 else None
    best = _first_within_limits(work, recipe, order, floor, needed, tried, strict=strict)
    missed: list[str] = []
    if best is not None:
        best = _more_accurate(work, recipe, best, order, strict=strict)
        best = _proven(work, recipe, best, order, tried)
    else:
        best = floor if floor is not None else max(built, key=_kept)
        missed = shortfalls(best, recipe, strict=strict)
    ranked = ratio(best)
    best.speedup = work.measure(best, rounds=_FINAL[0], budget=_FINAL[1])
    if floor is not None and floor in order and _gives_way(work, recipe, best, floor, strict=strict):
        order[order.index(floor)], best = best, floor
        ranked = ratio(best)
    for one in order:
        tried[one.name] = _passed_over(one, best, ranked)
    if best.speedup is not None and _too_slow(best, recipe) and not recipe.limits.min_speedup > 1:
        best = _as_given(work, best, recipe, tried)
    tried[best.name] = _record(best.name, best, "shipped", "")
    return _settled(best, list(tried.values()), missed + _too_slow(best, recipe), strict)


def _build_all(
    work: Compilation, recipes: Sequence[tuple[str, Recipe]], tried: dict[str, CandidateRecord]
) -> tuple[list[Built], Built | None]:
    """What can be built and says something of its own, timed roughly; and the floor, or None where the target refuses it.

    Raises:
        OptkitError: As ``choose``.
    """
    built: list[Built] = []
    refused: list[UnsupportedOpError] = []
    for name, candidate in recipes:
        try:
            first = not (built or refused)
            one = _floor(work, name, candidate, tried) if first else work.build(name, candidate)
            if built and not one.lossy and not candidate.exact:
                tried[name] = _record(name, one, "not needed", "it found nothing to quantize")
                continue
            if any(_same(one, other) for other in built):
                tried[name] = _record(name, one, "not needed", "the same file as an earlier candidate")
                continue
            _rank(work, one, built)
        except OptkitError as error:
            if isinstance(error, UnsupportedOpError) and work.target.floatless:
                refused.append(error)
                tried[name] = _record(name, None, "failed", str(error))
                continue
            if not built:
                raise
            tried[name] = _left_out(name, error)
            continue
        built.append(one)
    if not built:
        raise min(refused, key=lambda e: len(e.problems))
    return built, None if refused else built[0]


def _first_within_limits(
    work: Compilation, recipe: Recipe, order: list[Built], floor: Built | None, needed: Built | None,
    tried: dict[str, CandidateRecord], *, strict: bool,
) -> Built | None:  # fmt: skip
    """Judge candidates in turn until one keeps the limits, and take those judged out of ``order``.

    Args:
        needed: What there is nothing to put in place of: that it cannot be judged is an error.
    """
    while order:
        one = _next(work, order)
        order.remove(one)
        reasons = []
        if one.accuracy is None and one.fidelity is None:
            try:
                _tune(work, [one])
                work.judge(one, recipe.limits)
            except OptkitError as error:
                # What it gives cannot be judged: NaN, or nothing that the evaluator understands.
                if one is needed:
                    raise
                logger.warning("%s: left out: %s", one.name, error)
                tried[one.name] = _record(one.name, one, "failed", str(error))
                continue
            reasons = shortfalls(one, recipe, strict=strict)
            if recipe.goal == "size" and one is not floor:
                # The order is not that of speed, so the smallest may be too slow.
                reasons += _too_slow(one, recipe)
        if not reasons:
            return one
        tried[one.name] = _record(one.name, one, "missed", "; ".join(reasons))
        logger.info("%s: %s", one.name, "; ".join(reasons))
        if floor is not None and recipe.repair and one.lossy and losses(one, recipe, strict=strict):
            fixed = repair(work, recipe, one, strict=strict, faster_than=ratio(floor))
            if fixed is not None:
                # It goes back into the line: what comes next may be faster than the repaired one.
                order[:] = sorted([*order, fixed], key=lambda b: -ratio(b))
    return None


def _gives_way(work: Compilation, recipe: Recipe, best: Built, floor: Built, *, strict: bool) -> bool:
    """Whether the last measurement finds ``best``, which changes numbers, no faster than the floor: noise had put it ahead."""
    if not best.lossy or recipe.goal == "size" or _clearly_faster(best, floor):
        return False
    floor.speedup = work.measure(floor, rounds=_FINAL[0], budget=_FINAL[1])
    if _clearly_faster(best, floor):
        return False
    try:
        work.judge(floor, recipe.limits)
    except OptkitError as error:
        logger.warning("%s: left out: %s", floor.name, error)
        return False
    return not shortfalls(floor, recipe, strict=strict)


def _clearly_faster(one: Built, other: Built) -> bool:
    """Whether more than noise speaks for ``one``; without measurements, the order in which they were put."""
    if one.speedup is None or other.speedup is None:
        return True
    return min(one.speedup.ci95[0], ratio(one) / _ALIKE) > ratio(other)


def _passed_over(one: Built, best: Built, ranked: float) -> CandidateRecord:
    """Why ``best``, whose ratio was ``ranked`` when candidates were put in order, ships and ``one`` does not."""
    alike = ratio(one) * _ALIKE >= ranked
    if alike:
        return _record(
            one.name,
            one,
            "farther",
            f"{best.name} is as {_faster(best).replace('er', '', 1)} and {_gain(best, one)}",
        )
    reason = f"{best.name} is {_faster(best)} and keeps the limits"
    if best.speedup is not None and ratio(best) <= ratio(one):
        reason = f"{best.name} was faster when they were ranked, {ranked:.2f}x, and keeps the limits"
    return _record(one.name, one, "larger" if _faster(best) == "smaller" else "slower", reason)


def _kept(built: Built) -> float:
    """What is left of the reference: by the metric where it was computed, else by the outputs."""
    if built.accuracy is not None:
        return -built.accuracy.drop
    return -math.inf if built.fidelity is None else built.fidelity.cosine


def _more_accurate(
    work: Compilation, recipe: Recipe, best: Built, order: list[Built], *, strict: bool
) -> Built:
    """Where the metric costs little, compute it for what is as fast too, and take what loses least."""
    if best.accuracy is None or not best.lossy or not _evaluates_soon(work, best):
        return best
    alike = [b for b in order if b.lossy and ratio(b) * _ALIKE >= ratio(best)]
    for one in _judged(work, recipe, alike):
        assert one.accuracy is not None
        if one.accuracy.drop < best.accuracy.drop and not shortfalls(one, recipe, strict=strict):
            order[order.index(one)], best = best, one
    return best


def _evaluates_soon(work: Compilation, best: Built) -> bool:
    """Whether the metric costs little for what is about as fast as ``best``."""
    faster = 1.0 if best.speedup is None else max(1.0, best.speedup.ratio)
    return work.evaluation_seconds <= _CHEAP * faster


def _gain(best: Built, other: Built) -> str:
    """What speaks for ``best`` before another that is as fast."""
    if best.accuracy is None or other.accuracy is None:
        return "closer to the reference"
    if best.accuracy.drop <= other.accuracy.drop:
        return "loses less"
    return "surer to keep the limits"


def _judged(work: Compilation, recipe: Recipe, candidates: Sequence[Built]) -> Iterator[Built]:
    """Those that can be judged, each judged when its turn comes, if it was not before."""
    for one in candidates:
        if one.accuracy is None:
            try:
                _tune(work, [one])
                work.judge(one, recipe.limits)
            except OptkitError as error:
                logger.warning("%s: left out: %s", one.name, error)
                continue
        yield one


def _proven(
    work: Compilation, recipe: Recipe, best: Built, order: list[Built], tried: dict[str, CandidateRecord]
) -> Built:
    """Where the samples leave ``best`` undecided and the metric costs little, what keeps the limits for certain and is hardly slower."""
    if best.accuracy is None or best.accuracy.verdict != "inconclusive" or not best.lossy:
        return best
    if not _evaluates_soon(work, best):
        return best
    enough = _PROVEN * ratio(best)
    near = _judged(work, recipe, [b for b in order if b.lossy and ratio(b) >= enough])
    certain = next((one for one in near if not shortfalls(one, recipe, strict=True)), None)
    if recipe.repair and work.evaluation_seconds <= _CHEAP:
        fixed = repair(work, recipe, best, strict=True, faster_than=enough / CLEARLY)
        if fixed is not None and (certain is None or ratio(fixed) > ratio(certain)):
            certain = fixed
    if certain is None:
        return best
    order[:] = [b for b in order if b is not certain]
    open_ = "; ".join(losses(best, recipe, strict=True))
    tried[best.name] = _record(best.name, best, "inconclusive", f"{open_}; {certain.name} is hardly slower")
    return certain


def _floor(work: Compilation, name: str, recipe: Recipe, tried: dict[str, CandidateRecord]) -> Built:
    """The first candidate or, where exact passes made the runtime compute something else, the graph as it was given."""
    try:
        return work.build(name, recipe)
    except ModelError as error:
        if isinstance(error, UnsupportedOpError) or not recipe.passes:
            raise
        # Where this fails too, its error says all.
        given = work.build("as-given", recipe.model_copy(update={"passes": ()}))
        tried[name] = _left_out(name, error)
        return given


def _left_out(name: str, error: OptkitError) -> CandidateRecord:
    """A candidate that could not be built; for want of a package, that is no reason to warn."""
    if isinstance(error, BackendUnavailableError):
        logger.info("%s: left out: %s", name, error)
        return _record(name, None, "unavailable", f"{error}: {error.hint}" if error.hint else str(error))
    logger.warning("%s: left out: %s", name, error)
    return _record(name, None, "failed", str(error))


def _as_given(work: Compilation, best: Built, recipe: Recipe, tried: dict[str, CandidateRecord]) -> Built:
    """The graph without any pass, where all that was tried is slower than it."""
    given = work.build(
        "as-given",
        recipe.model_copy(
            update={"passes": (), "candidates": (), "description": "The graph as it was given."}
        ),
    )
    _rank(work, given, ())
    _tune(work, [given])
    given.speedup = work.measure(given, rounds=_FINAL[0], budget=_FINAL[1])
    if ratio(given) <= ratio(best):
        return best
    work.judge(given, recipe.limits)
    tried[best.name] = _record(best.name, best, "slower", "slower than the graph as it was given")
    return given


def carry_out(work: Compilation, recipe: Recipe, *, strict: bool) -> Choice:
    """Build what an explicit recipe says; where it misses its limits, ship its exact passes alone and say so.

    Raises:
        PassError: The recipe quantizes, and nothing in the model could be quantized.
    """
    name = "recipe"
    asked = work.build(name, recipe)
    wanted = [p.name for p in recipe.passes if not p.exact]
    # Half precision around products of which none is quantized is not what was asked for.
    grids = [p.name for p in recipe.passes if not (p.exact or p.floats)]
    idle = grids and not any(r.changes for r in asked.records if r.name in grids)
    if wanted and (not asked.lossy or idle):
        raise PassError(
            f"{', '.join(grids or wanted)}: nothing in {work.loaded.name} was changed",
            hint="optkit inspect shows which operators it has and why they stay in float",
        )
    asked.speedup = work.measure(asked, rounds=_FINAL[0], budget=_FINAL[1])
    try:
        work.judge(asked, recipe.limits)
        reasons = shortfalls(asked, recipe, strict=strict)
    except OptkitError as error:
        if not asked.lossy:
            raise
        reasons = [f"it cannot be judged: {error}"]
    slow = _too_slow(asked, recipe)
    if not asked.lossy or not (reasons or slow):
        return _settled(asked, [_record(name, asked, "shipped", "")], reasons + slow, strict)
    if work.target.floatless:
        # Neither some of its layers nor all of them may be float: it is the best that there is.
        return _settled(asked, [_record(name, asked, "shipped", "")], reasons + slow, strict)
    record = _record(name, asked, "missed", "; ".join(reasons + slow))
    if recipe.repair and losses(asked, recipe, strict=strict):
        fixed = repair(work, recipe, asked, strict=strict, faster_than=0.0 if asked.speedup is None else 1.0)
        if fixed is not None:
            fixed.speedup = work.measure(fixed, rounds=_FINAL[0], budget=_FINAL[1])
            shipped = _record(fixed.name, fixed, "shipped", "")
            return _settled(fixed, [record, shipped], _too_slow(fixed, recipe), strict)
    engine, given = work.resolved(recipe)
    widest = engine.widest(given, work.target)
    exact: dict[str, Any] = {"passes": tuple(p for p in recipe.passes if p.exact)}
    floats = {"passes": tuple(p for p in recipe.passes if p.exact or p.floats)}
    short = widest != given or floats != exact
    if not short and exact["passes"] == recipe.passes:
        # There is nothing wider that the target computes in.
        return _settled(asked, [_record(name, asked, "shipped", "")], reasons + slow, strict)
    if short and (found := _unquantized(work, recipe, floats, strict=strict)) is not None:
        # Of less than float32 arithmetic, and within the limits.
        shipped = _record(found.name, found, "shipped", "without what quantizes it keeps the limits")
        return _settled(found, [record, shipped], reasons + slow, strict)
    exact["options"] = widest.model_dump(mode="json")
    floor = work.build("float", recipe.model_copy(update=exact))
    floor.speedup = work.measure(floor, rounds=_FINAL[0], budget=_FINAL[1])
    work.judge(floor, recipe.limits)
    if not reasons and ratio(floor) <= ratio(asked):
        # Too slow, but float is no faster.
        shipped = record.model_copy(update={"verdict": "shipped"})
        return _settled(asked, [shipped, _record("float", floor, "slower", "")], slow, strict)
    still = [*shortfalls(floor, recipe, strict=strict), *_too_slow(floor, recipe)]
    why = (
        f"the most exact, and it misses too: {'; '.join(still)}"
        if still
        else "the best that keeps the limits"
    )
    shipped = _record("float", floor, "shipped", why)
    choice = _settled(floor, [record, shipped], reasons + slow, strict)
    judged = asked.accuracy is not None or asked.fidelity is not None
    if judged and not recipe.repair and losses(asked, recipe, strict=strict):
        choice.advice.append(
            "with --set repair=true the layers that hurt most would go back to float, and the others stay quantized"
        )
    return choice


def _unquantized(
    work: Compilation, recipe: Recipe, floats: Mapping[str, Any], *, strict: bool
) -> Built | None:
    """The recipe without what quantizes, in the floats that it asks for; None where that misses a limit."""
    if floats["passes"] == recipe.passes:
        return None
    found = work.build("unquantized", recipe.model_copy(update=dict(floats)))
    found.speedup = work.measure(found, rounds=_FINAL[0], budget=_FINAL[1])
    try:
        work.judge(found, recipe.limits)
    except OptkitError as error:
        logger.info("%s: %s", found.name, error)
        return None
    return None if shortfalls(found, recipe, strict=strict) or _too_slow(found, recipe) else found


def _too_slow(built: Built, recipe: Recipe) -> list[str]:
    s = built.speedup
    # "No slower" is meant up to what two sessions of the same file differ by; a speed-up that was asked for is meant exactly.
    wanted = (
        recipe.limits.min_speedup
        if recipe.limits.min_speedup > 1
        else recipe.limits.min_speedup * (1 - NOISE)
    )
    if s is None or s.ci95[1] >= wanted:
        return []
    return [
        f"speed-up {s.ratio:.2f}x (95% {s.ci95[0]:.2f} to {s.ci95[1]:.2f}), at least {recipe.limits.min_speedup:g}x is asked for"
    ]


def _settled(best: Built, records: list[CandidateRecord], missed: list[str], strict: bool) -> Choice:
    """The choice, with undecided gates apart from missed limits."""
    if strict and missed and all(m.endswith("inconclusive") for m in missed):
        return Choice(best=best, records=records, inconclusive=missed)
    return Choice(best=best, records=records, missed=missed)


def _same(one: Built, other: Built) -> bool:
    if one.bytes != other.bytes or one.recipe.options != other.recipe.options:
        return False
    files = sorted(f for f in one.folder.rglob("*") if f.is_file())
    return all(
        (twin := other.folder / f.relative_to(one.folder)).is_file() and digest(f) == digest(twin)
        for f in files
    )


def _rank(work: Compilation, built: Built, others: Sequence[Built]) -> None:
    """Time ``built`` roughly, to see in which order candidates are worth judging; most briefly what is far behind."""
    ahead = max((o.speedup.ratio for o in others if o.speedup is not None), default=0.0)
    built.speedup = work.measure(built, rounds=RANK[0], budget=RANK[1], hopeless=_BEHIND * ahead)


def _raced(work: Compilation, order: list[Built]) -> list[Built]:
    """The candidates in order, once those at the front were tuned and timed in turn with one another."""
    front = [b for b in order if ratio(b) * _CLOSE >= ratio(order[0])][:_RACERS]
    measured = order[0].recipe.goal != "size" and all(b.speedup is not None for b in front)
    if not measured or sum(b.bytes for b in front) > _TOGETHER:
        return order
    try:
        _tune(work, front)
    except OptkitError as error:
        logger.warning("%s: the ranking stands: %s", " and ".join(b.name for b in front), error)
        return order
    return sorted(order, key=lambda b: -ratio(b))


def _tune(work: Compilation, front: Sequence[Built]) -> None:
    """Time what is not tuned yet, with the other options that the backends propose, in turn; each takes those that are faster."""
    front = [b for b in front if b.speedup is not None and not b.tuned]
    entries = [[one, *_others(work, one)] for one in front]
    if sum(map(len, entries)) > 1:
        found = iter(work.race([e for es in entries for e in es], rounds=_RACE[0], budget=_RACE[1]))
        for one, several in zip(front, entries, strict=True):
            speeds = [next(found) for _ in several]
            best = max(range(len(speeds)), key=lambda k: speeds[k].ratio)
            if speeds[best].ratio <= _WORTH * speeds[0].ratio:
                best = 0
            one.speedup, one.recipe = speeds[best], several[best].recipe
    for one in front:
        one.tuned = True


def _others(work: Compilation, built: Built) -> list[Built]:
    """The same with the other options that its backend proposes."""
    engine, options = work.resolved(built.recipe)
    model, _, _, _ = work.prepare(work.exact(built.recipe))
    return [
        replace(built, recipe=built.recipe.model_copy(update={"options": o.model_dump(mode="json")}))
        for o in engine.variants(model, work.target, options, built.folder, work.feeds)
    ]


def _next(work: Compilation, order: Sequence[Built]) -> Built:
    """Of the candidates as fast as the fastest, the one whose outputs are closest to the reference's."""
    alike = [b for b in order if ratio(b) * _ALIKE >= ratio(order[0])]
    if len(alike) == 1:
        return alike[0]
    for built in alike:
        if built.sqnr is None:
            try:
                built.sqnr = work.closeness(built)
            except OptkitError as error:
                logger.warning("%s: %s", built.name, error)
                built.sqnr = -math.inf
    return max(alike, key=lambda b: b.sqnr or 0.0)


def _faster(best: Built) -> str:
    """In which sense ``best`` comes before the others."""
    if best.recipe.goal == "size":
        return "smaller"
    if best.speedup is not None:
        return "faster"
    return "smaller" if best.estimate is None else "faster by the estimate"


def _record(name: str, built: Built | None, verdict: str, reason: str) -> CandidateRecord:
    a = built.accuracy if built is not None else None
    f = built.fidelity if built is not None else None
    return CandidateRecord(
        name=name, speedup=None if built is None or built.speedup is None else built.speedup.ratio, bytes=None if built is None else built.bytes,
        metric=None if a is None else a.candidate, drop=None if a is None else a.drop, ci95=None if a is None else a.ci95,
        cosine=None if f is None else f.cosine, verdict=verdict, reason=reason,
    )  # fmt: skip
