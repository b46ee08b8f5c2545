"""Treat the layers that quantization hurts most more gently: by other passes of the recipe, or in float."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
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
    import onnx_ir as ir

    from optkit.compilation import Compilation
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
# What lies between an attempt that misses and the next, which does not, is halved down to this share of the size.
_APART = 0.01
# Noise of a layer, in powers of the signal, beyond which outputs cannot be compared: ``_noise`` gives 10^20, averaged.
_BROKEN = 1e10
# What a weight that stays in float counts as, beside those of a few bits.
_FLOAT_BITS = 16.0
# What stands between weights that are stored small and the node that computes with them.
_UNPACKING = frozenset({"DequantizeLinear", "Gather", "Mul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ladder:
    """The passes that may quantize a layer: what one leaves out, the next takes.

    Attributes:
        rungs: Their places in the recipe.
        bits: What the layer stores by each, and at last in float.
        noise: The share of noise that the layer alone puts on the outputs by each; 0 in float, which stands last.
    """

    rungs: tuple[int, ...]
    bits: tuple[float, ...]
    noise: tuple[float, ...] = ()


def sensitivities(work: Compilation, built: Built) -> list[LayerRecord]:
    """The noise that quantizing one layer, or one run of neighbours, alone puts on the outputs; noisiest first.

    SQNR of all float outputs together against the float candidate's own, on a few batches.
    """
    found = _measured(work, built, _ladders(work, built))
    records = [LayerRecord(node=n, sqnr_db=_decibels(v.noise[0]), kept_float=False) for n, v in found.items()]
    return sorted(records, key=lambda r: r.sqnr_db)


def _decibels(share: float) -> float:
    return 200.0 if share == 0 else max(-200.0, min(200.0, -10 * math.log10(share)))


def _measured(work: Compilation, built: Built, ladders: Mapping[str, _Ladder]) -> dict[str, _Ladder]:
    """The ladders with their noise; none where no output is float."""
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
    for index in dict.fromkeys(i for ladder in ladders.values() for i in ladder.rungs):
        names = np.asarray([n for n, ladder in ladders.items() if index in ladder.rungs], dtype=object)
        groups += [(index, list(g)) for g in np.array_split(names, min(_GROUPS, len(names)))]
    noise: dict[tuple[str, int], float] = {}
    with work.progress.task("measure layers", len(groups)) as task:
        for index, group in groups:
            alone = steps[index].model_copy(update={"targets": tuple(f"={n}" for n in group), "ignore": ()})
            passes = tuple(alone if i == index else p for i, p in enumerate(steps) if p.exact or i == index)
            model, _, _ = work.transform(built.recipe.model_copy(update={"passes": passes}))
            session = ReferenceSession(model, precise=not work.target.saturates)
            shares = []
            for feeds, wanted in zip(work.feeds, expected, strict=True):
                found = session.run(feeds)
                shares += [_noise(wanted[k], found[k]) for k in sorted(floats)]
            session.close()
            noise |= dict.fromkeys(((str(n), index) for n in group), float(np.mean(shares)))
            task.advance()
    return {n: replace(v, noise=(*(noise[n, i] for i in v.rungs), 0.0)) for n, v in ladders.items()}


def _noise(wanted: np.ndarray, found: np.ndarray) -> float:
    """Power of the error over that of the signal; 10^20, the worst there is, where the two cannot be compared."""
    finite = np.isfinite(wanted)
    if wanted.shape != found.shape or not np.isfinite(found[finite]).all():
        return 1e20
    x, y = wanted[finite].astype(np.float64), found[finite].astype(np.float64)
    return min(1e20, float(((x - y) ** 2).sum()) / (float((x * x).sum()) or 1.0))


def _ladders(work: Compilation, built: Built) -> dict[str, _Ladder]:
    """Nodes with weights that the recipe quantizes; none where a pass cannot leave any out."""
    steps, found = built.recipe.passes, dict[str, _Ladder]()
    for index, step in enumerate(steps):
        # Layers in float are those of a pass that chooses among floats, too.
        if step.exact or step.floats:
            continue
        if not isinstance(step, GraphPass) or not {"targets", "ignore"} <= set(type(step).model_fields):
            return {}
        model, _, _, memo = work.prepare(tuple(p for p in steps[:index] if p.exact))
        bits = float(getattr(step, "bits", 8))
        plain = {str(n.name): _stored(n, bits) for n in walk(model)}
        changes = step.run(model, work.context(work.engine(built.recipe), memo))
        after = {str(n.name): _stored(n, bits) for n in walk(model)}
        for change in changes:
            if change.detail.split()[0] in _WEIGHTED:
                node = change.node
                below = found.get(node, _Ladder(rungs=(), bits=()))
                before = plain.get(node) or 1.0
                # Kernels that take weights and scales as they are have other nodes in its place.
                kept = after.get(node) or before * bits / _FLOAT_BITS
                found[node] = _Ladder(rungs=(*below.rungs, index), bits=(*below.bits[:-1], kept, before))
    return found


def _stored(node: ir.Node, bits: float) -> float:
    """Of all that a node reads and that does not depend on inputs, in bits; places in tables take ``bits`` each.

    Scales and tables are stored in half precision. They are what makes few bits for kernels of few weights dear.
    """
    total = 0.0
    for value in node.inputs:
        if value is None:
            continue
        tensor, producer = value.const_value, value.producer()
        if tensor is not None and tensor.dtype.is_floating_point():
            total += tensor.size * _FLOAT_BITS
        elif tensor is not None:
            total += tensor.size * (tensor.dtype.bitwidth if tensor.dtype.bitwidth <= 8 else bits)
        elif producer is not None and producer.op_type in _UNPACKING:
            total += _stored(producer, bits)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """One layer goes to another pass, or to float where ``rung`` is beyond its last.

    Attributes:
        gain: Share of noise in the outputs that it takes away.
        worth: The same for each bit that it costs.
    """

    node: str
    rung: int
    gain: float
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """The first ``count`` of ``moves``, beside what layers begin with."""

    base: Mapping[str, int]
    moves: Sequence[_Move]
    count: int

    @property
    def rungs(self) -> dict[str, int]:
        """For each layer the pass that takes it, counted in its ladder."""
        return {**self.base, **{m.node: m.rung for m in self.moves[: self.count]}}

    @property
    def gentler(self) -> int:
        """How many layers are not taken by the first pass that may."""
        return sum(r > 0 for r in self.rungs.values())


def _moves(
    work: Compilation, built: Built, ladders: Mapping[str, _Ladder]
) -> tuple[dict[str, int], list[_Move]]:
    """Where each layer begins, and all that is worth doing, the best first; of one layer in order.

    From each pass a layer goes to that of the others which takes away most noise for its cost: the lower convex hull
    of cost and noise, so that any number of the first moves is the best there is for what it costs. Where sizes are what
    is known, a layer begins with the pass that stores it smallest, which need not be the first: what one gives up
    there is better spent on those that hurt most.
    """
    begin, found = dict[str, int](), list[_Move]()
    for node, ladder in ladders.items():
        # Outputs that are all noise cannot get worse; so that one such layer does not hide all others.
        noise = [n / (1 + n) for n in ladder.noise]
        last = len(ladder.rungs)
        if work.target.runs_here:
            # Where time is measured, how large a layer's weights are says little.
            bits = [float(getattr(built.recipe.passes[i], "bits", 8)) for i in ladder.rungs] + [_FLOAT_BITS]
            at = 0
        else:
            bits = list(ladder.bits)
            at = min(range(last), key=lambda r: (bits[r], noise[r]))
        begin[node] = at
        while at < last:
            costs = {
                r: max(bits[r] - bits[at], 1.0)
                for r in range(last + 1)
                if r == last or (r > at if work.target.runs_here else bits[r] > bits[at])
            }
            best = max(costs, key=lambda r: (noise[at] - noise[r]) / costs[r])
            gain = noise[at] - noise[best]
            found.append(_Move(node=node, rung=best, gain=gain, worth=gain / costs[best]))
            at = best
    return begin, sorted(found, key=lambda m: -m.worth)


def repair(
    work: Compilation, recipe: Recipe, built: Built, *, strict: bool, faster_than: float
) -> Built | None:
    """Treat the layers that hurt most more gently until the limits hold; None where nothing faster than the floor does.

    Layers are ranked by their own measured noise; what is tried is the smallest set that takes away a given share of it.
    They go to the next pass of the recipe that takes them, such as one with more bits, and after the last to float.
    """
    ladders = _ladders(work, built)
    ladders = _measured(work, built, ladders) if ladders else {}
    if not ladders:
        return None

    def carried_out(attempt: _Attempt) -> tuple[Built | None, list[str]]:
        """The candidate, and why it may not ship; None without a reason where nothing is gained by it."""
        name = f"{built.name}-mixed-{attempt.gentler}"
        fixed: Built | None = None
        try:
            passes = _spared(built.recipe.passes, ladders, attempt.rungs)
            fixed = work.build(name, built.recipe.model_copy(update={"passes": passes}))
            fixed.speedup = work.measure(fixed, rounds=RANK[0], budget=RANK[1])
            if not fixed.lossy or ratio(fixed) < faster_than * CLEARLY:
                shutil.rmtree(fixed.folder)
                return None, []
            work.judge(fixed, recipe.limits)
            reasons = shortfalls(fixed, recipe, strict=strict)
        except OptkitError as error:
            reasons = [str(error)]
        if fixed is not None and not reasons:
            fixed.layers = _layers(built.recipe.passes, ladders, attempt.rungs)
            return fixed, []
        logger.info("%s: %s", name, "; ".join(reasons))
        if fixed is not None:
            shutil.rmtree(fixed.folder)
        return None, reasons

    attempts = _attempts(work, built, ladders)
    missed: _Attempt | None = None
    while attempts:
        attempt = attempts.pop(0)
        fixed, reasons = carried_out(attempt)
        if fixed is None and not reasons:
            logger.info(
                "%s: with %d of %d layers in float nothing is gained",
                built.name,
                attempt.gentler,
                len(ladders),
            )
            attempts = [a for a in attempts if a.gentler < attempt.gentler]
        elif fixed is None:
            missed = attempt
        elif missed is None or missed.moves is not attempt.moves or work.target.runs_here:
            # Where time is measured, a few layers more or less are seldom seen in it.
            return fixed
        else:
            return _smaller(fixed, attempt, missed, ladders, carried_out)
    return None


def _smaller(
    fixed: Built,
    attempt: _Attempt,
    missed: _Attempt,
    ladders: Mapping[str, _Ladder],
    carried_out: Callable[[_Attempt], tuple[Built | None, list[str]]],
) -> Built:
    """``fixed``, or what keeps the limits too with fewer moves than ``attempt``, and more than ``missed``."""

    def stored(one: _Attempt) -> float:
        return sum(ladders[node].bits[rung] for node, rung in one.rungs.items()) / 8

    while stored(attempt) - stored(missed) > _APART * fixed.bytes:
        half = replace(attempt, count=(attempt.count + missed.count) // 2)
        if half.count == missed.count:
            break
        found, _ = carried_out(half)
        if found is None:
            missed = half
        else:
            shutil.rmtree(fixed.folder)
            fixed, attempt = found, half
    return fixed


def _attempts(work: Compilation, built: Built, ladders: Mapping[str, _Ladder]) -> list[_Attempt]:
    """What is tried, in this order.

    Where a layer alone makes outputs of another size, or NaN, it goes to float in any case, as no noise counts beside it;
    and before that is tried, with it all layers that decide sizes: which of them do so on a few batches is chance.
    """
    begin, moves = _moves(work, built, ladders)
    shares = _REMOVED if all(len(v.rungs) == 1 for v in ladders.values()) else _REMOVED_BY_BITS

    def beside(in_float: Set[str]) -> list[_Attempt]:
        """More and more of the other layers."""
        others = [m for m in moves if m.node not in in_float]
        base = {node: len(v.rungs) if node in in_float else begin[node] for node, v in ladders.items()}
        if not others:
            return [_Attempt(base=base, moves=[], count=0)]
        share = np.cumsum([m.gain for m in others]) / (sum(m.gain for m in others) or 1.0)
        counts = {min(int(np.searchsorted(share, removed)) + 1, len(others)) for removed in shares}
        counts |= {0} if in_float else set()
        found = [_Attempt(base=base, moves=others, count=count) for count in sorted(counts)]
        # Layers that begin with another pass than the first make more noise until enough is taken away.
        return [
            a for a in found if in_float or _total(ladders, a.rungs) < _total(ladders, dict.fromkeys(base, 0))
        ]

    broken = {node for node, ladder in ladders.items() if ladder.noise[0] > _BROKEN}
    if not broken:
        return beside(broken)
    model, _, _, _ = work.prepare(tuple(p for p in built.recipe.passes if p.exact))
    return [*beside(broken | deciding(model)), *beside(broken)]


def _total(ladders: Mapping[str, _Ladder], rungs: Mapping[str, int]) -> float:
    return sum(ladders[node].noise[rung] for node, rung in rungs.items())


def _spared(
    steps: Sequence[Pass], ladders: Mapping[str, _Ladder], rungs: Mapping[str, int]
) -> tuple[Any, ...]:
    """The passes, each leaving out the layers that are past it; in the order in which they hurt."""
    passes = list[Any](steps)
    for node, rung in rungs.items():
        for index in ladders[node].rungs[:rung]:
            ignore = (*passes[index].ignore, f"={node}")
            passes[index] = passes[index].model_copy(update={"ignore": ignore})
    return tuple(passes)


def _layers(
    steps: Sequence[Any], ladders: Mapping[str, _Ladder], rungs: Mapping[str, int]
) -> list[LayerRecord]:
    """What became of each layer, the noisiest first."""
    records = []
    for node, ladder in ladders.items():
        count, rung = len(ladder.rungs), rungs[node]
        kept = rung == count
        bits = None if kept or count == 1 else getattr(steps[ladder.rungs[rung]], "bits", 8)
        records.append(LayerRecord(node=node, sqnr_db=_decibels(ladder.noise[0]), kept_float=kept, bits=bits))
    return sorted(records, key=lambda r: r.sqnr_db)
