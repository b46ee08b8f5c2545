"""Structured pruning: channels, heads and features go from all weights that they touch, and the rest gets smaller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from optkit.errors import PassError
from optkit.passes.base import Attached, Context, GraphPass, TorchPass
from optkit.passes.pruning.choose import (
    by_norm_scale,
    choose,
    keep_exactly,
    magnitude,
    matches,
    multiple_for,
    norm_scales,
    scores,
)
from optkit.passes.pruning.dependencies import Dependencies, Group, dependencies
from optkit.passes.pruning.prepare import prepare
from optkit.passes.pruning.surgery import remove
from optkit.rewrite import Change

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


class PruneChannels(GraphPass):
    """Remove the least important channels, heads and features of a graph, without training.

    Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, with groups of all that depends on a
    unit. The pruned graph computes what the old one does with the removed weights at 0.

    Attributes:
        ratio: Share of the units of each group that goes.
        keep: Units that stay, by the name of the group, in place of ``ratio``; other groups stay whole. ``optkit prune
            --speedup`` writes it.
        criterion: ``magnitude``, or ``norm-scale``: the factor of the batch norm behind a layer.
        together: Compare units of different groups instead of taking the same share of each.
        multiple: Kept widths are a multiple of it; None: as the target runs fast.
        least: Share of each group that stays at least.
        targets: Globs, or ``re:`` expressions, of weights; a group is taken where one of its weights is named.
        ignore: The same, for what stays.
    """

    name: ClassVar[str] = "prune-channels"
    exact: ClassVar[bool] = False

    ratio: float = Field(default=0.5, gt=0, lt=1)
    keep: dict[str, int] = Field(default_factory=dict)
    criterion: Literal["magnitude", "norm-scale"] = "magnitude"
    together: bool = False
    multiple: int | None = Field(default=None, ge=1)
    least: float = Field(default=0.1, ge=0, le=1)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Read the dependencies, choose, cut; a graph that was cut is left alone."""
        if model.metadata_props.get("optkit.pruned") == self.name:
            return []
        prepare(model, context)
        found, groups, importance = self.ranked(model)
        if self.keep:
            gone = keep_exactly(groups, importance, self.keep)
        else:
            multiple = multiple_for(self.multiple)
            gone = choose(groups, importance, self.ratio, multiple, together=self.together, least=self.least)
        changes = described(self.name, groups, gone)
        remove(model, found, gone)
        model.metadata_props["optkit.pruned"] = self.name
        return changes

    def ranked(self, model: ir.Model) -> tuple[Dependencies, list[Group], dict[int, np.ndarray]]:
        """Of a prepared graph, the dependencies, the groups to prune and the importance of their units."""
        found = dependencies(model.graph)
        groups = selected(found, self.targets, self.ignore)
        score = magnitude if self.criterion == "magnitude" else by_norm_scale(norm_scales(model.graph))
        return found, groups, {i: scores(found, g, score) for i, g in enumerate(groups)}


class PruneStructured(TorchPass):
    """Remove the least important channels, heads and features of a module before it is trained.

    Dependencies are read from the exported graph; the module's own parameters become smaller, and so do the numbers
    that its layers know them by. The result is compared with the graph: the same outputs, or the group stays whole.

    Attributes:
        ratio: Share of the units of each group that goes.
        speedup: In place of ``ratio``: how many times as fast the compiled module is to be, measured on this machine.
        criterion: ``magnitude`` (Li et al. 2017); ``norm-scale`` (Liu et al. 2017); ``taylor``: the squared sum of weight
            times gradient (Molchanov et al. 2019, arXiv:1906.10771, eq. 8), which needs ``loss=``; ``wanda``: weights
            times the norm of what they are multiplied with (Sun et al. 2024, arXiv:2306.11695), summed over a unit's
            columns.
        together: Compare units of different groups instead of taking the same share of each.
        multiple: Kept widths are a multiple of it; None: as the target runs fast.
        least: Share of each group that stays at least.
        targets: Globs, or ``re:`` expressions, of weights or module paths.
        ignore: The same, for what stays.
    """

    name: ClassVar[str] = "prune-structured"
    exact: ClassVar[bool] = False

    ratio: float = Field(default=0.5, gt=0, lt=1)
    speedup: float | None = Field(default=None, gt=1)
    criterion: Literal["magnitude", "norm-scale", "taylor", "wanda"] = "magnitude"
    together: bool = False
    multiple: int | None = Field(default=None, ge=1)
    least: float = Field(default=0.1, ge=0, le=1)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def attach(self, module: Any, context: Context) -> Attached:
        """Cut the module."""
        from optkit.passes.pruning.modules import attach

        return attach(self, module, context)


def selected(found: Dependencies, targets: Sequence[str], ignore: Sequence[str]) -> list[Group]:
    """The groups that patterns choose.

    Raises:
        PassError: There is none.
    """
    groups = found.groups()
    chosen = [g for g in groups if matches(g, targets) and not matches(g, ignore)]
    if not chosen:
        if groups:
            raise PassError(
                f"pruned 0 of {len(groups)} groups: none is named by targets and not by ignore",
                hint=f"groups are named by their weights: {', '.join(g.name for g in groups[:5])}",
            )
        reasons = found.obstacles()
        raise PassError(f"pruned 0 of 0 groups: nothing can go ({'; '.join(reasons[:5]) or 'no weights'})")
    return chosen


def described(rule: str, groups: Sequence[Group], gone: set[int]) -> list[Change]:
    """One change for every group that lost units."""
    changes = []
    for group in groups:
        lost = sum(unit in gone for unit in group.units)
        if lost:
            n = len(group.units)
            detail = f"{n} -> {n - lost} units of {group.share[0]}, in {len(group.places)} weights"
            changes.append(Change(rule=rule, node=group.name, detail=detail))
    return changes
