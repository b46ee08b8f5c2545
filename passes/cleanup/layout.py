"""Steps that move values about, and back again or on, become one step or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import constant, graphs, rank, read_once, users
from optkit.passes.base import Context, GraphPass
from optkit.passes.cleanup.noops import keeps_shape, same_shape
from optkit.passes.cleanup.shapes import constant_target
from optkit.rewrite import Builder, Change, Names, label, register, remove_unused, replaceable, substitute

_UNARY = frozenset(
    {
        "Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
        "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
        "Softsign", "Sqrt", "Tanh",
    }
)  # fmt: skip
_ELEMENTWISE = _UNARY | {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "And",
    "Or",
    "Xor",
    "Equal",
    "Less",
    "Greater",
    "Where",
}
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})


class CancelLayout(GraphPass):
    """Merge Transposes, Reshapes and Slices that follow each other, also with elementwise operators in between.

    * Reshape, Flatten, Squeeze, Unsqueeze, and Transposes that move nothing but axes of size 1, in a row: one Reshape,
      or nothing where the shape comes out as it went in; also with elementwise operators in between.
    * ``Transpose(Transpose(x))``: one, or nothing.
    * Transposes move through elementwise operators where they meet their inverses, if that leaves fewer nodes.
    * ``Slice(Slice(x))`` along different axes: one Slice. ``Concat(Concat(a, b), c)``: one Concat.

    Values are moved, never computed: all exact.
    """

    name: ClassVar[str] = "cancel-layout"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Merge until nothing more meets."""
        names, changes = Names(model), []
        again = True
        while again:
            again = False
            for graph in graphs(model):
                for node in tuple(graph):
                    if node.graph is not graph or node.domain != "":
                        continue
                    place = label(node)
                    rule = next((name for name, rule in _RULES.items() if rule(node, names)), None)
                    if rule is not None:
                        changes.append(Change(rule=rule, node=place))
                        again = True
        return changes


def _permutation(node: ir.Node) -> list[int] | None:
    axes = rank(node.inputs[0])
    default = None if axes is None else range(axes - 1, -1, -1)
    found = node.attributes.get_ints("perm", default)
    return None if found is None else [int(p) for p in found]


def _inverse(permutation: Sequence[int]) -> list[int]:
    return [int(i) for i in np.argsort(permutation)]


def _keeps_order(node: ir.Node) -> bool:
    """Whether the elements stay in their order in memory and only the shape changes."""
    if node.domain != "" or node.op_type not in _RESHAPES or node.inputs[0] is None:
        return False
    if node.op_type != "Transpose":
        return True
    shape, permutation = shape_of(node.inputs[0]), _permutation(node)
    if shape is None or permutation is None:
        return False
    moved = [p for p in permutation if shape[p] != 1]
    return moved == sorted(moved)


def _merge_reshapes(node: ir.Node, names: Names) -> bool:
    """``node`` and the Reshapes that read it."""
    if not _keeps_order(node):
        return False
    x, middle = node.inputs[0], node.outputs[0]
    assert x is not None
    readers = users(middle)
    done = False
    for reader in readers:
        if reader.graph is node.graph and _keeps_order(reader) and reader.inputs[0] is middle:
            output = reader.outputs[0]
            if _comes_back(x, output) and replaceable(output, x):
                substitute(output, x)
                remove_unused([reader])
                done = True
    if done:
        remove_unused([node])
        return True
    if middle.is_graph_output() or not readers:
        return False
    # All readers go around ``node``, or else it would stay and nothing be gained.
    targets = []
    for reader in readers:
        if reader.graph is not node.graph or not _keeps_order(reader) or reader.inputs[0] is not middle:
            return False
        target = constant_target(shape_of(x), shape_of(reader.outputs[0]))
        if target is None:
            return False
        targets.append(target)
    for reader, target in zip(readers, targets, strict=True):
        new = Builder(reader, names).Reshape(x, np.array(target, np.int64))
        substitute(reader.outputs[0], new)
        remove_unused([reader])
    remove_unused([node])
    return True


def _merge_across(node: ir.Node, names: Names) -> bool:
    """``node`` and a Reshape with elementwise operators between them: these work in the shape before."""
    if not _keeps_order(node) or node.inputs[0] is None:
        return False
    between: list[ir.Node] = []
    value, y = node.inputs[0], node.outputs[0]
    while (above := value.producer()) is not None and read_once(value) and above.graph is node.graph:
        if between and _keeps_order(above):
            break
        operand = _carried(above)
        if operand is None:
            return False
        between.append(above)
        value = operand
    x = (
        above.inputs[0]
        if above is not None and between and _keeps_order(above) and read_once(value)
        else None
    )
    if x is None or x.shape is None or above is None or not all(_works_on(n, x, value) for n in between):
        return False
    target = None if _comes_back(x, y) else constant_target(shape_of(x), shape_of(y))
    last = between[0].outputs[0]
    if (target is None and not _comes_back(x, y)) or (target is None and not replaceable(y, last)):
        return False
    first = between[-1]
    for index, read in enumerate(first.inputs):
        if read is value:
            first.replace_input_with(index, x)
    for inner in between:
        inner.outputs[0].shape = ir.Shape(list(x.shape))
    new = last if target is None else Builder(node, names).Reshape(last, np.array(target, np.int64))
    substitute(y, new)
    remove_unused([node, above])
    return True


def _carried(node: ir.Node) -> ir.Value | None:
    """The one operand of an elementwise node that is not constant."""
    if node.op_type not in _ELEMENTWISE or node.domain != "" or len(node.outputs) != 1:
        return None
    varying = [v for v in node.inputs if v is not None and constant(v) is None]
    return varying[0] if len(varying) == 1 else None


def _works_on(node: ir.Node, x: ir.Value, value: ir.Value) -> bool:
    """Whether the constants of ``node`` mean the same in the shape of ``x`` as in that of ``value``."""
    before, after = shape_of(value), shape_of(x)
    for operand in node.inputs:
        held = operand.const_value if operand is not None else None
        if operand is value or held is None or operand is None or constant(operand) is None:
            continue
        if not before or not after or len(held.shape) > 1:
            return False
        if held.size != 1 and (before[-1] != after[-1] or before[-1] != held.size):
            return False
    return True


def _comes_back(x: ir.Value, y: ir.Value) -> bool:
    if same_shape(x, y):
        return True
    target = constant_target(shape_of(x), shape_of(y))
    return target is not None and x.shape is not None and keeps_shape(list(x.shape), target)


def _merge_transposes(node: ir.Node, names: Names) -> bool:
    """``node`` and the Transpose before it."""
    if node.op_type != "Transpose" or node.inputs[0] is None:
        return False
    before = node.inputs[0].producer()
    if (
        before is None
        or before.op_type != "Transpose"
        or before.domain != ""
        or before.graph is not node.graph
    ):
        return False
    first, second, x = _permutation(before), _permutation(node), before.inputs[0]
    if first is None or second is None or x is None:
        return False
    both = [first[p] for p in second]
    if both == list(range(len(both))):
        if not replaceable(node.outputs[0], x):
            return False
        substitute(node.outputs[0], x)
    elif read_once(before.outputs[0]):
        node.attributes["perm"] = ir.AttrInt64s("perm", both)
        node.replace_input_with(0, x)
    else:
        return False
    remove_unused([node, before])
    return True


def _move_transpose(node: ir.Node, names: Names) -> bool:
    """Take the Transposes off both sides of the elementwise nodes that ``node`` feeds, if that is fewer in all."""
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return False
    permutation = _permutation(node)
    if permutation is None:
        return False
    region = _Region(node, permutation)
    if not region.nodes or region.gain() <= 0:
        return False
    region.rewrite(names)
    return True


class _Region:
    """Elementwise nodes that work on transposed values only.

    Attributes:
        nodes: The elementwise nodes.
        entries: Transposes that feed them.
        exits: Inverse Transposes that read them.
        others: Values they compute that are read, as they are, elsewhere: a Transpose has to be put behind each.
    """

    def __init__(self, start: ir.Node, permutation: list[int]) -> None:
        self.permutation, self.graph = permutation, start.graph
        self.nodes: dict[ir.Node, None] = {}
        self.entries: dict[ir.Node, None] = {}
        self.exits: dict[ir.Node, None] = {}
        self.others: dict[ir.Value, None] = {}
        self._reject: set[ir.Node] = set()
        pending = [start]
        while pending:
            node = pending.pop()
            self.entries[node] = None
            pending += self._follow(node.outputs[0])

    def _follow(self, value: ir.Value) -> list[ir.Node]:
        """Take in what reads ``value``; gives back Transposes that feed it from elsewhere."""
        found: list[ir.Node] = []
        pending = [value]
        while pending:
            value = pending.pop()
            inside = value.producer() in self.nodes
            if inside and value.is_graph_output():
                self.others[value] = None
            for user in users(value):
                if user in self.nodes or user in self._reject:
                    continue
                if inside and self._leaves(user):
                    self.exits[user] = None
                    continue
                entries = self._accepts(user)
                if entries is None:
                    if inside:
                        self.others[value] = None
                    continue
                self.nodes[user] = None
                found += [e for e in entries if e not in self.entries and e not in found]
                pending.append(user.outputs[0])
        return found

    def _leaves(self, user: ir.Node) -> bool:
        return (
            user.op_type == "Transpose" and user.domain == "" and user.graph is self.graph
            and _permutation(user) == _inverse(self.permutation)
        )  # fmt: skip

    def _enters(self, producer: ir.Node) -> bool:
        same = producer.op_type == "Transpose" and producer.domain == "" and producer.graph is self.graph
        return same and _permutation(producer) == self.permutation

    def _accepts(self, user: ir.Node) -> list[ir.Node] | None:
        """The Transposes that feed ``user`` beside the region; None if it has to stay outside."""
        axes = len(self.permutation)
        if (
            user.op_type not in _ELEMENTWISE
            or user.domain != ""
            or user.graph is not self.graph
            or len(user.outputs) != 1
        ):
            return None
        if rank(user.outputs[0]) != axes:
            return None
        entries = []
        for value in user.inputs:
            if value is None:
                continue
            producer = value.producer()
            if producer in self.nodes:
                continue
            if producer is not None and self._enters(producer):
                entries.append(producer)
                continue
            held = value.const_value
            if held is None or constant(value) is None or len(held.shape) > axes or held.size > 1 << 16:
                self._reject.add(user)
                return None
        return entries

    def gain(self) -> int:
        """How many Transposes fewer there would be."""
        inside = self.nodes.keys()
        gone = sum(
            all(user in inside for user in users(entry.outputs[0])) and not entry.outputs[0].is_graph_output()
            for entry in self.entries
        )
        return gone + len(self.exits) - len(self.others)

    def rewrite(self, names: Names) -> None:
        """Let the region work on what was transposed."""
        inverse = _inverse(self.permutation)
        for value in self.others:
            outside = [
                use for use in value.uses() if use.node not in self.nodes and use.node not in self.exits
            ]
            producer = value.producer()
            assert producer is not None
            builder = Builder(producer, names)
            again = builder.Transpose(value, perm=self.permutation)
            moved = again.producer()
            assert moved is not None
            assert producer.graph is not None
            producer.graph.remove(moved)
            producer.append(moved)
            again.type, again.shape = value.type, value.shape
            if value.is_graph_output():
                name, graph = value.name, value.graph
                assert graph is not None
                value.name = names.new(f"{name}/moved")
                again.name = name
                for index, output in enumerate(graph.outputs):
                    if output is value:
                        graph.outputs[index] = again
            for use in outside:
                use.node.replace_input_with(use.idx, again)
        for exit_ in self.exits:
            source = exit_.inputs[0]
            assert source is not None
            substitute(exit_.outputs[0], source)
        for node in self.nodes:
            for index, read in enumerate(node.inputs):
                producer = read.producer() if read is not None else None
                if producer in self.nodes:
                    continue
                if producer is not None and producer in self.entries:
                    node.replace_input_with(index, producer.inputs[0])
                elif (array := constant(read)) is not None and array.size > 1:
                    wide = array.reshape((1,) * (len(inverse) - array.ndim) + array.shape)
                    assert isinstance(node.graph, ir.Graph)
                    name = names.new(f"{label(node)}/c")
                    node.replace_input_with(index, register(node.graph, name, wide.transpose(inverse)))
            for output in node.outputs:
                shape = shape_of(output)
                if shape is not None and not output.is_graph_output():
                    output.shape = ir.Shape([shape[i] for i in inverse])
        remove_unused([*self.exits, *self.entries])


def _merge_slices(node: ir.Node, names: Names) -> bool:
    """``node`` and the Slice before it, along other axes."""
    before = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else None
    if before is None or before.op_type != "Slice" or before.domain != "" or before.graph is not node.graph:
        return False
    if not read_once(before.outputs[0]):
        return False
    axes = rank(before.inputs[0])
    parts = [_slices(n, axes) for n in (before, node)]
    if parts[0] is None or parts[1] is None or {p[2] for p in parts[0]} & {p[2] for p in parts[1]}:
        return False
    columns = [np.array(column, np.int64) for column in zip(*parts[0], *parts[1], strict=True)]
    starts, ends, along, steps = columns
    new = Builder(node, names).Slice(
        before.inputs[0], starts, ends, along, *(() if np.all(steps == 1) else (steps,))
    )
    substitute(node.outputs[0], new)
    remove_unused([node, before])
    return True


def _slices(node: ir.Node, axes: int | None) -> list[tuple[int, int, int, int]] | None:
    """Start, end, axis and step of each axis that a Slice cuts."""
    held = [None if v is None else constant(v) for v in node.inputs[1:]]
    if axes is None or any(v is not None and h is None for v, h in zip(node.inputs[1:], held, strict=True)):
        return None
    starts, ends, *rest = held
    assert starts is not None
    assert ends is not None
    along = rest[0] if rest and rest[0] is not None else np.arange(len(starts))
    steps = rest[1] if len(rest) > 1 and rest[1] is not None else np.ones(len(starts), np.int64)
    return [
        (int(s), int(e), int(a) % axes, int(d)) for s, e, a, d in zip(starts, ends, along, steps, strict=True)
    ]


def _merge_concats(node: ir.Node, names: Names) -> bool:
    """``node`` and the Concats that only it reads, along the same axis."""
    axes = rank(node.outputs[0])
    if node.op_type != "Concat" or axes is None:
        return False
    axis = node.attributes.get_int("axis", 0) % axes
    inputs: list[ir.Value | None] = []
    merged = []
    for value in node.inputs:
        inner = value.producer() if value is not None else None
        if (
            inner is not None and value is not None and inner.op_type == "Concat" and inner.domain == ""
            and inner.graph is node.graph and read_once(value) and inner.attributes.get_int("axis", 0) % axes == axis
        ):  # fmt: skip
            inputs += inner.inputs
            merged.append(inner)
        else:
            inputs.append(value)
    if not merged:
        return False
    new = Builder(node, names).Concat(*inputs, axis=axis)
    substitute(node.outputs[0], new)
    remove_unused([node, *merged])
    return True


_RULES = {
    "merge-reshapes": _merge_reshapes,
    "merge-reshapes-across": _merge_across,
    "merge-transposes": _merge_transposes,
    "move-transpose": _move_transpose,
    "merge-slices": _merge_slices,
    "merge-concats": _merge_concats,
}
