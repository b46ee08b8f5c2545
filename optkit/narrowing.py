"""Widths that reach a speed-up: the least important units go where their layers take the longest, until it is measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optkit.backends.base import Backend, Session
from optkit.bench import Speedup, speedup
from optkit.errors import BackendUnavailableError, PassError
from optkit.latency_table import LatencyTable, Layers
from optkit.legalize import legalize
from optkit.passes.base import Context
from optkit.passes.pruning.choose import multiple_for, widths
from optkit.passes.pruning.dependencies import Dependencies, Group
from optkit.passes.pruning.prepare import prepare
from optkit.passes.pruning.surgery import remove_from_copy
from optkit.pipeline import run_passes
from optkit.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.passes.pruning.structured import PruneChannels
    from optkit.targets import Target

logger = logging.getLogger(__name__)

# Widths tried in a group, spread over those that the target runs fast, and how often the goal is corrected by what was measured.
_WIDTHS, _ROUNDS = 8, 10
# What was wanted times this is not too much; of the seconds to save, this share makes no difference.
_CLOSE, _FINE = 1.1, 0.02
# Rounds of timing, and the CPU seconds that they may take.
_RUNS, _BUDGET = 60, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """Widths and what they are worth.

    Attributes:
        keep: Units that stay, by the name of their group.
        gone: Units to remove.
        measured: The pruned graph against the unpruned one, both compiled for the same backend.
        reached: Whether that is what was wanted.
        layers: How many layers of other widths were timed on their own.
    """

    keep: Mapping[str, int]
    gone: frozenset[int]
    measured: Speedup
    reached: bool
    layers: int

    def better_than(self, other: Narrowed) -> bool:
        """Whether it is the one to take: what is enough before what is not, and then what is nearer."""
        if self.reached != other.reached:
            return self.reached
        nearer = self.measured.ratio < other.measured.ratio
        return nearer if self.reached else not nearer


def check_measurable(target: Target, backend: Backend) -> None:
    """Refuse what cannot be measured here.

    Raises:
        BackendUnavailableError: The target is not this machine.
    """
    if not target.runs_here:
        raise BackendUnavailableError(
            f"a speed-up on {target.name} cannot be measured on this machine",
            hint="prune by --ratio, and time the result there with optkit bench",
        )


def reach(
    model: ir.Model,
    options: PruneChannels,
    feeds: Sequence[Mapping[str, np.ndarray]],
    context: Context,
    backend: Backend,
    folder: Path,
    *,
    wanted: float,
) -> Narrowed:
    """Widths for ``PruneChannels.keep`` with which ``model``, which stays as it is, runs ``wanted`` times as fast.

    Raises:
        BackendUnavailableError: The target is not this machine.
        PassError: Nothing can be pruned, or no width is faster.
    """
    check_measurable(context.target, backend)
    twin = model.clone()
    prepare(twin, context)
    found, groups, importance = options.ranked(twin)
    multiple = multiple_for(options.multiple)
    return narrow(
        twin, found, groups, importance, feeds, context, backend, folder, wanted=wanted, multiple=multiple, least=options.least
    )  # fmt: skip


def narrow(
    model: ir.Model,
    found: Dependencies,
    groups: Sequence[Group],
    importance: Mapping[int, np.ndarray],
    feeds: Sequence[Mapping[str, np.ndarray]],
    context: Context,
    backend: Backend,
    folder: Path,
    *,
    wanted: float,
    multiple: int,
    least: float,
) -> Narrowed:
    """Choose widths of ``groups`` so that ``model`` runs ``wanted`` times as fast, measured on one thread.

    Greedy, as NetAdapt (Yang et al. 2018, arXiv:1804.03230) with the latency table of its section 3.3: the step taken is
    the one that saves most time for the importance lost. Differs from it: steps are weighed by the importance of units,
    not by training after each; the goal is corrected until the whole network, compiled, is as fast as wanted.

    Args:
        model: As ``dependencies`` labelled it.
        importance: By index of the group.
        multiple: Kept widths are a multiple of it.
        least: Share of each group that stays at least.

    Raises:
        BackendUnavailableError: The target is not this machine.
        PassError: No width is faster.
    """
    check_measurable(context.target, backend)
    layers = Layers(model, found, groups, feeds[0], LatencyTable(backend))
    ladder = [_ladder(g, multiple, least) for g in groups]
    order = [np.argsort(importance[i], kind="stable") for i in range(len(groups))]
    trial = Trial(model, feeds, context, backend, folder)
    widest = [len(g.units) for g in groups]
    narrowest = [steps[-1] for steps in ladder]
    full, whole = sum(layers.seconds(widest)), trial.seconds()
    # Seconds to save, as the table counts them; what is asked for lies between what is too little and what is enough.
    needed = save = whole * (1 - 1 / wanted)
    low, high = 0.0, math.inf
    best: Narrowed | None = None
    tried: dict[tuple[int, ...], Narrowed] = {}

    def measured(state: list[int]) -> Narrowed:
        gone = frozenset(
            g.units[k]
            for g, n, o in zip(groups, state, order, strict=True)
            for k in o[: len(g.units) - n].tolist()
        )
        timed = trial.race(remove_from_copy(model, found, gone))
        keep = {g.name: n for g, n in zip(groups, state, strict=True) if n < len(g.units)}
        logger.info("%.2fx measured, %.2fx wanted: %s", timed.ratio, wanted, keep)
        reached = timed.ratio >= wanted
        result = tried[tuple(state)] = Narrowed(
            keep=keep, gone=gone, measured=timed, reached=reached, layers=layers.table.entries
        )
        return result

    while len(tried) < _ROUNDS and high - low > _FINE * needed:
        # A layer on its own has costs that it has not inside of a network: what counts is what it saves.
        state = _descend(layers, ladder, importance, order, widest, full - save)
        this = tried.get(tuple(state))
        if state == widest and save > full:
            break
        if this is None and state != widest:
            this = measured(state)
            if best is None or this.better_than(best):
                best = this
        if this is not None and this.reached:
            high = save
            if this.measured.ratio < _CLOSE * wanted:
                break
        else:
            low = save
            if state == narrowest or save > full:
                break
        save = (low + high) / 2 if high < math.inf else 1.25 * save
    if best is not None and not best.reached and tuple(narrowest) not in tried:
        # Where a layer on its own is no faster, the network may be.
        last = measured(narrowest)
        best = last if last.better_than(best) else best
    if best is None:
        sizes = ", ".join(f"{g.name} {len(g.units)}" for g in groups[:5])
        raise PassError(
            f"nothing would be pruned: no narrower layer is faster ({len(groups)} groups of units: {sizes}; widths in multiples "
            f"of {multiple})",
            hint="lower multiple or least",
        )
    return best


def _ladder(group: Group, multiple: int, least: float) -> list[int]:
    """Widths from all units down, at most ``_WIDTHS`` of them."""
    n = len(group.units)
    allowed = [w for w in reversed(widths(group, multiple)) if w >= least * n]
    if len(allowed) <= _WIDTHS:
        return allowed
    return [allowed[i] for i in np.linspace(0, len(allowed) - 1, _WIDTHS).round().astype(int).tolist()]


def _descend(
    layers: Layers,
    ladder: Sequence[Sequence[int]],
    importance: Mapping[int, np.ndarray],
    order: Sequence[np.ndarray],
    start: Sequence[int],
    limit: float,
) -> list[int]:
    """Narrow one group after the other until the layers take less than ``limit``, or nothing is faster."""
    state = list(start)
    ranked = [importance[i][o] / max(float(importance[i].mean()), 1e-30) for i, o in enumerate(order)]
    while sum(now := layers.seconds(state)) > limit:
        best, choice = 0.0, None
        for index, steps in enumerate(ladder):
            n = len(ranked[index])
            for narrower in (s for s in steps if s < state[index]):
                lost = float(ranked[index][n - state[index] : n - narrower].sum())
                saved = layers.saved(now, state, index, narrower)
                # Where a step is no faster, the one after it may be.
                if saved > 0 and (worth := saved / max(lost, 1e-12)) > best:
                    best, choice = worth, (index, narrower)
                if saved > 0:
                    break
        if choice is None:
            break
        state[choice[0]] = choice[1]
    return state


class Trial:
    """Graphs, compiled and timed in turn with the whole one."""

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Mapping[str, np.ndarray]],
        context: Context,
        backend: Backend,
        folder: Path,
    ) -> None:
        self._feeds, self._context, self._backend, self._folder = feeds, context, backend, folder
        self._options = backend.options()
        self._whole = self._built("whole", model.clone())
        self._count = 0

    def seconds(self) -> float:
        """Of the whole graph."""
        with self._open(self._whole) as whole:
            found = speedup(
                whole.run, whole.run, self._feeds, rounds=_RUNS, budget=_BUDGET, seed=self._context.seed
            )
        return min(found.reference.median, found.candidate.median)

    def race(self, model: ir.Model) -> Speedup:
        """Another graph, which is used up, against the whole one."""
        self._count += 1
        path = self._built(f"other-{self._count}", model)
        with self._open(self._whole) as whole, self._open(path) as other:
            return speedup(
                whole.run, other.run, self._feeds, rounds=_RUNS, budget=_BUDGET, seed=self._context.seed
            )

    def _built(self, name: str, model: ir.Model) -> Path:
        run_passes(model, Recipe.load("cleanup").passes, self._context)
        legalize(model, self._backend, self._context.target, name=name)
        path = self._folder / name
        path.mkdir()
        self._backend.lower(model, self._context.target, self._options, path)
        return path

    def _open(self, path: Path) -> Session:
        return self._backend.load(path, self._context.target, self._options, threads=1)
