"""Fewer axes for tensors that have more than the hardware takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import constant, graphs, rank, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, remove_unused, substitute

_ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "Less", "Log", "Max",
    "Min", "Mul", "Neg", "Not", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Tanh", "Where",
})  # fmt: skip
_INSIDE = _ELEMENTWISE | {"Gather", "Slice", "Transpose"}
_ENTRIES = ("Reshape", "Unsqueeze")

Place = tuple[ir.Value, int]


class JoinAxes(GraphPass):
    """Let runs of axes that nothing takes apart be one, where a tensor has more axes than the target takes.

    Before: ``Slice(Mul(Reshape(x, [B, Q, H, L, P, 2]), s))``, six axes, as deformable attention has them.
    After: the same over ``[B * Q, H, L, P, 2]``, and a Reshape behind it where what comes out has few enough axes again.
    Only between Reshapes or Unsqueezes before and Reshapes, or Gathers that take away an axis, behind; values are moved
    and none is computed otherwise. Core ML takes five axes (coremltools, ``Var``), the Neural Engine works on four: "Deploying
    Transformers on the Apple Neural Engine" (Apple Machine Learning Research, June 2022), principle 1.
    """

    name: ClassVar[str] = "join-axes"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Merge in every region of tensors with too many axes, where the target says how many it takes."""
        most = context.target.axes
        if most is None:
            return []
        changes, names = [], Names(model)
        for graph in graphs(model):
            for node in tuple(graph):
                if node.graph is not graph or not _enters(node, most):
                    continue
                region = _Region(node, most)
                if region.merge(most):
                    changes.append(Change(rule=self.name, node=str(node.name)))
                    region.rewrite(names)
        return changes


def _wide(value: ir.Value | None, most: int) -> bool:
    return value is not None and (rank(value) or 0) > most


def _enters(node: ir.Node, most: int) -> bool:
    return node.domain == "" and node.op_type in _ENTRIES and _wide(node.outputs[0], most) and not _wide(node.inputs[0], most)  # fmt: skip


class _Region:
    """What is connected by values of too many axes.

    Attributes:
        entries: Reshapes and Unsqueezes that make them.
        inside: Nodes that read them; ``exits`` are the Reshapes among the readers.
        groups: For each axis of each value, the first of those that are the same axis of one space.
        merged: Axes, by their groups, that are one with the next.
    """

    def __init__(self, start: ir.Node, most: int) -> None:
        self.entries: dict[ir.Node, None] = {}
        self.inside: dict[ir.Node, None] = {}
        self.exits: dict[ir.Node, None] = {}
        self.sound = True
        self._parent: dict[Place, Place] = {}
        self._pinned: set[Place] = set()
        self.merged: set[Place] = set()
        self._most = most
        pending = [start]
        while pending and self.sound:
            node = pending.pop()
            if node in self.entries or node in self.inside or node in self.exits:
                continue
            pending += self._take(node, start)
        # In the order of the graph.
        self.inside = dict.fromkeys(n for n in (start.graph or ()) if n in self.inside)
        for node in self.inside:
            if self.sound:
                self._bind(node)

    def _take(self, node: ir.Node, start: ir.Node) -> list[ir.Node]:
        """Put a node where it belongs; what is connected with it."""
        if node.domain != "" or node.graph is not start.graph or len(node.outputs) != 1:
            self.sound = False
            return []
        if _enters(node, self._most):
            self.entries[node] = None
            values: list[ir.Value | None] = [node.outputs[0]]
        elif node.op_type == "Reshape" and not _wide(node.outputs[0], self._most):
            target = constant(node.inputs[1]) if node.inputs[1] is not None else None
            # A 0 stands for the size of the axis in its place, which it may no longer be.
            self.sound = target is not None and not (target == 0).any()
            self.exits[node] = None
            values = [node.inputs[0]]
        elif node.op_type in _INSIDE:
            self.inside[node] = None
            values = [*node.inputs, node.outputs[0]]
        else:
            self.sound = False
            return []
        found: list[ir.Node] = []
        for value in values:
            if not _wide(value, self._most) or value is None or constant(value) is not None:
                continue
            producer, shape = value.producer(), shape_of(value)
            if producer is None or value.is_graph_output() or shape is None or None in shape:
                self.sound = False
                return []
            found += [producer, *users(value)]
        return found

    def _root(self, place: Place) -> Place:
        while (above := self._parent.setdefault(place, place)) != place:
            place = above
        return place

    def _same(self, a: Place, b: Place) -> None:
        self._parent[self._root(a)] = self._root(b)

    def _bind(self, node: ir.Node) -> None:
        """Say which axes of its inputs and of its output are the same, and which it takes apart."""
        out, x = node.outputs[0], node.inputs[0]
        if any(
            shape_of(v) is None or None in (shape_of(v) or ()) for v in (*node.inputs, out) if v is not None
        ):
            self.sound = False
        elif node.op_type in _ELEMENTWISE:
            for value in node.inputs:
                if value is not None:
                    size, wide = len(shape_of(value) or ()), len(shape_of(out) or ())
                    for i in range(size):
                        self._same((value, i), (out, wide - size + i))
        elif node.op_type == "Transpose":
            assert x is not None
            for i, p in enumerate(node.attributes.get_ints("perm", ()) or ()):
                self._same((x, int(p)), (out, i))
        elif node.op_type == "Slice":
            assert x is not None
            axes = _slice_axes(node)
            self.sound = axes is not None
            for i in range(len(shape_of(x) or ())):
                self._same((x, i), (out, i))
            self._pinned.update((x, a) for a in axes or ())
        else:
            self._bind_gather(node)

    def _bind_gather(self, node: ir.Node) -> None:
        x, indices, out = node.inputs[0], node.inputs[1], node.outputs[0]
        held = None if indices is None else constant(indices)
        if x is None or held is None or held.ndim > 1 or constant(x) is not None:
            self.sound = False
            return
        size = len(shape_of(x) or ())
        axis = (node.attributes.get_int("axis", 0) or 0) % size
        self._pinned.add((x, axis))
        for i in range(size):
            if i != axis or held.ndim == 1:
                self._same((x, i), (out, i - (i > axis and held.ndim == 0)))

    def _values(self) -> Iterator[ir.Value]:
        seen: dict[ir.Value, None] = {}
        for node in (*self.entries, *self.inside):
            inputs = () if node in self.entries else _operands(node)
            seen.update(dict.fromkeys(v for v in (*inputs, *node.outputs) if v is not None))
        yield from seen

    def _axes(self, value: ir.Value) -> list[Place]:
        return [self._root((value, i)) for i in range(len(shape_of(value) or ()))]

    def merge(self, most: int) -> bool:
        """Find axes to merge until no value has more than ``most``."""
        if not self.sound:
            return False
        values = list(self._values())
        pinned = {self._root(p) for p in self._pinned}
        sizes: dict[Place, Dim] = {}
        for value in values:
            for place, size in zip(self._axes(value), shape_of(value) or (), strict=True):
                assert size is not None
                if size != 1 and sizes.setdefault(place, size) != size and place not in pinned:
                    return False
        widest = max(values, key=lambda v: len(shape_of(v) or ()))
        for a, b in zip(self._axes(widest), self._axes(widest)[1:], strict=False):
            if all(len(self._shape(v)) <= most for v in values):
                break
            if not {a, b} & pinned and all(self._agree(v, a, b, sizes) for v in values):
                self.merged.add(a)
        return all(
            len(s) <= most and sum(isinstance(d, str) for d in s) <= 1
            for s in (self._shape(v) for v in values)
        )

    def _agree(self, value: ir.Value, a: Place, b: Place, sizes: dict[Place, Dim]) -> bool:
        """Whether ``b`` follows ``a`` in a value, or neither is there; each with all its size, or 1."""
        axes, shape = self._axes(value), shape_of(value) or ()
        if a not in axes and b not in axes:
            return True
        if a not in axes or b not in axes or axes.index(b) != axes.index(a) + 1:
            return False
        pair = shape[axes.index(a)], shape[axes.index(b)]
        return pair in ((1, 1), (sizes.get(a, 1), sizes.get(b, 1)))

    def _shape(self, value: ir.Value) -> list[Dim]:
        """After merging; a product with a name in it is the name."""
        found: list[Dim] = []
        joined = False
        for place, size in zip(self._axes(value), shape_of(value) or (), strict=True):
            assert size is not None
            if joined:
                before = found[-1]
                found[-1] = before * size if isinstance(before, int) and isinstance(size, int) else _product(before, size)  # fmt: skip
            else:
                found.append(size)
            joined = place in self.merged
        return found

    def _target(self, value: ir.Value) -> np.ndarray:
        return np.array([d if isinstance(d, int) else -1 for d in self._shape(value)], np.int64)

    def rewrite(self, names: Names) -> None:
        """Compute over the merged axes."""
        now: dict[ir.Value, ir.Value] = {}
        for node in self.entries:
            now[node.outputs[0]] = Builder(node, names).Reshape(node.inputs[0], self._target(node.outputs[0]))
        for node in self.inside:
            op, out = Builder(node, names), node.outputs[0]
            operands = [None if v is None else self._operand(op, v, now) for v in _operands(node)]
            kept = {a.name: a for a in node.attributes.values()}
            new = op.node(node.op_type, [*operands, *self._others(node)], kept | self._moved(node))[0]
            if _wide(out, self._most):
                now[out] = new
            else:
                back = [d if isinstance(d, int) else -1 for d in shape_of(out) or ()]
                same = self._shape(out) == list(shape_of(out) or ())
                substitute(out, new if same else op.Reshape(new, np.array(back, np.int64)))
        for node in self.exits:
            assert node.inputs[0] is not None
            node.replace_input_with(0, now[node.inputs[0]])
        remove_unused([*list(self.inside)[::-1], *self.entries])

    def _operand(self, op: Builder, value: ir.Value, now: dict[ir.Value, ir.Value]) -> ir.Value:
        if value in now:
            return now[value]
        held = constant(value)
        if self._shape(value) == list(shape_of(value) or ()):
            return value
        if held is not None:
            return op.constant(np.ascontiguousarray(held.reshape([int(d) for d in self._shape(value)])))
        return op.Reshape(value, self._target(value))

    def _place(self, value: ir.Value | None, axis: int) -> int:
        """Where an axis lies after merging."""
        assert value is not None
        return axis - sum(p in self.merged for p in self._axes(value)[:axis])

    def _others(self, node: ir.Node) -> list[ir.Value | np.ndarray | None]:
        """Inputs that are no tensors of the region."""
        if node.op_type == "Slice":
            axes = [self._place(node.inputs[0], a) for a in _slice_axes(node) or ()]
            return [*node.inputs[1:3], np.array(axes, np.int64), *node.inputs[4:]]
        return list(node.inputs[1:]) if node.op_type == "Gather" else []

    def _moved(self, node: ir.Node) -> dict[str, object]:
        """Attributes that name axes."""
        x = node.inputs[0]
        if node.op_type == "Gather":
            return {
                "axis": self._place(x, (node.attributes.get_int("axis", 0) or 0) % len(shape_of(x) or ()))
            }
        if node.op_type == "Transpose":
            axes = self._axes(node.outputs[0])
            permutation = [int(p) for p in node.attributes.get_ints("perm", ()) or ()]
            # The first of each run stands for it.
            kept = [p for i, p in enumerate(permutation) if not (i and axes[i - 1] in self.merged)]
            return {"perm": [self._place(x, p) for p in kept]}
        return {}


def _operands(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs[:1] if node.op_type in ("Gather", "Slice") else node.inputs


def _product(a: Dim, b: Dim) -> Dim:
    if 1 in (a, b):
        return b if a == 1 else a
    return f"{a}*{b}"


def _slice_axes(node: ir.Node) -> list[int] | None:
    """The axes that a Slice cuts; None where they are not known."""
    x, starts = node.inputs[0], node.inputs[1]
    given = node.inputs[3] if len(node.inputs) > 3 else None
    size = rank(x) or 0
    held = constant(given) if given is not None else None
    if given is None:
        count = constant(starts) if starts is not None else None
        return None if count is None else list(range(count.size))
    return None if held is None else [int(a) % size for a in held.reshape(-1)]
