"""The order in which a device runs a graph: launches of kernels, and between them what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from optkit.errors import ModelError
from optkit.graph import describe, subgraphs

_SMALL_KINDS = frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Nodes without kernel that run together, as the values between which they lie.

    Attributes:
        inputs: Values that other steps, or the caller, give.
        outputs: Values that other steps read, or that are outputs of the graph.
        host: Those outputs that are wanted in the host's memory: sizes and the like.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    host: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"inputs": list(self.inputs), "outputs": list(self.outputs), "host": list(self.host)}


def schedule(graph: ir.Graph, calls: Collection[ir.Node]) -> list[Segment | ir.Node]:
    """Calls of kernels and segments, each after what it reads.

    A node is put into the earliest segment that it can be in, so that there are as few as the chain of kernels allows.

    Raises:
        ModelError: Something else than a tensor of numbers goes from one step to another.
    """
    stages: dict[ir.Node, int] = {}
    for node in graph:
        if not is_constant(node):
            stages[node] = max(
                (
                    stages[p] + (p in calls and node not in calls)
                    for v in reads(node)
                    if (p := v.producer()) in stages
                ),
                default=0,
            )
    readers: dict[ir.Value, set[ir.Node]] = {}
    for node in stages:
        for value in reads(node):
            readers.setdefault(value, set()).add(node)
    steps: list[Segment | ir.Node] = []
    for stage in range(max(stages.values(), default=-1) + 1):
        here = [node for node, at in stages.items() if at == stage]
        rest = [node for node in here if node not in calls]
        if rest:
            steps.append(_segment(rest, readers))
        steps += [node for node in here if node in calls]
    return steps


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that ``node`` reads, those of its own graph that its bodies read included."""
    yield from (v for v in node.inputs if v is not None)
    for body in subgraphs(node):
        own = {*body.inputs, *body.initializers.values(), *(v for inner in body for v in inner.outputs)}
        yield from (v for inner in body for v in reads(inner) if v not in own)
        yield from (v for v in body.outputs if v not in own)


def is_constant(value: ir.Node | ir.Value) -> bool:
    """Whether it is there before anything runs."""
    if isinstance(value, ir.Node):
        return value.op_type == "Constant" and value.domain == ""
    producer = value.producer()
    return value.is_initializer() or (producer is not None and is_constant(producer))


def _segment(nodes: list[ir.Node], readers: Mapping[ir.Value, set[ir.Node]]) -> Segment:
    own, inside = set(nodes), {v for node in nodes for v in node.outputs}
    inputs = [v for node in nodes for v in reads(node) if v not in inside and not is_constant(v)]
    outputs = [
        v for node in nodes for v in node.outputs if v.is_graph_output() or readers.get(v, set()) - own
    ]  # fmt: skip
    for value in (*inputs, *outputs):
        if value.dtype == ir.DataType.STRING or not isinstance(value.type, ir.TensorType | None):
            raise ModelError(
                f"{describe(nodes[0])}: {value.name} goes between steps of the device, and is not a tensor of numbers"
            )
    host = [v for v in outputs if v.dtype in _SMALL_KINDS and (v.shape is None or len(v.shape) <= 1)]
    return Segment(
        inputs=tuple(dict.fromkeys(str(v.name) for v in inputs)),
        outputs=tuple(str(v.name) for v in outputs),
        host=tuple(str(v.name) for v in host),
    )
