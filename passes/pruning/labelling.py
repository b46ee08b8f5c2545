"""One walk over a graph that gives every axis of every value labels."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from optkit.graph import subgraphs
from optkit.passes.pruning import arithmetic, moves, reshapes
from optkit.passes.pruning.labels import Axis, Labels

Axes = list[Axis]

_NOTHING = "Constant ConstantOfShape Shape Size Range NonZero RandomNormal RandomUniform"


class Labelling:
    """The labels of a graph, and what its operators say of them.

    Attributes:
        labels: All of them.
        axes: Of every value that was understood.
        weights: Weights in the order of the graph.
        even: Pieces of a Split of equal sizes stay equal.
        choices: By reshape, which of its axes that could carry channels does.
        candidates: By reshape, those axes.
    """

    def __init__(
        self, graph: ir.Graph, frozen: Collection[str], choices: dict[ir.Node, int], *, even: bool
    ) -> None:
        self._graph, self.choices, self.even = graph, choices, even
        self.labels = Labels()
        self.axes: dict[ir.Value, Axes] = {}
        self.weights: list[ir.Value] = []
        self.candidates: dict[ir.Node, list[Axis]] = {}
        for value in graph.initializers.values():
            if value.const_value is None or value.dtype is None or not value.dtype.is_floating_point():
                continue
            self.axes[value] = self.fresh(value)
            self.weights.append(value)
            if value.name in frozen:
                self.freeze(value, "asked to stay")
        for value in graph.inputs:
            self.axes[value] = self.fresh(value)
            self.freeze(value, "an input of the model")

    def run(self) -> None:
        """Label all values."""
        for node in self._graph:
            rule = RULES.get(node.op_type) if node.domain == "" else None
            shaped = all(v.shape is not None for v in (*node.inputs, *node.outputs[:1]) if v is not None)
            if rule is None or not shaped or any(True for _ in subgraphs(node)):
                self.unknown(node)
            else:
                rule(self, node)
            for output in node.outputs:
                if output not in self.axes:
                    self.axes[output] = self.fresh(output)
                    self.freeze(output, f"made by {node.op_type}")
        for value in self._graph.outputs:
            self.freeze(value, "an output of the model")

    def revise(self) -> bool:
        """Let another axis of a reshape carry the channels where the chosen one cannot; whether something changed."""
        changed = False
        for node, axes in self.candidates.items():
            chosen = self.choices.get(node, 0)
            if chosen + 1 < len(axes) and self.labels.is_frozen(axes[chosen]):
                self.choices[node] = chosen + 1
                changed = True
        return changed

    def fresh(self, value: ir.Value) -> Axes:
        """New labels; an axis of one position is nobody's channel."""
        if value.shape is None:
            return []
        made = [self.labels.fresh(d) if isinstance(d, int) else None for d in value.shape]
        for axis in made:
            if axis is not None and len(axis) == 1:
                self.labels.freeze(axis, "a single position")
        return list(made)

    def of(self, value: ir.Value | None) -> Axes:
        """The axes of a value."""
        assert value is not None
        if value not in self.axes:
            # Integers, and floats out of nowhere.
            self.axes[value] = self.fresh(value)
            self.freeze(value, "not a result of weights")
        return self.axes[value]

    def freeze(self, value: ir.Value, why: str) -> None:
        for axis in self.of(value):
            self.labels.freeze(axis, why)

    def unknown(self, node: ir.Node) -> None:
        """Freeze all that ``node`` and its bodies read."""
        why = f"read by {node.op_type}, which pruning does not look into"
        inner = [v for body in subgraphs(node) for n in body.all_nodes() for v in n.inputs]
        for value in (*node.inputs, *inner):
            if value is not None and (value in self.axes or value.graph is self._graph):
                self.freeze(value, why)

    def one(self) -> np.ndarray:
        """The labels of an axis of a single position."""
        axis = self.labels.fresh(1)
        self.labels.freeze(axis, "a single position")
        return axis


RULES: dict[str, Callable[[Labelling, ir.Node], None]] = {
    **dict.fromkeys(_NOTHING.split(), lambda work, node: None),
    **arithmetic.RULES,
    **moves.RULES,
    **reshapes.RULES,
}
