"""Types and shapes of the values in a graph, by ONNX's own shape inference, without copying weights."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir

from optkit.graph import OPSET, graphs

logger = logging.getLogger(__name__)

# Targets of Reshape, pads, axes and the like are this small; weights are not, and inference never reads them.
_SMALL = 1024


def infer(model: ir.Model) -> bool:
    """Fill in types and shapes of all values, as far as ONNX can tell; what is known already stays.

    Inputs and outputs of the model keep their declared shapes. Weights are left out of what ONNX sees, so the memory
    that it takes grows with the number of nodes alone.

    Returns:
        Whether anything became known that was not.
    """
    hidden = [
        (graph, value, value.const_value)
        for graph in graphs(model)
        for value in tuple(graph.initializers.values())
        if value.const_value is not None and value.const_value.nbytes > _SMALL
    ]
    # A value without data is written as a mere name, which inference takes for a value of the outer scope. In the main
    # graph an input with type and shape says more.
    extra = [value for graph, value, _ in hidden if graph is model.graph and not value.is_graph_input()]
    count = len(model.graph.inputs)
    try:
        for graph, value, tensor in hidden:
            assert value.name is not None
            assert tensor is not None
            value.shape, value.type = (
                value.shape or ir.Shape(tensor.shape.numpy()),
                value.type or ir.TensorType(tensor.dtype),
            )
            value.const_value = None
            graph.initializers.pop(value.name)
        model.graph.inputs.extend(extra)
        proto = ir.to_proto(model)
    finally:
        del model.graph.inputs[count:]
        for graph, value, tensor in hidden:
            value.const_value = tensor
            graph.register_initializer(value)
    for function in tuple(proto.functions):
        # Types of functions in foreign domains are found through their bodies; nothing else of them is needed.
        if not function.node:
            proto.functions.remove(function)
    try:
        inferred = onnx.shape_inference.infer_shapes(
            proto, check_type=False, strict_mode=False, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        logger.debug("shape inference stopped: %s", error)
        return False
    known: dict[str, onnx.TypeProto | None] = {}
    _collect(inferred.graph, known)
    changed = False
    for graph in graphs(model):
        for node in graph:
            for value in node.outputs:
                found = known.get(value.name or "")
                declared = value.is_graph_output() and value.type is not None and value.shape is not None
                if found is not None and not declared:
                    changed |= _take(value, found)
    return changed


def infer_node(node: ir.Node, *, opset: int = OPSET) -> None:
    """Give the outputs of one new node the types and shapes that follow from its inputs; needs no graph.

    Leaves them alone where ONNX has no rule or the inputs' types are unknown.
    """
    if not onnx.defs.has(node.op_type, opset, node.domain):
        return
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    names = {
        id(value): f"v{i}" for i, value in enumerate(dict.fromkeys(v for v in node.inputs if v is not None))
    }
    for value in node.inputs:
        if value is None:
            continue
        if value.type is None or not isinstance(value.type, ir.TensorType):
            return
        types[names[id(value)]] = _type_proto(value)
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _SMALL:
            data[names[id(value)]] = onnx.helper.make_tensor(
                names[id(value)], int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes(), raw=True
            ) if tensor.dtype != ir.DataType.STRING else onnx.TensorProto()  # fmt: skip
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    proto.input.extend("" if v is None else names[id(v)] for v in node.inputs)
    proto.output.extend(f"o{i}" for i in range(len(node.outputs)))
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    imports = [onnx.helper.make_opsetid("", opset)]
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        logger.debug("no shapes for %s: %s", node.op_type, error)
        return
    for index, output in enumerate(node.outputs):
        if (proto_type := found.get(f"o{index}")) is not None:
            _take(output, proto_type)


def _collect(graph: onnx.GraphProto, known: dict[str, onnx.TypeProto | None]) -> None:
    """Types by value name; a name that bodies use for different values is not known."""
    for info in (*graph.value_info, *graph.output):
        same = info.name not in known or known[info.name] == info.type
        known[info.name] = info.type if same else None
    for node in graph.node:
        for attribute in node.attribute:
            for body in (
                (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ()
            ):
                _collect(body, known)


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    assert value.dtype is not None
    if value.shape is None:
        return onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=int(value.dtype)))
    dims = [d if isinstance(d, int) else d.value for d in value.shape]
    return onnx.helper.make_tensor_type_proto(int(value.dtype), dims)


def _take(value: ir.Value, found: onnx.TypeProto) -> bool:
    """Add what ``found`` knows and ``value`` does not."""
    if not found.HasField("tensor_type"):
        return False
    tensor, changed = found.tensor_type, False
    if value.type is None and tensor.elem_type:
        value.type, changed = ir.TensorType(ir.DataType(tensor.elem_type)), True
    if not tensor.HasField("shape"):
        return changed
    dims: list[int | str | None] = [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim
    ]
    if value.shape is None:
        value.shape = ir.Shape(dims)
        return True
    if len(value.shape) != len(dims):
        logger.debug("%s: declared rank %d, inferred %d", value.name, len(value.shape), len(dims))
        return changed
    merged = [_better(old, new) for old, new in zip(value.shape, dims, strict=True)]
    if any(m is not None and m != _plain(old) for m, old in zip(merged, value.shape, strict=True)):
        value.shape, changed = ir.Shape(merged), True
    return changed


def _plain(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _better(old: int | ir.SymbolicDim, new: int | str | None) -> int | str | None:
    plain = _plain(old)
    if isinstance(plain, int):
        return plain
    return new if isinstance(new, int) or plain is None else plain
