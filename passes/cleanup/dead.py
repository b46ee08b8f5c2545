"""What nothing reads goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx
import onnx_ir as ir

from optkit.graph import OPSET, attribute, graphs, subgraphs, walk
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, label, remove


class RemoveDead(GraphPass):
    """Remove nodes, initializers, functions, and optional outputs of nodes, that nothing reads; bodies included."""

    name: ClassVar[str] = "remove-dead"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Remove what nothing reads."""
        changes: list[Change] = []
        while found := remove_nodes(model.graph):
            changes += found
        for graph in graphs(model):
            for name, value in tuple(graph.initializers.items()):
                if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                    graph.initializers.pop(name)
                    changes.append(Change(rule="remove-initializer", node=name))
        changes += _remove_functions(model)
        return changes


def remove_nodes(graph: ir.Graph) -> list[Change]:
    """Remove nodes that nothing reads, and optional outputs; backwards, so that one walk removes whole chains."""
    changes: list[Change] = []
    for node in tuple(reversed(graph)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            changes.append(Change(rule="remove-node", node=label(node), detail=node.op_type))
            remove(node)
            continue
        for body in subgraphs(node):
            changes += remove_nodes(body)
        changes += _remove_outputs(node)
    return changes


def _remove_outputs(node: ir.Node) -> list[Change]:
    """Drop optional outputs that nothing reads, and absent inputs at the end."""
    used = len(node.inputs)
    while used and node.inputs[used - 1] is None:
        used -= 1
    changes = []
    if used < len(node.inputs) and node.domain == "":
        changes.append(Change(rule="remove-input", node=label(node), detail="absent"))
        node.resize_inputs(used)
    if node.op_type == "If" and node.domain == "":
        return changes + _remove_branch_outputs(node)
    if len(node.outputs) == 1 or not onnx.defs.has(node.op_type, OPSET, node.domain):
        return changes
    if node.op_type == "BatchNormalization" and attribute(node, "training_mode", 0):
        return changes
    formal = onnx.defs.get_schema(node.op_type, OPSET, node.domain).outputs
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    last = 0
    for index, output in enumerate(node.outputs):
        if output.uses() or output.is_graph_output():
            last = index
        elif index < len(formal) and formal[index].option == optional:
            if output.name:
                changes.append(Change(rule="remove-output", node=label(node), detail=formal[index].name))
                output.name = ""
        else:
            last = index
    if last + 1 < len(node.outputs):
        node.resize_outputs(last + 1)
    return changes


def _remove_branch_outputs(node: ir.Node) -> list[Change]:
    """Let both branches of an If give back only what is read."""
    dead = [i for i, o in enumerate(node.outputs) if not (o.uses() or o.is_graph_output())]
    if not dead:
        return []
    for branch in subgraphs(node):
        for index in reversed(dead):
            branch.outputs.pop(index)
    kept = [o for i, o in enumerate(node.outputs) if i not in dead]
    names = [(o.name, o.type, o.shape) for o in kept]
    for index, output in enumerate(kept):
        # Values belong to their node by position: what is read moves to the first positions.
        target = node.outputs[index]
        if target is not output:
            output.replace_all_uses_with(target, replace_graph_outputs=True)
    node.resize_outputs(len(kept))
    for output, (name, kind, shape) in zip(node.outputs, names, strict=True):
        output.name, output.type, output.shape = name, kind, shape
    return [Change(rule="remove-branch-output", node=label(node), detail=str(i)) for i in dead]


def _remove_functions(model: ir.Model) -> list[Change]:
    used: set[ir.OperatorIdentifier] = set()
    pending = [model.graph]
    while pending:
        for node in walk(pending.pop()):
            identifier = node.op_identifier()
            if identifier in model.functions and identifier not in used:
                used.add(identifier)
                pending.append(model.functions[identifier].graph)
    dead = [identifier for identifier in model.functions if identifier not in used]
    for identifier in dead:
        del model.functions[identifier]
    return [Change(rule="remove-function", node=name, detail=domain) for domain, name, _ in dead]
