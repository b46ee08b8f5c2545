"""Long axes last, where the hardware pads the last one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import describe, graphs, users
from optkit.passes.base import Context, GraphPass
from optkit.passes.cleanup.shapes import constant_target
from optkit.passes.lowering.reorder import SWAPPED, Order, again, follows, operands, results
from optkit.rewrite import (
    Builder,
    Change,
    Names,
    NearMiss,
    label,
    miss,
    remove_unused,
    replaceable,
    substitute,
)

# Elements of float16 in the 64 bytes that the last axis is padded to.
_LAST = 32
# The last two axes change places; or the last becomes the channels, as convolutions have them.
_ORDERS: tuple[Order, ...] = (SWAPPED, (0, 3, 1, 2))
# What a Transpose costs there beside the bytes that it moves is stated nowhere: the share of the bytes that has to be saved
# where operators outnumber what is put at the borders, and where they do not. A last axis of one element wastes 31 of 32.
_FEW, _MANY = 0.1, 0.5
# Each leaves fewer bytes than the one before; more than two were not seen.
_ROUNDS = 8
_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})

_Move = tuple[str, list[int]] | tuple[()]
"""A Transpose with its permutation, a Reshape with its target, or no step at all."""


class LengthenLastAxis(GraphPass):
    """Compute over axes in another order where the last axis is short and another one is long.

    Before: ``Conv(x)`` with ``x [B, C, S, 1]`` and ``w [O, C, k, 1]``, ``Mul(x, c)`` with ``x [B, S, T, 2]``, and what is between them.
    After: the same over ``[B, C, 1, S]`` with ``w [O, C, 1, k]``, or over ``[B, 2, S, T]``. A Transpose stands where values
    enter and leave, or nothing where a Transpose or a Reshape stood there already.
    Values are moved and computed as before. Only where the target computes best in that layout, and where the operators and
    Transposes together then read and write a tenth fewer bytes, padding counted; half, where the Transposes are not outnumbered.
    "The last axis of an ANE buffer is not packed; it must be contiguous and aligned to 64 bytes", and a singleton one is "padded
    to 64 bytes, which results in 32 times the memory cost in 16-bit" ("Deploying Transformers on the Apple Neural Engine", Apple
    Machine Learning Research, June 2022, principle 1).
    Sizes must be known, but for that of the first axis, which stays the first and is the same for all: it is left out of the count.
    """

    name: ClassVar[str] = "lengthen-last-axis"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Change the order of axes wherever that saves bytes, most first, where the target wants it."""
        if not context.target.convolves:
            return []
        changes, names = list[Change](), Names(model)
        for graph in graphs(model):
            for _ in range(_ROUNDS):
                found = len(changes)
                regions = [r for order in _ORDERS for r in _regions(graph, order)]
                for seen in sorted((r for r in regions if r.worth), key=lambda r: -r.saved):
                    # What was changed before may lie at its border, or in it.
                    now = _Region(seen.start, seen.order) if seen.start.graph is graph else None
                    if now is not None and now.worth:
                        now.rewrite(names)
                        detail = f"{now.before} to {now.after} bytes"
                        changes.append(Change(rule=self.name, node=label(now.start), detail=detail))
                if len(changes) == found:
                    break
            for region in regions:
                region.report(self.name)
        return changes


def _stored(shape: Sequence[Dim | None] | None, order: Sequence[int] | None = None) -> int:
    """Bytes of float16 with the last axis padded; names are left out."""
    known = [d if isinstance(d, int) else 1 for d in shape or ()] or [1]
    dims = known if order is None else [known[a] for a in order]
    return 2 * math.prod(dims[:-1]) * -(-dims[-1] // _LAST) * _LAST


def _regions(graph: ir.Graph, order: Order) -> Iterator[_Region]:
    seen = set[ir.Node]()
    for node in graph:
        if node not in seen and node.op_type != "Transpose" and follows(node, order):
            region = _Region(node, order)
            seen.update(region.nodes)
            yield region


class _Region:
    """Connected operators that can all work over values in another order.

    Attributes:
        start: The operator that it was found from.
        nodes: The operators, in the order of the graph.
        before: Bytes that they and the movers at the borders read and write now.
        after: The same in the other order.
        movers: How many Transposes and Reshapes come at the borders, less those that go.
    """

    def __init__(self, start: ir.Node, order: Order) -> None:
        assert start.graph is not None
        self.start, self.order, self._graph = start, order, start.graph
        self._back = [order.index(a) for a in range(4)]
        self.nodes, self._values = dict[ir.Node, None](), dict[ir.Value, None]()
        self.before = self.after = self.movers = 0
        found, pending = {start}, [start]
        while pending:
            node = pending.pop()
            for value in (*operands(node), *results(node)):
                self._values[value] = None
                above = value.producer()
                for other in (*users(value), *(() if above is None else (above,))):
                    if other not in found and other.graph is start.graph and self._joins(other):
                        found.add(other)
                        pending.append(other)
        self._settle([n for n in start.graph if n in found])
        for node in tuple(self.nodes):
            self._trim(node)

    @property
    def saved(self) -> int:
        """Bytes fewer."""
        return self.before - self.after

    @property
    def worth(self) -> bool:
        """Whether the bytes pay for the movers."""
        return self.saved >= (_FEW if self.movers < len(self.nodes) else _MANY) * self.before

    def _joins(self, node: ir.Node) -> bool:
        if not follows(node, self.order):
            return False
        # A Transpose takes up the move, and ends the region where the other side is no shorter for it.
        far = [v for v in (*operands(node), *results(node)) if v not in self._values]
        return node.op_type != "Transpose" or all(self._stored(v) < _stored(shape_of(v)) for v in far)

    def _stored(self, value: ir.Value) -> int:
        return _stored(shape_of(value), self.order)

    def _shape(self, value: ir.Value) -> list[Dim | None]:
        shape = shape_of(value)
        assert shape is not None
        return [shape[a] for a in self.order]

    def _in_place(self, value: ir.Value) -> bool:
        """Whether the other order moves nothing but axes of one element."""
        shape = shape_of(value)
        assert shape is not None
        moved = [a for a in self.order if shape[a] != 1]
        return moved == sorted(moved)

    def _settle(self, nodes: Sequence[ir.Node]) -> None:
        """Let the region be ``nodes``, and count bytes and movers."""
        self.nodes = dict.fromkeys(nodes)
        self._values = dict.fromkeys(v for n in nodes for v in (*operands(n), *results(n)))
        self.before = self.after = self.movers = 0
        for node in self.nodes:
            for value in (*operands(node), *results(node)):
                self.before += _stored(shape_of(value))
                self.after += self._stored(value)
        for value in self._values:
            if value.producer() not in self.nodes:
                source, move = self._entry(value)
                if source is not value and self._all_inside(value):
                    self.before += _stored(shape_of(source)) + _stored(shape_of(value))
                    self.movers -= 1
                if move:
                    self.after += _stored(shape_of(source)) + self._stored(value)
                    self.movers += 1
                continue
            others = [u for u in users(value) if u not in self.nodes]
            for reader in tuple(others):
                if (step := self._exit(value, reader)) is not None:
                    others.remove(reader)
                    y = _stored(shape_of(reader.outputs[0]))
                    self.before += _stored(shape_of(value)) + y
                    self.after += self._stored(value) + y if step else 0
                    self.movers -= not step
            if others or value.is_graph_output():
                self.after += self._stored(value) + _stored(shape_of(value))
                self.movers += 1

    def _trim(self, node: ir.Node) -> None:
        """Leave out a Transpose at the border, unless more is saved with it inside."""
        if node.op_type != "Transpose":
            return
        inside = [n for v in node.outputs for n in users(v) if n in self.nodes]
        if not inside or all(v.producer() not in self.nodes for v in operands(node)):
            kept, saved = list(self.nodes), self.saved
            self._settle([n for n in kept if n is not node])
            if self.saved < saved:
                self._settle(kept)

    def _all_inside(self, value: ir.Value) -> bool:
        return not value.is_graph_output() and all(u in self.nodes for u in users(value))

    def _entry(self, value: ir.Value) -> tuple[ir.Value, _Move]:
        """What to make ``value`` in the other order of, and how."""
        above = value.producer()
        x = above.inputs[0] if above is not None and above.inputs else None
        if above is None or x is None or above.domain != "" or above.graph is not self._graph:
            return value, ("Transpose", list(self.order))
        if above.op_type == "Transpose":
            before = above.attributes.get_ints("perm", (3, 2, 1, 0))
            assert before is not None
            permutation = [int(before[a]) for a in self.order]
            return x, () if permutation == [0, 1, 2, 3] else ("Transpose", permutation)
        if above.op_type in _RESHAPES and self._in_place(value):
            target = constant_target(shape_of(x), self._shape(value))
            if shape_of(x) == tuple(self._shape(value)):
                return x, ()
            if target is not None:
                return x, ("Reshape", target)
        return value, ("Transpose", list(self.order))

    def _exit(self, value: ir.Value, reader: ir.Node) -> _Move | None:
        """How to make what ``reader`` gives of ``value`` in the other order; None where it has to read it as it is."""
        if reader.domain != "" or reader.graph is not self._graph or reader.inputs[0] is not value:
            return None
        if reader.op_type == "Transpose":
            before = reader.attributes.get_ints("perm", (3, 2, 1, 0))
            assert before is not None
            permutation = [self._back[int(p)] for p in before]
            return () if permutation == [0, 1, 2, 3] else ("Transpose", permutation)
        if reader.op_type in _RESHAPES and self._in_place(value):
            y = shape_of(reader.outputs[0])
            if y == tuple(self._shape(value)):
                return ()
            target = constant_target(self._shape(value), y)
            return None if target is None else ("Reshape", target)
        return None

    def rewrite(self, names: Names) -> None:
        """Let the operators work in the other order."""
        now: dict[ir.Value, ir.Value] = {}
        gone = list(self.nodes)[::-1]
        for node in self.nodes:
            op = Builder(node, names)
            for value in operands(node):
                if value not in now:
                    source, move = self._entry(value)
                    now[value] = _moved(op, source, move)
                    above = value.producer()
                    gone += [above] if above is not None and source is not value else []
            outputs = again(op, node, self.order, now)
            if not results(node):
                substitute(node.outputs[0], outputs[0])
            for value, new in zip(results(node), outputs, strict=False):
                new.type, new.shape, now[value] = value.type, ir.Shape(self._shape(value)), new
        for value in self._values:
            producer = value.producer()
            if producer not in self.nodes:
                continue
            others = [u for u in users(value) if u not in self.nodes]
            for reader in tuple(others):
                if (step := self._exit(value, reader)) is not None:
                    others.remove(reader)
                    op, y = Builder(reader, names), reader.outputs[0]
                    new = _moved(op, now[value], step)
                    substitute(y, new if replaceable(y, new) else op.Identity(new))
                    gone.insert(0, reader)
            if others or value.is_graph_output():
                assert producer is not None
                inside = [use for use in value.uses() if use.node in self.nodes or use.node in gone]
                back = Builder(producer, names).Transpose(now[value], perm=self._back)
                substitute(value, back)
                for use in inside:
                    use.node.replace_input_with(use.idx, value)
        remove_unused(gone)

    def report(self, rule: str) -> None:
        """Say so where padding would be saved and the borders cost too much."""
        inside = sum(_stored(shape_of(v)) - self._stored(v) for v in self._values)
        if inside > 0:
            reason = f"in the order {list(self.order)}, {self.movers} more Transposes, and {self.after} bytes instead of {self.before}"
            miss(NearMiss(rule=rule, node=describe(self.start), reason=reason, depth=len(self.nodes)))


def _moved(op: Builder, value: ir.Value, move: _Move) -> ir.Value:
    if not move:
        return value
    kind, numbers = move
    return (
        op.Transpose(value, perm=numbers)
        if kind == "Transpose"
        else op.Reshape(value, np.array(numbers, np.int64))
    )
