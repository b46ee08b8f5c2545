"""Choose among candidates by measurement: the fastest that keeps the limits, with float32 as the floor."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.bench import NOISE
from optkit.deciding import deciding
from optkit.errors import BackendUnavailableError, ModelError, OptkitError, PassError, UnsupportedOpError
from optkit.graph import digest, walk
from optkit.passes.base import GraphPass
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.report import CandidateRecord, LayerRecord, PassRecord, SaturationRecord

if TYPE_CHECKING:
    from pathlib import Path

    from optkit.backends.base import Estimate
    from optkit.bench import Speedup
    from optkit.compiler import Compilation
    from optkit.evaluate import Comparison, Fidelity
    from optkit.passes.base import Pass

logger = logging.getLogger(__name__)

# Rounds of the first, ranking measurement and of the last one, and the CPU seconds that each may take.
_RANK = (9, 1.5)
_FINAL = (40, 3.0)
# A variant of the options must win by this factor to be taken: below, the difference is noise.
_CLEARLY = 1.03
# Candidates whose speeds differ by less are alike, as measurements repeat: the more accurate one is taken.
_ALIKE = 1.03
# What is below this share of the fastest so far is not timed further.
_BEHIND = 0.8
# Share of the speed of a candidate that the samples leave undecided, for which one that they do not is taken.
_PROVEN = 0.9
# CPU seconds that one evaluation may take for candidates that are as fast to be evaluated too.
_CHEAP = 8.0
# Layers whose own effect is measured; larger models are measured in runs of neighbouring layers.
_GROUPS = 64
# Operators whose weights are worth returning to float.
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul", "Gather"})
# Shares of the quantization noise that successive repairs take away.
_REMOVED = (0.5, 0.75, 0.9, 0.97, 0.99)
# Noise of a layer, in powers of the signal, beyond which outputs cannot be compared: ``_noise`` gives 10^20, averaged.
_BROKEN = 1e10
# The same where layers have several passes to go to, so that little of it is all of the weights in a few bits more.
_REMOVED_BY_BITS = (0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 0.99, 0.999)
# What a weight that stays in float counts as, beside those of a few bits.
_FLOAT_BITS = 16.0


@dataclass(slots=True, kw_only=True)
class Built:
    """A recipe carried out: files in a folder, not yet an artifact."""

    name: str
    recipe: Recipe
    folder: Path
    records: list[PassRecord]
    seconds: dict[str, float]
    bytes: int
    lossy: bool
    scheme: str
    weights: dict[str, int]
    sqnr: float | None = None
    speedup: Speedup | None = None
    estimate: Estimate | None = None
    saturation: SaturationRecord | None = None
    accuracy: Comparison | None = None
    fidelity: Fidelity | None = None
    layers: list[LayerRecord] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether its outputs may differ from the reference's: by what was done to it, or by what the target makes of it."""
        return self.lossy or (self.saturation is not None and bool(self.saturation.at_risk))


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

    Candidates are judged in the order of their measured speed, those alike in speed by how close their outputs are to
    the reference's, so that the metric is computed for few of them; the first that keeps the limits ships. One that
    misses a limit is repaired, where the recipe allows it: the layers that hurt most go back to float.
    """
    tried: dict[str, CandidateRecord] = {}
    built: list[Built] = []
    for name, candidate in recipes:
        try:
            one = work.build(name, candidate) if built else _floor(work, name, candidate, tried)
            if built and not one.lossy and any(not p.exact for p in candidate.passes):
                tried[name] = _record(name, one, "not needed", "it found nothing to quantize")
                continue
            if any(_same(one, other) for other in built):
                tried[name] = _record(name, one, "not needed", "the same file as an earlier candidate")
                continue
            _rank(work, one, built)
        except OptkitError as error:
            if not built:
                raise
            tried[name] = _left_out(name, error)
            continue
        built.append(one)
    floor = built[0]
    order = sorted(built, key=lambda b: -_ratio(b))
    best: Built | None = None
    while order and best is None:
        one = _next(work, order)
        order.remove(one)
        reasons = []
        if one.accuracy is None and one.fidelity is None:
            try:
                _tune(work, one)
                work.judge(one, recipe.limits)
            except OptkitError as error:
                # What it gives cannot be judged: NaN, or nothing that the evaluator understands.
                if one is floor:
                    raise
                logger.warning("%s: left out: %s", one.name, error)
                tried[one.name] = _record(one.name, one, "failed", str(error))
                continue
            reasons = shortfalls(one, recipe, strict=strict)
            if recipe.goal == "size" and one is not floor:
                # The order is not that of speed, so the smallest may be too slow.
                reasons += _too_slow(one, recipe)
        if not reasons:
            best = one
            break
        tried[one.name] = _record(one.name, one, "missed", "; ".join(reasons))
        logger.info("%s: %s", one.name, "; ".join(reasons))
        if recipe.repair and one.lossy and losses(one, recipe, strict=strict):
            fixed = repair(work, recipe, one, strict=strict, faster_than=_ratio(floor))
            if fixed is not None:
                # It goes back into the line: what comes next may be faster than the repaired one.
                order = sorted([*order, fixed], key=lambda b: -_ratio(b))
    if best is not None:
        best = _more_accurate(work, recipe, best, order, strict=strict)
        best = _proven(work, recipe, best, order, tried)
    missed: list[str] = []
    if best is None:
        best, missed = floor, shortfalls(floor, recipe, strict=strict)
    ranked = _ratio(best)
    best.speedup = work.measure(best, rounds=_FINAL[0], budget=_FINAL[1])
    for one in order:
        alike = _ratio(one) * _ALIKE >= ranked
        gain = "loses less" if one.accuracy is not None else "closer to the reference"
        reason = (
            f"{best.name} is as {_faster(best).replace('er', '', 1)} and {gain}"
            if alike
            else f"{best.name} is {_faster(best)} and keeps the limits"
        )
        if not alike and best.speedup is not None and _ratio(best) <= _ratio(one):
            reason = f"{best.name} was faster when they were ranked, {ranked:.2f}x, and keeps the limits"
        tried[one.name] = _record(one.name, one, "farther" if alike else "slower", reason)
    if best.speedup is not None and _too_slow(best, recipe) and not recipe.limits.min_speedup > 1:
        best = _as_given(work, best, recipe, tried)
    tried[best.name] = _record(best.name, best, "shipped", "")
    return _settled(best, list(tried.values()), missed + _too_slow(best, recipe), strict)


def _more_accurate(
    work: Compilation, recipe: Recipe, best: Built, order: list[Built], *, strict: bool
) -> Built:
    """Where the metric costs little, compute it for what is as fast too, and take what loses least."""
    if best.accuracy is None or not best.lossy or work.evaluation_seconds > _CHEAP:
        return best
    alike = [b for b in order if b.lossy and _ratio(b) * _ALIKE >= _ratio(best)]
    for one in _judged(work, recipe, alike):
        assert one.accuracy is not None
        if one.accuracy.drop < best.accuracy.drop and not shortfalls(one, recipe, strict=strict):
            order[order.index(one)], best = best, one
    return best


def _judged(work: Compilation, recipe: Recipe, candidates: Sequence[Built]) -> Iterator[Built]:
    """Those that can be judged, each judged when its turn comes, if it was not before."""
    for one in candidates:
        if one.accuracy is None:
            try:
                _tune(work, one)
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
    # What is as fast evaluates as fast.
    if work.evaluation_seconds > _CHEAP * max(1.0, best.speedup.ratio if best.speedup is not None else 1.0):
        return best
    enough = _PROVEN * _ratio(best)
    near = _judged(work, recipe, [b for b in order if b.lossy and _ratio(b) >= enough])
    certain = next((one for one in near if not shortfalls(one, recipe, strict=True)), None)
    if recipe.repair and work.evaluation_seconds <= _CHEAP:
        fixed = repair(work, recipe, best, strict=True, faster_than=enough / _CLEARLY)
        if fixed is not None and (certain is None or _ratio(fixed) > _ratio(certain)):
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
        tried[name] = _left_out(name, error)
        return work.build("as-given", recipe.model_copy(update={"passes": ()}))


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
    _tune(work, given)
    given.speedup = work.measure(given, rounds=_FINAL[0], budget=_FINAL[1])
    if _ratio(given) <= _ratio(best):
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
    if not asked.lossy and any(not p.exact for p in recipe.passes):
        raise PassError(
            f"{', '.join(p.name for p in recipe.passes if not p.exact)}: nothing in {work.loaded.name} was changed",
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
    record = _record(name, asked, "missed", "; ".join(reasons + slow))
    if recipe.repair and losses(asked, recipe, strict=strict):
        fixed = repair(work, recipe, asked, strict=strict, faster_than=0.0 if asked.speedup is None else 1.0)
        if fixed is not None:
            fixed.speedup = work.measure(fixed, rounds=_FINAL[0], budget=_FINAL[1])
            shipped = _record(fixed.name, fixed, "shipped", "")
            return _settled(fixed, [record, shipped], _too_slow(fixed, recipe), strict)
    engine = work.engine(recipe)
    given = engine.options.model_validate(recipe.options)
    exact: dict[str, Any] = {"passes": tuple(p for p in recipe.passes if p.exact)}
    if (
        engine.exact(given) != given
        and (found := _unquantized(work, recipe, exact, strict=strict)) is not None
    ):
        # Of less than float32 arithmetic, and within the limits.
        shipped = _record(found.name, found, "shipped", "the smallest that keeps the limits")
        return _settled(found, [record, shipped], reasons + slow, strict)
    exact["options"] = engine.exact(given).model_dump(mode="json")
    floor = work.build("float", recipe.model_copy(update=exact))
    floor.speedup = work.measure(floor, rounds=_FINAL[0], budget=_FINAL[1])
    work.judge(floor, recipe.limits)
    if not reasons and _ratio(floor) <= _ratio(asked):
        # Too slow, but float is no faster.
        shipped = record.model_copy(update={"verdict": "shipped"})
        return _settled(asked, [shipped, _record("float", floor, "slower", "")], slow, strict)
    shipped = _record("float", floor, "shipped", "the best that keeps the limits")
    return _settled(floor, [record, shipped], reasons + slow, strict)


def _unquantized(
    work: Compilation, recipe: Recipe, exact: Mapping[str, Any], *, strict: bool
) -> Built | None:
    """The recipe with its exact passes alone and its own options, such as float16 inside; None where that misses a limit."""
    found = work.build("unquantized", recipe.model_copy(update=dict(exact)))
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
    built.speedup = work.measure(built, rounds=_RANK[0], budget=_RANK[1], hopeless=_BEHIND * ahead)


def _tune(work: Compilation, built: Built) -> None:
    """Time the other options that the backend proposes for the graph; take those that are clearly faster."""
    if built.speedup is None:
        return
    engine = work.engine(built.recipe)
    model, _, _, _ = work.prepare(work.exact(built.recipe))
    for other in engine.variants(model, work.target, engine.options.model_validate(built.recipe.options)):
        found = work.measure(built, rounds=_RANK[0], budget=_RANK[1], options=other)
        if found is not None and found.ratio > _CLEARLY * built.speedup.ratio:
            built.speedup = found
            built.recipe = built.recipe.model_copy(update={"options": other.model_dump(mode="json")})


def _next(work: Compilation, order: Sequence[Built]) -> Built:
    """Of the candidates as fast as the fastest, the one whose outputs are closest to the reference's."""
    alike = [b for b in order if _ratio(b) * _ALIKE >= _ratio(order[0])]
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


def _ratio(built: Built) -> float:
    """What candidates are ordered by: one over the size where that is the goal; else the measured speed-up; where the target is not at hand, one over the estimate or the size."""
    if built.recipe.goal == "size":
        return 1 / max(built.bytes, 1)
    if built.speedup is not None:
        return built.speedup.ratio
    if built.estimate is not None:
        return 1 / math.sqrt(built.estimate.low * built.estimate.high)
    return 1 / max(built.bytes, 1)


def _faster(best: Built) -> str:
    """In which sense ``best`` comes before the others."""
    if best.recipe.goal == "size":
        return "smaller"
    if best.speedup is not None:
        return "faster"
    return "smaller" if best.estimate is None else "faster by the estimate"


def shortfalls(built: Built, recipe: Recipe, *, strict: bool) -> list[str]:
    """Why ``built`` may not ship under the limits of ``recipe``; empty where it may."""
    reasons, limits = losses(built, recipe, strict=strict), recipe.limits
    if limits.max_size_mb is not None and built.bytes > limits.max_size_mb * 1e6:
        reasons.append(f"{built.bytes / 1e6:.2f} MB, allowed {limits.max_size_mb:g}")
    if (
        limits.max_latency_ms is not None
        and built.speedup is not None
        and built.speedup.candidate.median * 1e3 > limits.max_latency_ms
    ):
        reasons.append(f"{built.speedup.candidate.median * 1e3:.3f} ms, allowed {limits.max_latency_ms:g}")
    return reasons


def losses(built: Built, recipe: Recipe, *, strict: bool) -> list[str]:
    """Those of the shortfalls that more layers in float can mend."""
    reasons, limits = [], recipe.limits
    if built.accuracy is not None and built.accuracy.verdict is not None:
        a = built.accuracy
        if a.verdict == "missed" or (strict and a.verdict == "inconclusive"):
            interval = f"95% {a.ci95[0]:.4f} to {a.ci95[1]:.4f}"
            reasons.append(
                f"{a.metric} {a.reference:.4f} -> {a.candidate:.4f}, drop {a.drop:.4f} ({interval}), "
                f"allowed {a.budget}: {a.verdict}"
            )
    if built.lossy and built.fidelity is None and built.accuracy is None:
        reasons.append(
            "the model gives other outputs each time, so what quantization does to them can't be seen"
        )
    if built.fidelity is not None and built.differs:
        f = built.fidelity
        if not f.shapes_equal:
            reasons.append("outputs of other shapes than the reference's")
        if f.cosine < limits.min_cosine:
            reasons.append(
                f"cosine to the fp32 reference {f.cosine:.4f}, at least {limits.min_cosine:g} is asked for"
            )
    return reasons


def sensitivities(work: Compilation, built: Built) -> list[LayerRecord]:
    """The noise that quantizing one layer, or one run of neighbours, alone puts on the outputs; noisiest first.

    SQNR of all float outputs together against the float candidate's own, on a few batches.
    """
    found = _noises(work, built, _ladders(work, built))
    records = [LayerRecord(node=n, sqnr_db=_decibels(v[0]), kept_float=False) for n, v in found.items()]
    return sorted(records, key=lambda r: r.sqnr_db)


def _decibels(share: float) -> float:
    return 200.0 if share == 0 else max(-200.0, min(200.0, -10 * math.log10(share)))


def _noises(
    work: Compilation, built: Built, ladders: Mapping[str, tuple[int, ...]]
) -> dict[str, list[float]]:
    """The share of noise that each layer alone puts on the outputs, by the passes that may quantize it."""
    steps = built.recipe.passes
    exact, _, _ = work.transform(
        built.recipe.model_copy(update={"passes": tuple(p for p in steps if p.exact)})
    )
    session = ReferenceSession(exact)
    expected = [session.run(feeds) for feeds in work.feeds]
    session.close()
    floats = {k for k, v in expected[0].items() if v.dtype.kind == "f"}
    if not floats:
        return {}
    groups: list[tuple[int, list[str]]] = []
    for index in dict.fromkeys(i for rungs in ladders.values() for i in rungs):
        names = np.asarray([n for n, rungs in ladders.items() if index in rungs], dtype=object)
        groups += [(index, list(g)) for g in np.array_split(names, min(_GROUPS, len(names)))]
    noise: dict[tuple[str, int], float] = {}
    with work.progress.task("measure layers", len(groups)) as task:
        for index, group in groups:
            alone = steps[index].model_copy(update={"targets": tuple(f"={n}" for n in group), "ignore": ()})
            passes = tuple(alone if i == index else p for i, p in enumerate(steps) if p.exact or i == index)
            model, _, _ = work.transform(built.recipe.model_copy(update={"passes": passes}))
            session = ReferenceSession(model)
            shares = []
            for feeds, wanted in zip(work.feeds, expected, strict=True):
                found = session.run(feeds)
                shares += [_noise(wanted[k], found[k]) for k in sorted(floats)]
            session.close()
            noise |= dict.fromkeys(((str(n), index) for n in group), float(np.mean(shares)))
            task.advance()
    return {n: [noise[n, i] for i in rungs] for n, rungs in ladders.items()}


def _noise(wanted: np.ndarray, found: np.ndarray) -> float:
    """Power of the error over that of the signal; 10^20, the worst there is, where the two cannot be compared."""
    finite = np.isfinite(wanted)
    if wanted.shape != found.shape or not np.isfinite(found[finite]).all():
        return 1e20
    x, y = wanted[finite].astype(np.float64), found[finite].astype(np.float64)
    return min(1e20, float(((x - y) ** 2).sum()) / (float((x * x).sum()) or 1.0))


def _ladders(work: Compilation, built: Built) -> dict[str, tuple[int, ...]]:
    """Nodes with weights that the recipe quantizes, and which of its passes may: what one leaves out, the next takes.

    None where a pass cannot leave any out.
    """
    steps, found = built.recipe.passes, dict[str, tuple[int, ...]]()
    for index, step in enumerate(steps):
        if step.exact:
            continue
        if not isinstance(step, GraphPass) or not {"targets", "ignore"} <= set(type(step).model_fields):
            return {}
        model, _, _, memo = work.prepare(tuple(p for p in steps[:index] if p.exact))
        for change in step.run(model, work.context(work.engine(built.recipe), memo)):
            if change.detail.split()[0] in _WEIGHTED:
                found[change.node] = (*found.get(change.node, ()), index)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """One layer goes to a gentler pass, or to float where ``rung`` is beyond its last.

    Attributes:
        gain: Share of noise in the outputs that it takes away.
        worth: The same for each bit that it costs.
    """

    node: str
    rung: int
    gain: float
    worth: float


def _moves(
    work: Compilation, built: Built, ladders: Mapping[str, tuple[int, ...]], noises: Mapping[str, list[float]]
) -> list[_Move]:
    """All that is worth doing, the best first; of one layer in the order of its passes.

    From each pass a layer goes to that of the later ones which takes away most noise for its cost: the lower convex hull
    of cost and noise, so that any number of the first moves is the best there is for what it costs.
    """
    # Where time is measured, how large a layer's weights are says little.
    elements = {} if work.target.runs_here else _elements(work, built)
    found: list[_Move] = []
    for node, rungs in ladders.items():
        # Outputs that are all noise cannot get worse; so that one such layer does not hide all others.
        noise = [n / (1 + n) for n in noises[node]] + [0.0]
        bits = [float(getattr(built.recipe.passes[i], "bits", 8)) for i in rungs] + [_FLOAT_BITS]
        size, at = elements.get(node, 1), 0
        while at < len(rungs):
            costs = [max(b - bits[at], 1.0) * size for b in bits]
            best = max(range(at + 1, len(noise)), key=lambda r: (noise[at] - noise[r]) / costs[r])
            gain = noise[at] - noise[best]
            found.append(_Move(node=node, rung=best, gain=gain, worth=gain / costs[best]))
            at = best
    return sorted(found, key=lambda m: -m.worth)


def _elements(work: Compilation, built: Built) -> dict[str, int]:
    """Of the largest constant that each node reads."""
    model, _, _, _ = work.prepare(work.exact(built.recipe))
    return {
        str(node.name): max((v.const_value.size for v in node.inputs if v and v.const_value), default=1)
        for node in walk(model)
    }


def repair(
    work: Compilation, recipe: Recipe, built: Built, *, strict: bool, faster_than: float
) -> Built | None:
    """Treat the layers that hurt most more gently until the limits hold; None where nothing faster than the floor does.

    Layers are ranked by their own measured noise; what is tried is the smallest set that takes away a given share of it.
    They go to the next pass of the recipe that takes them, such as one with more bits, and after the last to float.
    """
    ladders = _ladders(work, built)
    noises = _noises(work, built, ladders) if ladders else {}
    if not noises:
        return None
    attempts = _attempts(work, built, ladders, noises)
    for rungs, following in zip(attempts, [*attempts[1:], None], strict=True):
        gentler = sum(r > 0 for r in rungs.values())
        name = f"{built.name}-mixed-{gentler}"
        fixed: Built | None = None
        try:
            passes = _spared(built.recipe.passes, ladders, rungs)
            fixed = work.build(name, built.recipe.model_copy(update={"passes": passes}))
            fixed.speedup = work.measure(fixed, rounds=_RANK[0], budget=_RANK[1])
            if not fixed.lossy or _ratio(fixed) < faster_than * _CLEARLY:
                logger.info(
                    "%s: with %d of %d layers in float nothing is gained", built.name, gentler, len(ladders)
                )
                shutil.rmtree(fixed.folder)
                if following is not None and sum(r > 0 for r in following.values()) < gentler:
                    continue
                return None
            work.judge(fixed, recipe.limits)
            reasons = shortfalls(fixed, recipe, strict=strict)
        except OptkitError as error:
            reasons = [str(error)]
        if fixed is not None and not reasons:
            fixed.layers = _layers(built.recipe.passes, ladders, noises, rungs)
            return fixed
        logger.info("%s: %s", name, "; ".join(reasons))
        if fixed is not None:
            shutil.rmtree(fixed.folder)
    return None


def _attempts(
    work: Compilation, built: Built, ladders: Mapping[str, tuple[int, ...]], noises: Mapping[str, list[float]]
) -> list[dict[str, int]]:
    """For each layer the pass that takes it, counted in its ladder: what is tried, the mildest first.

    Where a layer alone makes outputs of another size, or NaN, all layers that decide sizes go to float first: which of them
    do so on a few batches is chance.
    """
    moves = _moves(work, built, ladders, noises)
    share = np.cumsum([m.gain for m in moves]) / (sum(m.gain for m in moves) or 1.0)
    shares = _REMOVED if all(len(r) == 1 for r in ladders.values()) else _REMOVED_BY_BITS
    counts = {min(int(np.searchsorted(share, removed)) + 1, len(moves)) for removed in shares}
    found = [dict.fromkeys(ladders, 0) | {m.node: m.rung for m in moves[:count]} for count in sorted(counts)]
    broken = {node for node, noise in noises.items() if noise[0] > _BROKEN}
    if broken:
        model, _, _, _ = work.prepare(tuple(p for p in built.recipe.passes if p.exact))
        in_float = broken | deciding(model)
        found.insert(0, {node: len(rungs) if node in in_float else 0 for node, rungs in ladders.items()})
    return found


def _spared(
    steps: Sequence[Pass], ladders: Mapping[str, tuple[int, ...]], rungs: Mapping[str, int]
) -> tuple[Any, ...]:
    """The passes, each leaving out the layers that are past it; in the order in which they hurt."""
    passes = list[Any](steps)
    for node, rung in rungs.items():
        for index in ladders[node][:rung]:
            ignore = (*passes[index].ignore, f"={node}")
            passes[index] = passes[index].model_copy(update={"ignore": ignore})
    return tuple(passes)


def _layers(
    steps: Sequence[Any], ladders: Mapping[str, tuple[int, ...]], noises: Mapping[str, list[float]], rungs: Mapping[str, int]
) -> list[LayerRecord]:  # fmt: skip
    """What became of each layer, the noisiest first."""
    records = []
    for node, ladder in ladders.items():
        kept = rungs[node] == len(ladder)
        bits = None if kept or len(ladder) == 1 else getattr(steps[ladder[rungs[node]]], "bits", 8)
        records.append(LayerRecord(node=node, sqnr_db=_decibels(noises[node][0]), kept_float=kept, bits=bits))
    return sorted(records, key=lambda r: r.sqnr_db)


def _record(name: str, built: Built | None, verdict: str, reason: str) -> CandidateRecord:
    a = built.accuracy if built is not None else None
    f = built.fidelity if built is not None else None
    return CandidateRecord(
        name=name, speedup=None if built is None or built.speedup is None else built.speedup.ratio, bytes=None if built is None else built.bytes,
        metric=None if a is None else a.candidate, drop=None if a is None else a.drop, ci95=None if a is None else a.ci95,
        cosine=None if f is None else f.cosine, verdict=verdict, reason=reason,
    )  # fmt: skip
