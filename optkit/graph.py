"""Walk, read, check and measure an ``onnx_ir.Model``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

# The one working opset. Newest that has int4 and block-wise QuantizeLinear (21) and whose operators ONNX Runtime's
# own fusions still recognise.
OPSET = 21
IR_VERSION = 10
# The standard operators with bodies; looking through the attributes of every node would take longer than most passes.
_WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# Operators that give other numbers in each run: nobody computes them beforehand.
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def walk(scope: ir.Model | ir.Graph) -> Iterator[ir.Node]:
    """Every node, bodies of If, Loop and Scan included, in the order of the graphs; functions are left out."""
    # onnx_ir's own iterator does the same and checks the type of every attribute on the way: seven times slower.
    for node in scope.graph if isinstance(scope, ir.Model) else scope:
        yield node
        for body in subgraphs(node):
            yield from walk(body)


def graphs(scope: ir.Model | ir.Graph) -> Iterator[ir.Graph]:
    """The main graph, then the body of every If, Loop and Scan below it, outermost first."""
    graph = scope.graph if isinstance(scope, ir.Model) else scope
    yield graph
    # Collected first: who reads them takes bodies apart.
    yield from [inner for node in graph for body in subgraphs(node) for inner in graphs(body)]


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies that ``node`` itself holds."""
    if node.domain == "" and node.op_type not in _WITH_BODIES:
        return
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array that ``value`` always has, or None where it depends on the inputs.

    An initializer that is also an input of its graph can be replaced by the caller: not a constant.
    """
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input():
        return None if value.const_value is None else value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    for attribute in node.attributes.values():
        if attribute.name == "value":
            return attribute.value.numpy()  # type: ignore[no-any-return]
        if attribute.name.startswith(("value_float", "value_int")):
            return np.asarray(attribute.value, np.float32 if "float" in attribute.name else np.int64)
    return None


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    if value is None or (value.const_value is not None and value.const_value.size != 1):
        return None
    array = constant(value)
    return (
        None
        if array is None or array.size != 1 or array.dtype.kind not in "fiub"
        else float(array.reshape(())[()])
    )


def initializer(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Add a constant to ``graph`` under ``name``, or under the next free name if another value has it."""
    taken = graph.initializers
    unique, n = name, 1
    while unique in taken:
        unique, n = f"{name}_{n}", n + 1
    tensor = (
        ir.tensor(np.ascontiguousarray(array) if array.ndim else array, name=unique)
        if isinstance(array, np.ndarray)
        else array
    )
    tensor.name = unique
    value = ir.Value(
        name=unique,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """The value of an attribute, or ``default`` where the node does not have it."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return found.as_string() if found.type == ir.AttributeType.STRING else found.value


def ints(node: ir.Node, name: str, default: Iterable[int] = ()) -> list[int]:
    """An attribute that is a list of integers."""
    return list(node.attributes.get_ints(name, default))


def users(value: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes that read ``value``, each once, in the order in which they were connected."""
    return tuple(dict.fromkeys(use.node for use in value.uses()))


def read_once(value: ir.Value) -> bool:
    """Whether one node, once, is all that reads ``value``."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def made_for_one(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node of a standard operator that makes ``value``, where one node alone reads it; with ``operators``, of one of them."""
    node = None if value is None or not read_once(value) else value.producer()
    if node is None or node.domain != "" or (operators and node.op_type not in operators):
        return None
    return node


def is_float(value: ir.Value | None) -> bool:
    """Whether ``value`` is known to be float32, float16, bfloat16 or float64."""
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def rank(value: ir.Value | None) -> int | None:
    """The number of axes, where known."""
    return None if value is None or value.shape is None else len(value.shape)


def drop_unused_initializers(model: ir.Model) -> None:
    """Forget weights that nothing reads any more: what a pass leaves behind when it replaces them."""
    for graph in graphs(model):
        for name, value in tuple(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]


def describe(node: ir.Node) -> str:
    """How messages name a node: its name, operator and, where known, the source line it came from."""
    source = node.metadata_props.get("optkit.source")
    module = node.metadata_props.get("optkit.module")
    if module and str(node.name).startswith(module):
        module = None
    place = ", ".join(p for p in (module, source) if p)
    return f"{node.name or '?'} ({node.op_type}{': ' + place if place else ''})"


def count_nodes(model: ir.Model) -> int:
    """Nodes in the graph and in all bodies; Constant nodes are not counted, initializers neither."""
    return sum(node.op_type != "Constant" for node in walk(model))


def count_parameters(model: ir.Model) -> int:
    """Elements of all initializers."""
    return sum(
        v.const_value.size
        for g in graphs(model)
        for v in g.initializers.values()
        if v.const_value is not None
    )


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(
        v.const_value.nbytes
        for g in graphs(model)
        for v in g.initializers.values()
        if v.const_value is not None
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks of 1 MiB."""
    h = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def text(model: ir.Model) -> str:
    """A short stable text form: one line a node, bodies indented; weights by type and shape alone."""
    lines: list[str] = []

    def kind(value: ir.Value) -> str:
        shape = "?" if value.shape is None else ",".join(str(d) for d in value.shape)
        return f"{value.dtype.name.lower() if value.dtype else '?'}[{shape}]"

    def show(graph: ir.Graph, indent: str) -> None:
        inputs = ", ".join(f"{v.name}: {kind(v)}" for v in graph.inputs)
        lines.append(f"{indent}({inputs})")
        for node in graph:
            if node.op_type == "Constant":
                continue
            operands = ", ".join(
                "-" if v is None else (kind(v) if v.const_value is not None else str(v.name))
                for v in node.inputs
            )
            plain = (
                a
                for a in node.attributes.values()
                if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            )
            options = "".join(
                f" {a.name}={a.as_string() if a.type == ir.AttributeType.STRING else a.value}" for a in plain
            )
            domain = f"{node.domain}." if node.domain else ""
            lines.append(
                f"{indent}  {', '.join(str(o.name) for o in node.outputs)} = {domain}{node.op_type}({operands}){options}"
            )
            for body in subgraphs(node):
                show(body, indent + "    ")
        lines.append(f"{indent}-> {', '.join(str(v.name) for v in graph.outputs)}")

    show(model.graph, "")
    return "\n".join(lines) + "\n"


def verify(model: ir.Model) -> None:
    """Check what must hold between passes: names are unique, values are defined before use, outputs exist.

    Raises:
        ModelError: Names the first node or value that is wrong.
    """

    def check(graph: ir.Graph, outer: frozenset[ir.Value]) -> None:
        known = set(outer) | set(graph.inputs) | set(graph.initializers.values())
        for node in graph:
            for index, value in enumerate(node.inputs):
                if value is not None and value not in known:
                    raise ModelError(
                        f"{describe(node)}: input {index} ({value.name}) is not defined before it is used"
                    )
            for body in subgraphs(node):
                check(body, frozenset(known))
            for output in node.outputs:
                if output.name and output.name in names:
                    raise ModelError(f"{describe(node)}: the name {output.name!r} is defined twice")
                if output.name:
                    names.add(output.name)
                known.add(output)
        for output in graph.outputs:
            if output not in known:
                raise ModelError(f"graph {graph.name}: output {output.name!r} is not computed")

    names: set[str] = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values()) if v.name}
    check(model.graph, frozenset())


def elements(shape: ir.Shape | None) -> int | None:
    """The number of elements of a static shape, else None."""
    if shape is None or not shape.is_static():
        return None
    return math.prod(shape.numpy())
