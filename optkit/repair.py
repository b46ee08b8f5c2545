"""Treat the layers that quantization hurts most more gently: by other passes of the recipe, or in float."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optkit.candidate import CLEARLY, RANK, Built, ratio, shortfalls
from optkit.deciding import deciding
from optkit.errors import OptkitError
from optkit.graph import walk
from optkit.passes.base import GraphPass
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.report import LayerRecord

if TYPE_CHECKING:
    from optkit.compiler import Compilation
    from optkit.passes.base import Pass

logger = logging.getLogger(__name__)

# Layers whose own effect is measured; larger models are measured in runs of neighbouring layers.
_GROUPS = 64
# Operators whose weights are worth returning to float.
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul", "Gather"})
# Shares of the quantization noise that successive repairs take away.
_REMOVED = (0.5, 0.75, 0.9, 0.97, 0.99)
# The same where layers have several passes to go to, so that little of it is all of the weights in a few bits more.
_REMOVED_BY_BITS = (0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 0.99, 0.999)
# Noise of a layer, in powers of the signal, beyond which outputs cannot be compared: ``_noise`` gives 10^20, averaged.
_BROKEN = 1e10
# What a weight that stays in float counts as, beside those of a few bits.
_FLOAT_BITS = 16.0


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
        # Layers in float are those of a pass that chooses among floats, too.
        if step.exact or step.floats:
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
    while attempts:
        rungs = attempts.pop(0)
        gentler = _gentler(rungs)
        name = f"{built.name}-mixed-{gentler}"
        fixed: Built | None = None
        try:
            passes = _spared(built.recipe.passes, ladders, rungs)
            fixed = work.build(name, built.recipe.model_copy(update={"passes": passes}))
            fixed.speedup = work.measure(fixed, rounds=RANK[0], budget=RANK[1])
            if not fixed.lossy or ratio(fixed) < faster_than * CLEARLY:
                logger.info(
                    "%s: with %d of %d layers in float nothing is gained", built.name, gentler, len(ladders)
                )
                shutil.rmtree(fixed.folder)
                attempts = [a for a in attempts if _gentler(a) < gentler]
                continue
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


def _gentler(rungs: Mapping[str, int]) -> int:
    return sum(r > 0 for r in rungs.values())


def _attempts(
    work: Compilation, built: Built, ladders: Mapping[str, tuple[int, ...]], noises: Mapping[str, list[float]]
) -> list[dict[str, int]]:
    """For each layer the pass that takes it, counted in its ladder: what is tried, in this order.

    Where a layer alone makes outputs of another size, or NaN, it goes to float in any case, as no noise counts beside it;
    and before that is tried, with it all layers that decide sizes: which of them do so on a few batches is chance.
    """
    moves = _moves(work, built, ladders, noises)
    shares = _REMOVED if all(len(r) == 1 for r in ladders.values()) else _REMOVED_BY_BITS

    def beside(in_float: Set[str]) -> list[dict[str, int]]:
        """More and more of the other layers."""
        others = [m for m in moves if m.node not in in_float]
        base = {node: len(rungs) if node in in_float else 0 for node, rungs in ladders.items()}
        if not others:
            return [base]
        share = np.cumsum([m.gain for m in others]) / (sum(m.gain for m in others) or 1.0)
        counts = {min(int(np.searchsorted(share, removed)) + 1, len(others)) for removed in shares}
        counts |= {0} if in_float else set()
        return [base | {m.node: m.rung for m in others[:count]} for count in sorted(counts)]

    broken = {node for node, noise in noises.items() if noise[0] > _BROKEN}
    if not broken:
        return beside(broken)
    model, _, _, _ = work.prepare(tuple(p for p in built.recipe.passes if p.exact))
    return [*beside(broken | deciding(model)), *beside(broken)]


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
