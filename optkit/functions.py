"""A node taken out of its graph, the function that ONNX defines its operator by, and putting one in the place of the other."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx.inliner
import onnx_ir as ir

from optkit.graph import graphs, walk
from optkit.rewrite import label

# Names of a node's inputs and outputs where it stands alone, with their numbers behind.
_INPUT, _OUTPUT = "i", "o"
# Where a definition is a function of the model, until it is written out.
_DEFINITIONS = "optkit.definitions"
_Types = Callable[[ir.Value], tuple[ir.DataType | None, ir.Shape | None]]


class NotDefinedError(Exception):
    """Why a node cannot be written out; its callers say so of the node, or go without."""


def declared(value: ir.Value) -> tuple[ir.DataType | None, ir.Shape | None]:
    """Type and shape as the graph has them."""
    return value.dtype, value.shape


def alone(node: ir.Node, version: int, types: _Types = declared) -> onnx.ModelProto:
    """A model of ``node`` alone, a standard operator without bodies, with inputs ``i0``, ``i1`` and outputs ``o0``, ``o1`` and so on.

    Inputs and outputs that are left out or that nothing reads have no name there, but keep their numbers.

    Args:
        node: The node.
        version: Of the operator set that it is written for.
        types: What is known about a value.
    """
    schema = onnx.defs.get_schema(node.op_type, version, "")
    proto = ir.serde.serialize_node(node)
    del proto.input[:], proto.output[:], proto.metadata_props[:]
    # Bodies read attributes by name, and the defaults that the schema gives are not filled in.
    for key, attribute in sorted(schema.attributes.items()):
        if key not in node.attributes and attribute.default_value.type != onnx.AttributeProto.UNDEFINED:
            proto.attribute.append(attribute.default_value)
    names = (
        ["" if v is None else f"{_INPUT}{i}" for i, v in enumerate(node.inputs)],
        [f"{_OUTPUT}{i}" if v in results(node) else "" for i, v in enumerate(node.outputs)],
    )
    proto.input.extend(names[0])
    proto.output.extend(names[1])
    graph = onnx.GraphProto(name="g", node=[proto])
    for infos, known, values in zip(
        (graph.input, graph.output), names, (node.inputs, node.outputs), strict=True
    ):
        for name, value in zip(known, values, strict=True):
            if not name or value is None:
                continue
            info, (dtype, shape) = infos.add(name=name), types(value)
            if dtype is not None:
                info.type.tensor_type.elem_type = int(dtype)
                if shape is not None:
                    ir.serde.serialize_shape_into(info.type, shape)
    return onnx.ModelProto(
        ir_version=10, graph=graph, opset_import=[onnx.OperatorSetIdProto(version=version)]
    )


def results(node: ir.Node) -> list[ir.Value]:
    """The outputs that somebody reads, or all where nobody reads any."""
    named = [v for v in node.outputs if v.name]
    return [v for v in named if v.uses() or v.is_graph_output()] or named


def written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model``, which ``alone`` made, with the function that defines the operator in the place of the node.

    Raises:
        NotDefinedError: There is none for these types.
    """
    op_type = model.graph.node[0].op_type
    try:
        found = onnx.inliner.inline_selected_functions(model, [("", op_type)], inline_schema_functions=True)
    except RuntimeError as error:
        if "" not in model.graph.node[0].input:
            raise NotDefinedError(f"its definition cannot be written out: {error}") from error
        found = _with_operands_left_out(model)
    if any(node.op_type == op_type for node in found.graph.node):
        raise NotDefinedError("its types are not known well enough")
    return found


def _with_operands_left_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, of a definition that follows from types: ONNX's inliner asks for that of an operand that is not there as well.

    Raises:
        NotDefinedError: There is none for these types.
    """
    node, version = model.graph.node[0], model.opset_import[0].version
    schema = onnx.defs.get_schema(node.op_type, version, "")
    known = {i.name: i.type for i in model.graph.input}
    types = [known.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]  # type: ignore[attr-defined]
    body = b""
    if versions:
        body = schema.get_context_dependent_function_with_opset_version(  # type: ignore[attr-defined]
            max(versions), node.SerializeToString(), types
        )
    if not body:
        raise NotDefinedError("its types are not known well enough")
    function, found = onnx.FunctionProto.FromString(body), onnx.ModelProto()
    function.domain = _DEFINITIONS
    found.CopyFrom(model)
    found.functions.append(function)
    found.opset_import.append(onnx.OperatorSetIdProto(domain=_DEFINITIONS, version=1))
    found.graph.node[0].domain, found.graph.node[0].op_type = _DEFINITIONS, function.name
    return onnx.inliner.inline_local_functions(found)


def put(node: ir.Node, body: ir.Graph, new: Callable[[str], str] = str) -> list[ir.Node]:
    """Put what ``body`` holds, a graph like those of ``alone``, in the place of ``node``; its nodes at the top.

    Outputs keep the names, types and shapes that they have at ``node``. The rest is named after it, and has its origin.

    Args:
        node: Is removed.
        body: Is empty afterwards. Its outputs are those of nodes, none is there twice.
        new: Makes a name that is free in the model.
    """
    owner, base, nodes = node.graph, label(node), list(body)
    assert owner is not None
    for value in (*body.inputs, *body.initializers.values()):
        given = _given(node, value)
        if given is not None:
            value.replace_all_uses_with(given)
    ends = {node.outputs[number(v)]: v for v in body.outputs}
    outputs = set(ends.values())
    # Values belong to one graph at a time.
    body.outputs.clear()
    kept = [v for v in body.initializers.values() if _given(node, v) is None]
    body.initializers.clear()
    for part in graphs(body):
        for value in (*(() if part is body else part.inputs), *part.initializers.values()):
            value.name = new(f"{base}/{value.name}")
        for inner in part:
            for value in inner.outputs:
                if value.name and value not in outputs:
                    value.name = new(f"{base}/{value.name}")
    for index, inner in enumerate(walk(body)):
        inner.name = new(f"{base}/{inner.op_type}_{index}")
        inner.metadata_props.update(node.metadata_props)
    for value in kept:
        value.name = new(f"{base}/{value.name}")
        _graph(owner).register_initializer(value)
    body.remove(nodes)
    owner.insert_before(node, nodes)
    for old, value in ends.items():
        value.type, value.shape = old.type, old.shape
        value.metadata_props.update(old.metadata_props)
        name, old.name = old.name, None
        value.name = name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    owner.remove(node, safe=True)
    return nodes


def number(value: ir.Value) -> int:
    """Of the input or output that ``value`` stands for."""
    return int(str(value.name)[1:])


def _given(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of ``node`` that ``value`` stands for; None where it is a constant of the body's own."""
    name = str(value.name)
    return node.inputs[number(value)] if name.startswith(_INPUT) and name[1:].isdecimal() else None


def _graph(owner: ir.Graph | ir.Function) -> ir.Graph:
    return owner if isinstance(owner, ir.Graph) else owner.graph
