"""Prune a graph by what it is worth: channels until a speed-up is measured, or zeros where kernels are faster for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from optkit.bench import NOISE, Speedup
from optkit.errors import BackendUnavailableError, LimitMissedError, PassError
from optkit.graph import verify
from optkit.narrowing import reach
from optkit.passes.pruning.structured import PruneChannels
from optkit.passes.pruning.zeros import ZeroWeights
from optkit.sparsity import exploited, worth

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.compilation import Compilation
    from optkit.passes.base import GraphPass
    from optkit.rewrite import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A pruned graph.

    Attributes:
        step: The pass that prunes the same from the same graph again.
        changes: What it did.
        measured: Against the unpruned graph, both compiled in float32; None where the target is not this machine.
        missed: What was asked for and not reached, in words.
    """

    graph: ir.Model
    step: GraphPass
    changes: tuple[Change, ...]
    measured: Speedup | None
    keep: Mapping[str, int] = field(default_factory=dict)
    missed: str | None = None


def prune_channels(work: Compilation, step: PruneChannels, folder: Path, wanted: float | None) -> Pruned:
    """Remove channels, heads and features: a share of them, or so many that the graph runs ``wanted`` times as fast.

    Raises:
        BackendUnavailableError: A speed-up is wanted on a target that is not this machine.
        PassError: Nothing would go.
    """
    whole, _, _, _ = work.prepare(())
    context = work.context(work.backend, {})
    measured = missed = None
    if wanted is not None:
        found = reach(whole, step, work.feeds, context, work.backend, _new(folder, "trials"), wanted=wanted)
        step, measured = step.model_copy(update={"keep": dict(found.keep)}), found.measured
        if not found.reached:
            missed = f"{wanted:g}x was asked for, and the narrowest widths reach {found.measured.ratio:.2f}x"
    graph = whole.clone()
    changes = _run(graph, step, work)
    if measured is None and work.target.runs_here:
        measured = worth(whole, graph, work.feeds, context, work.backend, _new(folder, "timed"))
        if missed is None and measured.ci95[1] < 1 - NOISE:
            missed = f"the pruned graph is slower than the unpruned one, {measured.ratio:.2f}x"
    return Pruned(graph=graph, step=step, changes=changes, measured=measured, keep=step.keep, missed=missed)


def zero_weights(work: Compilation, step: ZeroWeights, folder: Path, *, force: bool) -> Pruned:
    """Set weights to 0, where a kernel of the target is faster for it.

    Args:
        force: Do it all the same.

    Raises:
        LimitMissedError: No kernel is; says what was measured.
        BackendUnavailableError: The target is not this machine, so that nothing can be measured.
    """
    whole, _, _, _ = work.prepare(())
    graph = whole.clone()
    changes = _run(graph, step, work)
    if not work.target.runs_here and force:
        return Pruned(graph=graph, step=step, changes=changes, measured=None)
    if not work.target.runs_here:
        raise BackendUnavailableError(
            f"what {_said(step)} is worth on {work.target.name} cannot be measured on this machine",
            hint="--force writes it all the same; time it there with optkit bench",
        )
    context = work.context(work.backend, {})
    measured = worth(whole, graph, work.feeds, context, work.backend, _new(folder, "timed"))
    missed = None
    if not exploited(measured):
        low, high = measured.ci95
        missed = (
            f"{_said(step)} on {work.target.name}: {measured.ratio:.2f}x ({low:.2f} to {high:.2f}), measured: no kernel of "
            f"{work.backend.name} is faster for it"
        )
        if not force:
            raise LimitMissedError(
                missed,
                hint="prune channels instead (--ratio, --speedup); --force writes the zeros all the same",
            )
    return Pruned(graph=graph, step=step, changes=changes, measured=measured, missed=missed)


def _said(step: ZeroWeights) -> str:
    return step.pattern if step.pattern != "any" else f"{step.sparsity:.0%} zeros"


def _run(graph: ir.Model, step: GraphPass, work: Compilation) -> tuple[Change, ...]:
    changes = tuple(step.run(graph, work.context(work.backend, {})))
    verify(graph)
    if not changes:
        raise PassError(f"{step.name}: nothing was pruned", hint="was this model pruned before?")
    return changes


def _new(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path
