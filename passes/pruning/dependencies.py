"""Read from a graph which channels, heads and features depend on each other.

Every axis of every value gets a label for each position (``labels.py``); each operator says which positions of its
inputs and outputs go together. What is left open can be removed: from all weights at once, and nowhere else.
Operators without a rule freeze what they touch. The idea of groups of coupled structures is that of Fang et al.,
"DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900; here they are read position by position from the
exported graph, so that residuals, concatenations, splits, grouped and depthwise convolutions, and heads that share keys
and values need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.passes.pruning.labelling import Labelling
from optkit.passes.pruning.labels import Axis, Labels

# How often the choice of which axis of a reshape carries channels is revised.
_REVISIONS = 12


@dataclass(slots=True)
class Group:
    """Units that are interchangeable: the channels of a stage, the heads of a layer.

    Attributes:
        name: Of the first weight that makes them; with ``#2`` and so on where that makes several groups.
        units: Labels that stand for them.
        places: Weights with the axes on which the units lie.
        share: Positions of one unit on each of ``places``.
    """

    name: str
    units: list[int]
    places: list[tuple[ir.Value, int]]
    share: list[int]


@dataclass(slots=True)
class Dependencies:
    """The labels of a graph.

    Attributes:
        axes: Of every value that was understood.
        weights: Weights in the order of the graph.
    """

    labels: Labels
    axes: dict[ir.Value, list[Axis]]
    weights: list[ir.Value]

    def obstacles(self) -> list[str]:
        """Why weights must stay as they are, each reason once."""
        arrays = [a for w in self.weights for a in self.axes[w] if isinstance(a, np.ndarray)]
        reasons = (self.labels.reason(x) for a in arrays for x in a.tolist())
        return list(dict.fromkeys(r for r in reasons if r is not None))

    def groups(self) -> list[Group]:
        """What can be removed, in the order of the weights; units whose every weight lies in one place alone stay."""
        where: dict[int, dict[tuple[ir.Value, int], int]] = {}
        for weight in self.weights:
            for axis, labels in enumerate(self.axes[weight]):
                if not isinstance(labels, np.ndarray):
                    continue
                for root in self.labels.roots(labels).tolist():
                    if self.labels.reason(root) is None:
                        places = where.setdefault(root, {})
                        places[weight, axis] = places.get((weight, axis), 0) + 1
        alike: dict[tuple[tuple[int, int, int], ...], Group] = {}
        for root, places in where.items():
            if len(places) < 2:
                continue
            key = tuple((id(w), axis, n) for (w, axis), n in places.items())
            if key not in alike:
                name = str(next(iter(places))[0].name)
                alike[key] = Group(name, [], list(places), list(places.values()))
            alike[key].units.append(root)
        found = [g for g in alike.values() if len(g.units) > 1]
        seen: dict[str, int] = {}
        for group in found:
            seen[group.name] = seen.get(group.name, 0) + 1
            if seen[group.name] > 1:
                # Parts of the same weight, as where channels are split.
                group.name += f"#{seen[group.name]}"
        return found


def dependencies(graph: ir.Graph, frozen: Collection[str] = (), *, even: bool = False) -> Dependencies:
    """Label a graph whose shapes are known.

    Args:
        frozen: Names of weights that must stay as they are.
        even: Pieces of a Split of equal sizes stay equal, as code that says ``chunk(2)`` wants them.
    """
    choices: dict[ir.Node, int] = {}
    for _ in range(_REVISIONS):
        work = Labelling(graph, frozen, choices, even=even)
        work.run()
        if not work.revise():
            break
    return Dependencies(labels=work.labels, axes=work.axes, weights=work.weights)
