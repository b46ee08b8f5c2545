"""Which nodes a static quantizer takes and which values get a pair: decided from a placement's rows alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx_ir as ir

from optkit.graph import attribute, constant, rank, scalar, users
from optkit.ops import spec
from optkit.placement import Placement, Row
from optkit.qdq import is_quantized


@dataclass(slots=True)
class Plan:
    """The decisions.

    Attributes:
        nodes: Quantized nodes with their rows, in graph order.
        pairs: Values that get a pair, with the value whose range they take (themselves, or where the grid came from).
        owners: Values of ``pairs`` whose every reader reads the integers, because an integer kernel gives no float.
        ends: The values behind each node, and behind what its kernel computes before it stores.
        carried: Values of ``pairs`` that lie on the grid without a pair of their own: integers of one grid, only copied.
        shared: Those whose ranges are one: groups of what ``pairs`` leads to.
        inside: Values that exist only inside a kernel, by the node that reads them there.
        left: ``(node, reason)`` for nodes that have a row but stay as they are.
    """

    nodes: dict[ir.Node, Row] = field(default_factory=dict)
    ends: dict[ir.Node, tuple[ir.Value, ...]] = field(default_factory=dict)
    inside: dict[ir.Node, ir.Value] = field(default_factory=dict)
    pairs: dict[ir.Value, ir.Value] = field(default_factory=dict)
    owners: set[ir.Value] = field(default_factory=set)
    carried: set[ir.Value] = field(default_factory=set)
    shared: list[set[ir.Value]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def around(self, node: ir.Node) -> list[ir.Value]:
        """The values of ``pairs`` that ``node`` reads or makes."""
        made = self.ends.get(node, ())
        return [v for v in (*node.inputs, *node.outputs, *made) if v is not None and v in self.pairs]


def selects(patterns: Sequence[str], node: ir.Node) -> bool:
    """Whether a pattern names the node: ``=`` and its name, or a glob, or ``re:`` and an expression.

    Globs and expressions are also held against the operator and the path of the module that it came from.
    """
    names = (str(node.name), node.op_type, node.metadata_props.get("optkit.module", ""))
    for pattern in patterns:
        if pattern.startswith("="):
            if node.name == pattern[1:]:
                return True
        elif pattern.startswith("re:"):
            if any(re.search(pattern[3:], name) for name in names):
                return True
        elif any(fnmatch.fnmatchcase(name, pattern) for name in names if name):
            return True
    return False


def make_plan(
    graph: ir.Graph,
    placement: Placement,
    targets: Sequence[str],
    ignore: Sequence[str],
    unfit: Mapping[ir.Node, str] = MappingProxyType({}),
) -> Plan:
    """Choose nodes and values.

    Compute nodes with constant float32 weights are taken first; then operators between them whose inputs all lie on a
    grid already. A value gets a pair when a taken node reads it or its producer's kernel gives integers only.

    Args:
        unfit: Nodes that stay in float, each with the reason.
    """
    plan = Plan()
    for node in graph:
        row = placement.rows.get(node.op_type) if node.domain == "" else None
        if row is None or row.role != "compute":
            continue
        reason = unfit.get(node) or _obstacle(node, row, targets, ignore)
        if reason is not None:
            plan.left.append((str(node.name), reason))
            continue
        plan.nodes[node] = row
        plan.ends[node] = (_end(node, row),)
    if not plan.nodes:
        return plan
    grid = {end: end for n, row in plan.nodes.items() if row.output for end in plan.ends[n]}
    chosen = {
        n
        for n in graph
        if n not in unfit and n.domain == "" and selects(targets, n) and not selects(ignore, n)
    }
    _spread(graph, placement, chosen, plan, grid)
    _prune_dangling(plan, grid)
    for node, row in plan.nodes.items():
        known = spec(node)
        assert known is not None
        for value in known.operands(node):
            if value is plan.inside.get(node):
                continue
            if known.weight is None or value is not node.inputs[known.weight] or constant(value) is None:
                plan.pairs.setdefault(value, grid.get(value, value))
        if row.output:
            for end in plan.ends[node]:
                if row.floats and not any(user in plan.nodes for user in users(end)):
                    continue
                plan.pairs.setdefault(end, grid.get(end, end))
                plan.owners.add(end)
    for node, row in plan.nodes.items():
        if row.unify:
            _unite(plan.shared, {plan.pairs[v] for v in plan.around(node)})
            if not row.output:
                plan.carried.update(plan.ends[node])
    return plan


def _unite(groups: list[set[ir.Value]], values: set[ir.Value]) -> None:
    """Add a group, with those that it has something in common with."""
    touched = [g for g in groups if g & values]
    groups[:] = [*(g for g in groups if not g & values), values.union(*touched)]


def _obstacle(node: ir.Node, row: Row, targets: Sequence[str], ignore: Sequence[str]) -> str | None:
    known = spec(node)
    assert known is not None and known.weight is not None
    if not selects(targets, node):
        return "not among the targets"
    if selects(ignore, node):
        return "ignored by the recipe"
    weight = node.inputs[known.weight]
    if is_quantized(weight) or is_quantized(node.inputs[0]):
        return "already quantized"
    if constant(node.inputs[0]) is not None:
        return "its first operand is a constant"
    if weight is None or not weight.is_initializer() or constant(weight) is None:
        return "its second operand is not a constant"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weights are {weight.dtype.name.lower() if weight.dtype else 'untyped'}"
    if (rank(weight) or 0) < 2:
        return "its second operand is a vector"
    if row.max_rank is not None and (rank(weight) or 0) > row.max_rank:
        return f"the integer kernel takes weights of up to {row.max_rank} axes"
    if known.bias is not None and len(node.inputs) > known.bias:
        bias = node.inputs[known.bias]
        if bias is not None and (constant(bias) is None or rank(bias) != 1):
            return "its bias is not a constant vector"
    if node.op_type == "Gemm" and (
        node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0
    ):
        return "alpha or beta is not 1"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its first operand is transposed"
    return None


def _end(node: ir.Node, row: Row) -> ir.Value:
    """The value behind ``node`` and the activation that its kernel absorbs."""
    value = node.outputs[0]
    readers = users(value)
    if len(readers) == 2 and "Swish" in row.absorbs and not value.is_graph_output():
        return swish(value) or value
    if len(readers) != 1 or value.is_graph_output():
        return value
    reader = readers[0]
    if reader.op_type not in row.absorbs or reader.domain != "" or reader.inputs[0] is not value:
        return value
    # Saturation stands for a Clip only where the grid ends at its bounds. At 0 it does; at other lower bounds the
    # rounded zero point lets it reach half a step further.
    if reader.op_type == "Clip":
        low, high = (*reader.inputs[1:3], None, None)[:2]
        if scalar(low) != 0 or (high is not None and scalar(high) is None):
            return value
    return reader.outputs[0]


def swish(x: ir.Value) -> ir.Value | None:
    """``x * Sigmoid(x)``, where nothing else reads ``x`` or the sigmoid."""
    sigmoid = next((n for n in users(x) if n.op_type == "Sigmoid" and n.domain == ""), None)
    if sigmoid is None or sigmoid.outputs[0].is_graph_output():
        return None
    y = sigmoid.outputs[0]
    products = [n for n in users(x) if n is not sigmoid and n.op_type == "Mul" and n.domain == ""]
    alone = bool(products) and users(y) == tuple(products) and set(products[0].inputs) == {x, y}
    return products[0].outputs[0] if alone else None


def _spread(
    graph: ir.Graph,
    placement: Placement,
    chosen: Collection[ir.Node],
    plan: Plan,
    grid: dict[ir.Value, ir.Value],
) -> None:
    """Take the operators between quantized ones whose float inputs are all on a grid."""
    for node in graph:
        row = placement.rows.get(node.op_type)
        known = spec(node)
        if row is None or row.role != "between" or known is None or node not in chosen:
            continue
        operands = known.operands(node)
        if not operands or any(v not in grid or v.dtype != ir.DataType.FLOAT for v in operands):
            continue
        if row.max_rank is not None and (rank(node.outputs[0]) or 99) > row.max_rank:
            continue
        ends = (_end(node, row),) if len(node.outputs) == 1 else tuple(node.outputs)
        if len(ends) > 1 and not known.keeps_grid(node):
            continue
        plan.nodes[node], plan.ends[node] = row, ends
        for end in ends:
            same = known.keeps_grid(node) and end in node.outputs
            grid[end] = grid[operands[0]] if same else end
        if (value := _last_made(operands, row, plan)) is not None:
            plan.inside[node] = value
            del grid[value]
            plan.ends[_maker(value)] = ends


def _last_made(operands: Sequence[ir.Value], row: Row, plan: Plan) -> ir.Value | None:
    """The operand that a kernel has not stored yet when it can compute the node with ``row`` too."""
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    order = list(plan.nodes)
    made = [
        (order.index(node), value)
        for value in operands
        if (node := value.producer()) in plan.nodes
        and node is not None
        and node.op_type in row.into
        and plan.ends[node] == (value,)
        and len(value.uses()) == 1
        and not value.is_graph_output()
    ]
    return max(made, key=lambda m: m[0])[1] if made else None


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _prune_dangling(plan: Plan, grid: dict[ir.Value, ir.Value]) -> None:
    """Drop operators between whose output no quantized node reads: integers would only be made to be unmade."""
    changed = True
    while changed:
        changed = False
        for node, row in tuple(plan.nodes.items()):
            readers = [user for end in plan.ends[node] for user in users(end)]
            if row.role == "between" and not any(user in plan.nodes for user in readers):
                del plan.nodes[node]
                for end in plan.ends.pop(node):
                    grid.pop(end, None)
                if (value := plan.inside.pop(node, None)) is not None:
                    plan.ends[_maker(value)], grid[value] = (value,), value
                changed = True
