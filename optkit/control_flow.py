"""Bodies of control flow in the place of their node: the branch that is always taken, and loops of a known length step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, graphs, ints, walk
from optkit.rewrite import Builder, Names, label, remove, substitute

# Nodes that the steps of a loop may become: what is longer is better left a loop.
_MOST = 1 << 14


def flatten(model: ir.Model) -> bool:
    """Write out every If whose condition is constant, and every Loop and Scan whose number of steps is, as far as they are short.

    Constants of a body become constants of the graph, so that steps share them.

    Returns:
        Whether there was any.
    """
    names, found, again = Names(model), False, True
    while again:
        again = False
        for node in [n for n in model.graph if n.domain == "" and n.op_type in BODIES]:
            results = BODIES[node.op_type](node, names)
            if results is not None:
                # What it gives others may read too, and it may be an output of the graph, whose name is its own.
                for old, new in zip(tuple(node.outputs), results, strict=True):
                    substitute(old, Builder(node, names).Identity(new))
                remove(node)
                again = found = True
    return found


def _branch(node: ir.Node, names: Names) -> list[ir.Value] | None:
    condition = constant(node.inputs[0])
    if condition is None or condition.size != 1:
        return None
    body = attribute(node, "then_branch" if condition.reshape(())[()] else "else_branch")
    assert isinstance(body, ir.Graph)
    return _step(node, body, (), names)


def _loop(node: ir.Node, names: Names) -> list[ir.Value] | None:
    """``Loop`` with a constant number of steps that nothing ends before."""
    most, start, *states = (*node.inputs, None, None)[: max(2, len(node.inputs))]
    body = attribute(node, "body")
    assert isinstance(body, ir.Graph)
    steps = None if most is None else constant(most)
    go = np.array(True) if start is None else constant(start)
    if steps is None or go is None or not _goes_on(body):
        return None
    count, carried = int(steps.reshape(())[()]) if go.reshape(())[()] else 0, len(body.inputs) - 2
    if not _is_short(body, count) or (count < 1 and len(node.outputs) > carried):
        return None
    op, rows = Builder(node, names), [list[ir.Value]() for _ in node.outputs[carried:]]
    for index in range(count):
        given = [op.constant(np.array(index, np.int64)), op.constant(np.array(True)), *states]
        _, *results = _step(node, body, given, names)
        states = list(results[:carried])
        for row, value in zip(rows, results[carried:], strict=True):
            row.append(value)
    return [*_values(states), *(_stacked(op, row, 0) for row in rows)]


def _goes_on(body: ir.Graph) -> bool:
    """Whether the condition that a body of Loop gives is always true, or the one that it got."""
    value: ir.Value | None = body.outputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    if value is body.inputs[1]:
        return True
    known = constant(value)
    return known is not None and bool(known.all())


def _scan(node: ir.Node, names: Names) -> list[ir.Value] | None:
    """``Scan`` along axes of a known size."""
    body, several = attribute(node, "body"), node.attributes["num_scan_inputs"].as_int()
    assert isinstance(body, ir.Graph)
    carried = len(node.inputs) - several
    states, sequences = list(node.inputs[:carried]), _values(node.inputs[carried:])
    given = len(node.outputs) - carried
    axes, back = (
        ints(node, "scan_input_axes", [0] * several),
        ints(node, "scan_input_directions", [0] * several),
    )
    onto, turned = (
        ints(node, "scan_output_axes", [0] * given),
        ints(node, "scan_output_directions", [0] * given),
    )
    shape = shape_of(sequences[0])
    count = None if shape is None else shape[axes[0]]
    if not isinstance(count, int) or count < 1 or not _is_short(body, count):
        return None
    op, rows = Builder(node, names), [list[ir.Value]() for _ in range(given)]
    for index in range(count):
        slices = [
            op.Gather(x, np.array(count - 1 - index if reverse else index), axis=axis)
            for x, axis, reverse in zip(sequences, axes, back, strict=True)
        ]
        results = _step(node, body, [*states, *slices], names)
        states = list(results[:carried])
        for row, value in zip(rows, results[carried:], strict=True):
            row.append(value)
    stacked = [
        _stacked(op, row[::-1] if reverse else row, axis)
        for row, axis, reverse in zip(rows, onto, turned, strict=True)
    ]
    return [*_values(states), *stacked]


BODIES = {"If": _branch, "Loop": _loop, "Scan": _scan}


def _is_short(body: ir.Graph, count: int) -> bool:
    return count * sum(1 for _ in walk(body)) <= _MOST


def _values(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    """None of which is left out."""
    return [v for v in values if v is not None]


def _stacked(op: Builder, row: Sequence[ir.Value], axis: int) -> ir.Value:
    """The values of all steps along a new axis."""
    place = np.array([axis], np.int64)
    return op.node("Concat", [op.Unsqueeze(v, place) for v in row], {"axis": axis})[0]


def _step(node: ir.Node, body: ir.Graph, given: Sequence[ir.Value | None], names: Names) -> list[ir.Value]:
    """What one run of ``body`` with these inputs gives; a copy of its nodes in front of ``node``."""
    owner = Builder(node, names).graph
    for name, value in tuple(body.initializers.items()):
        body.initializers.pop(name)
        value.name = names.new(f"{label(node)}/{name}")
        owner.register_initializer(value)
    copy = body.clone(allow_outer_scope_values=True)
    taken = dict(zip(copy.inputs, given, strict=True))
    results = [taken.get(v, v) for v in copy.outputs]
    copy.outputs.clear()
    for formal, actual in taken.items():
        for use in tuple(formal.uses()):
            use.node.replace_input_with(use.idx, actual)
    for part in graphs(copy):
        for value in () if part is copy else (*part.inputs, *part.initializers.values()):
            value.name = names.new(f"{label(node)}/{value.name}")
        for inner in part:
            inner.name = names.new(f"{label(node)}/{inner.name or inner.op_type}")
            inner.metadata_props.update(node.metadata_props)
            for value in inner.outputs:
                if value.name:
                    value.name = names.new(f"{label(node)}/{value.name}")
    nodes = list(copy)
    copy.remove(nodes)
    node.prepend(nodes)
    return _values(results)
