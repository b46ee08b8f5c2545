"""Which units go: scores from the weights, and how many stay."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.errors import PassError
from optkit.passes.pruning.dependencies import Dependencies, Group

# Of a weight and one of its axes, the importance of each position.
Score = Callable[[ir.Value, int], np.ndarray]

# Kernels work on blocks of 16 channels: on processors, other widths were measured slower than the unpruned network.
_BLOCK = 16


def multiple_for(asked: int | None) -> int:
    """Of what number kept widths are a multiple."""
    return _BLOCK if asked is None else asked


def magnitude(weight: ir.Value, axis: int) -> np.ndarray:
    """Sum of squares of the weights of a position (Li et al. 2017, arXiv:1608.08710, with the second power).

    Biases and what norms hold do not count: a variance says nothing of importance.
    """
    assert weight.const_value is not None
    if len(weight.const_value.shape) < 2:
        return np.zeros(weight.const_value.shape.numpy()[axis])
    array = np.moveaxis(weight.const_value.numpy().astype(np.float64), axis, 0)
    total: np.ndarray = np.square(array.reshape(len(array), -1)).sum(1)
    return total


def norm_scales(graph: ir.Graph) -> frozenset[str]:
    """Names of the weights that batch norms multiply by."""
    return frozenset(
        str(node.inputs[1].name)
        for node in graph
        if node.op_type == "BatchNormalization" and node.inputs[1] is not None
    )


def by_norm_scale(names: Collection[str]) -> Score:
    """The factor of the batch norm alone (Liu et al. 2017, "Network Slimming", arXiv:1708.06519)."""

    def score(weight: ir.Value, axis: int) -> np.ndarray:
        assert weight.const_value is not None
        found = weight.const_value.numpy().astype(np.float64)
        if weight.name not in names:
            return np.zeros(found.shape[axis])
        result: np.ndarray = np.abs(found)
        return result

    return score


def scores(found: Dependencies, group: Group, score: Score) -> np.ndarray:
    """Importance of each unit of a group: the sum over its positions, per position of a weight."""
    total = {unit: 0.0 for unit in group.units}
    for weight, axis in group.places:
        labels = found.axes[weight][axis]
        assert isinstance(labels, np.ndarray)
        each = score(weight, axis)
        for root, value in zip(found.labels.roots(labels).tolist(), each.tolist(), strict=True):
            if root in total:
                total[root] += value
    return np.asarray([total[unit] for unit in group.units])


def matches(group: Group, patterns: Sequence[str]) -> bool:
    """Whether a pattern names one of the group's weights or the module that holds it."""
    names = {str(w.name) for w, _ in group.places}
    return named(names | {name.rpartition(".")[0] for name in names}, patterns)


def named(names: Collection[str], patterns: Sequence[str]) -> bool:
    """Whether a pattern, glob or ``re:``, names one of ``names``."""
    return any(
        bool(re.search(p[3:], name)) if p.startswith("re:") else fnmatch.fnmatchcase(name, p)
        for p in patterns
        for name in names
    )


def step(group: Group, multiple: int) -> int:
    """How many units make up a multiple of ``multiple`` positions on the axis of the weights that make them."""
    return multiple // math.gcd(multiple, group.share[0])


def widths(group: Group, multiple: int) -> list[int]:
    """Numbers of units that may stay, fewest first, all of them last."""
    block, n = step(group, multiple), len(group.units)
    return [*range(block, n, block), n]


def choose(
    groups: Sequence[Group],
    importance: Mapping[int, np.ndarray],
    ratio: float,
    multiple: int,
    *,
    together: bool,
    least: float,
) -> set[int]:
    """Units to remove: the least important, so many that widths stay multiples of ``multiple``.

    Args:
        importance: By index of the group.
        ratio: Share of the units that goes, before rounding up what stays.
        together: Compare units of all groups, each against the mean of its group; else each group loses ``ratio``.
        least: Share of each group that stays at least.

    Raises:
        PassError: Nothing would go.
    """
    if together:
        relative = [s / max(float(s.mean()), 1e-30) for s in importance.values()]
        everything = np.sort(np.concatenate(relative))
        limit = everything[min(int(len(everything) * ratio), len(everything) - 1)]
        wanted = [int((r >= limit).sum()) for r in relative]
    else:
        wanted = [round(len(g.units) * (1 - ratio)) for g in groups]
    gone: set[int] = set()
    for index, (group, n) in enumerate(zip(groups, wanted, strict=True)):
        stay = next(w for w in widths(group, multiple) if w >= max(n, math.ceil(least * len(group.units)), 1))
        order = np.argsort(importance[index], kind="stable")
        gone |= {group.units[k] for k in order[: len(group.units) - stay].tolist()}
    if not gone:
        sizes = ", ".join(f"{g.name} {len(g.units)}" for g in groups[:5])
        raise PassError(
            f"nothing would be pruned: {len(groups)} groups of units ({sizes or 'none'}), share {ratio:g}, widths in "
            f"multiples of {multiple}",
            hint="raise ratio, or lower multiple where the target runs other widths as fast",
        )
    return gone


def keep_exactly(
    groups: Sequence[Group], importance: Mapping[int, np.ndarray], keep: Mapping[str, int]
) -> set[int]:
    """Units to remove so that ``keep`` of each named group stay, the most important.

    Raises:
        PassError: A group is not known, has not so many units, or nothing would go.
    """
    known = {g.name: (index, g) for index, g in enumerate(groups)}
    gone: set[int] = set()
    for name, n in keep.items():
        if name not in known:
            raise PassError(
                f"keep: no group is called {name!r}", hint=f"groups: {', '.join(list(known)[:8])}"
            )
        index, group = known[name]
        if not 0 < n <= len(group.units):
            raise PassError(f"keep: {name} has {len(group.units)} units, and {n} cannot stay")
        order = np.argsort(importance[index], kind="stable")
        gone |= {group.units[k] for k in order[: len(group.units) - n].tolist()}
    if not gone:
        raise PassError("nothing would be pruned: keep names all units of its groups", hint="keep fewer")
    return gone
