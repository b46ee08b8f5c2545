"""Types and shapes of the values in a graph, and what is known about the integers that shapes are made from.

ONNX's own inference does the operators one by one; what it cannot do without allocating tensors as large as the model
says (its data propagation does) is done here on short lists of integers and names.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import onnx
import onnx_ir as ir

from optkit.dims import INFERRED, Dim, is_name, shape_of
from optkit.graph import OPSET, constant, graphs, ints, subgraphs, walk
from optkit.microscaling import is_call
from optkit.propagation import Known, evaluate, shape

logger = logging.getLogger(__name__)

# Targets of Reshape, pads, axes and the like are this small; weights are not, and inference never reads them.
_SMALL = 1024
_POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
# The opset whose rule leaves out windows that would start in the pads.
_RIGHT = 22
_SAME_SHAPE = frozenset(
    {
        "Abs", "Cast", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
        "Identity", "InstanceNormalization", "BatchNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Not",
        "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Tanh",
        "LayerNormalization", "QuantizeLinear", "DequantizeLinear", "CumSum",
    }
)  # fmt: skip


def infer(model: ir.Model) -> Mapping[ir.Value, Known]:
    """Fill in types and shapes of all values; inputs and outputs of graphs keep what they were declared with.

    Axes that nothing is known about get names of their own, ``<value>.d<axis>``, so that equal names mean equal sizes.
    No weight is read or copied.

    Returns:
        For short integer vectors and scalars their elements, as far as they are known.
    """
    declared = {
        d.value
        for graph in graphs(model)
        for v in graph.inputs
        if v.shape is not None
        for d in v.shape
        if isinstance(d, ir.SymbolicDim) and is_name(d.value)
    }
    _forget_names(model, declared)
    if not any(_constant_bytes(node) > _SMALL or _misread(node) for graph in graphs(model) for node in graph):
        # What ONNX is given is a copy, which weights must not be part of.
        _infer_with_onnx(model, declared)
    walk = _Walk(declared)
    walk.graph(model.graph)
    return walk.known


def at_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """A copy of ``model`` for inputs of these shapes alone, with the shapes of all values that follow from them."""
    fixed = model.clone()
    for value in fixed.graph.inputs:
        if (wanted := shapes.get(str(value.name))) is not None:
            value.shape = ir.Shape(wanted)
    for value in (*(o for node in fixed.graph for o in node.outputs), *fixed.graph.outputs):
        if value.shape is not None and not value.shape.is_static():
            value.shape = None
    infer(fixed)
    # ONNX's inference leaves an output whose shape is computed with nothing but its rank, which then counts as declared.
    partial = [v for v in fixed.graph.outputs if v.shape is not None and not v.shape.is_static()]
    for value in partial:
        value.shape = None
    if partial:
        _Walk().graph(fixed.graph)
    return fixed


_POOLS = frozenset({"AveragePool", "MaxPool", "LpPool"})


def windows_fit(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every window of a pool lies within its padded input, for inputs of these shapes.

    ONNX Runtime computes something where one does not, and something else in another version of the operator.
    """
    if not any(node.op_type in _POOLS and node.domain == "" for node in walk(model)):
        return True
    return all(
        _fits(node) for node in walk(at_shapes(model, shapes)) if node.op_type in _POOLS and node.domain == ""
    )


def _fits(node: ir.Node) -> bool:
    x, kernel = node.inputs[0], ints(node, "kernel_shape")
    sizes = list(x.shape or ())[2:] if x is not None else []
    if len(sizes) != len(kernel) or node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME"):
        return True
    n = len(kernel)
    pads, dilations = ints(node, "pads", [0] * 2 * n), ints(node, "dilations", [1] * n)
    return all(
        not isinstance(size, int) or size + pads[i] + pads[i + n] >= dilations[i] * (kernel[i] - 1) + 1
        for i, size in enumerate(sizes)
    )


def infer_node(node: ir.Node) -> None:
    """Give the outputs of one new node the types and shapes that follow from its inputs; needs no graph.

    Leaves them alone where ONNX has no rule or the inputs' types are unknown.
    """
    for output, found in zip(node.outputs, _outputs(node), strict=False):
        _take(output, found)
    # A size that is what the others leave over, ONNX knows of numbers alone.
    known, walk = shape_of(node.outputs[0]), _Walk()
    if (
        known is not None
        and None in known
        and node.domain == ""
        and (dims := shape(node, walk.of)) is not None
    ):
        walk._set(node.outputs[0], None, dims)


def _forget_names(model: ir.Model, declared: set[str | None]) -> None:
    """Drop what exporters and earlier inference called unknown axes, unless an input is called so too.

    More may be known by now; a stale name would hide it.
    """
    for graph in graphs(model):
        for node in graph:
            if not onnx.defs.has(node.op_type, OPSET, node.domain):
                continue
            for value in node.outputs:
                if value.shape is None or value.is_graph_output():
                    continue
                dims = [
                    None if isinstance(d, ir.SymbolicDim) and d.value not in declared else d
                    for d in value.shape
                ]
                if None in dims:
                    value.shape = ir.Shape(dims)


def _infer_with_onnx(model: ir.Model, declared: set[str | None]) -> None:
    """One call for the whole graph: most shapes need no more."""
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
    order = [(graph, tuple(graph.initializers.values())) for graph in graphs(model)]
    try:
        for graph, value, tensor in hidden:
            assert value.name is not None
            assert tensor is not None
            value.shape = value.shape or ir.Shape(tensor.shape.numpy())
            value.type = value.type or ir.TensorType(tensor.dtype)
            value.const_value = None
            graph.initializers.pop(value.name)
        model.graph.inputs.extend(extra)
        proto = ir.to_proto(model)
    finally:
        # `del` would leave the values marked as inputs.
        while len(model.graph.inputs) > count:
            model.graph.inputs.pop()
        for _, value, tensor in hidden:
            value.const_value = tensor
        # In the order in which they were, so that a model that is loaded and saved comes out the same.
        for graph, values in order:
            for value in values:
                graph.initializers.pop(str(value.name), None)
                graph.register_initializer(value)
    try:
        inferred = onnx.shape_inference.infer_shapes(
            proto, check_type=False, strict_mode=False, data_prop=False
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        logger.debug("shape inference stopped: %s", error)
        return
    known: dict[str, onnx.TypeProto | None] = {}
    _collect(inferred.graph, known)
    for graph in graphs(model):
        for value in (output for node in graph for output in node.outputs):
            if (found := known.get(value.name or "")) is not None:
                _forget_new_names(found, declared)
                _take(value, found)


def _forget_new_names(found: onnx.TypeProto, declared: set[str | None]) -> None:
    # ONNX numbers unknown axes; the walk may find out what they are.
    for dim in found.tensor_type.shape.dim:
        if dim.dim_param and dim.dim_param not in declared:
            dim.Clear()


def _constant_bytes(node: ir.Node) -> int:
    held = node.attributes.get("value") if node.op_type == "Constant" else None
    return 0 if held is None or held.type != ir.AttributeType.TENSOR else int(held.value.nbytes)


def _misread(node: ir.Node) -> bool:
    """Whether ONNX's rule may give another shape than the operator has.

    Before opset 22 it counts windows of a pool that would start in the pads at the end; it takes STFT for two-sided where it
    is one-sided by default (onnx 1.23).
    """
    if node.op_type == "STFT":
        return node.domain == "" and "onesided" not in node.attributes
    if node.op_type not in _POOLS or node.domain != "" or not node.attributes.get_int("ceil_mode", 0):
        return False
    window = node.attributes.get_ints("kernel_shape", ())
    strides = node.attributes.get_ints("strides", [1] * len(window))
    dilations = node.attributes.get_ints("dilations", [1] * len(window))
    ends = node.attributes.get_ints("pads", [0] * 2 * len(window))[len(window) :]
    return any(
        s + end > (k - 1) * d + 1 for k, s, d, end in zip(window, strides, dilations, ends, strict=True)
    )


def _collect(graph: onnx.GraphProto, known: dict[str, onnx.TypeProto | None]) -> None:
    """Types by value name; a name that bodies use for different values is not known."""
    for info in (*graph.value_info, *graph.output):
        same = info.name not in known or known[info.name] == info.type
        known[info.name] = info.type if same else None
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _collect(attribute.g, known)
            for body in attribute.graphs:
                _collect(body, known)


class _Walk:
    """One walk in the order of the graph, each node after what it reads.

    Args:
        names: Of axes of inputs.
    """

    def __init__(self, names: Collection[str | None] = ()) -> None:
        self.known: dict[ir.Value, Known] = {}
        self._names = names
        # Values whose shape this walk changed; what reads them is looked at again.
        self._changed: set[ir.Value] = set()

    def graph(self, graph: ir.Graph) -> None:
        for node in graph:
            for body in subgraphs(node):
                self.graph(body)
            self._node(node)

    def of(self, value: ir.Value | None) -> Known | None:
        """What is known about the elements of a short integer vector or scalar."""
        if value is None:
            return None
        if value not in self.known and (value.const_value is None or value.const_value.size <= _SMALL):
            array = constant(value)
            if array is not None and array.dtype.kind in "iub" and array.ndim <= 1 and array.size <= _SMALL:
                self.known[value] = array.astype(object)
        return self.known.get(value)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
            tensor, output = node.attributes["value"].value, node.outputs[0]
            output.type, output.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        if any(v in self._changed for v in node.inputs) or any(
            not _complete(o) or _renames(o) for o in node.outputs
        ):
            self._shapes(node)
        if node.domain == "" and len(node.outputs) == 1 and (found := evaluate(node, self.of)) is not None:
            self.known[node.outputs[0]] = found

    def _shapes(self, node: ir.Node) -> None:
        first = node.inputs[0] if node.inputs else None
        dims: Sequence[Dim | None] | None = None
        if node.domain == "":
            if node.op_type == "If":
                self._branches(node)
                return
            if node.op_type in _SAME_SHAPE and first is not None and first.shape is not None:
                dims = shape_of(first)
            else:
                dims = shape(node, self.of)
        elif is_call(node) and first is not None and first.shape is not None:
            dims = shape_of(first)
        for index, (output, found) in enumerate(zip(node.outputs, _outputs(node), strict=False)):
            if index or dims is None:
                self._set(output, found, None)
        if dims is not None:
            output = node.outputs[0]
            if output.type is None:
                infer_node(node)
            self._set(output, None, dims)
        for output in node.outputs:
            if not _complete(output) and output.shape is not None and not output.is_graph_output():
                output.shape = ir.Shape(
                    [
                        d if isinstance(d, int) or d.value is not None else f"{output.name}.d{i}"
                        for i, d in enumerate(output.shape)
                    ]
                )

    def _branches(self, node: ir.Node) -> None:
        bodies = list(subgraphs(node))
        for index, output in enumerate(node.outputs):
            a, b = (body.outputs[index] for body in bodies)
            output.type = output.type or a.type
            if a.shape is not None and b.shape is not None and len(a.shape) == len(b.shape):
                dims = [
                    x if x == y else None for x, y in zip(shape_of(a) or (), shape_of(b) or (), strict=True)
                ]
                self._set(output, None, dims)

    def _set(self, value: ir.Value, found: onnx.TypeProto | None, dims: Sequence[Dim | None] | None) -> None:
        """Take over the better of what was known and what follows from the inputs."""
        if found is not None:
            if value.type is None:
                _take(value, found)
            if not found.tensor_type.HasField("shape"):
                return
            dims = _dims(found)
        assert dims is not None
        if value.is_graph_output() and value.shape is not None:
            self._aside(value, dims)
            return
        value.meta.pop(INFERRED, None)
        if value.shape is not None and len(value.shape) != len(dims):
            logger.debug("%s: declared rank %d, inferred %d", value.name, len(value.shape), len(dims))
            return
        old = shape_of(value) or (None,) * len(dims)
        new = [o if isinstance(o, int) or d is None else d for o, d in zip(old, dims, strict=True)]
        if value.shape is None or new != list(old):
            value.shape = ir.Shape(new)
            self._changed.add(value)

    def _aside(self, value: ir.Value, dims: Sequence[Dim | None]) -> None:
        """Keep sizes by the names that inputs have, where an output is declared with names of its own."""
        assert value.shape is not None
        value.meta.pop(INFERRED, None)
        declared = shape_of(value)
        if declared is None or len(declared) != len(dims):
            return
        found = [
            d if d is not None and isinstance(o, str) and o not in self._names else o
            for o, d in zip(declared, dims, strict=True)
        ]
        if found != list(declared) and None not in found:
            value.meta[INFERRED] = tuple(found)


def _complete(value: ir.Value) -> bool:
    if not value.name:
        return True
    shape = value.shape
    return value.type is not None and shape is not None and not any(
        isinstance(d, ir.SymbolicDim) and d.value is None for d in shape
    )  # fmt: skip


def _renames(value: ir.Value) -> bool:
    """Whether it is an output of a graph whose declaration may call sizes by other names than inputs do."""
    return value.is_graph_output() and value.shape is not None and not value.shape.is_static()


def _outputs(node: ir.Node) -> list[onnx.TypeProto]:
    """Types and shapes by ONNX's rule for the operator; empty where there is none."""
    if not onnx.defs.has(node.op_type, OPSET, node.domain) or any(True for _ in subgraphs(node)):
        return []
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    names: dict[ir.Value, str] = {}
    for value in node.inputs:
        if value is None or value in names:
            continue
        if value.dtype is None or not isinstance(value.type, ir.TensorType):
            return []
        name = names[value] = f"v{len(names)}"
        types[name] = _type_proto(value)
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= _SMALL and tensor.dtype != ir.DataType.STRING:
            data[name] = onnx.helper.make_tensor(
                name, int(tensor.dtype), tensor.shape.numpy(), tensor.tobytes(), raw=True
            )
    misread = _misread(node)
    opset = max(OPSET, _RIGHT) if misread and node.op_type in _POOLS else OPSET
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    proto.input.extend("" if v is None else names[v] for v in node.inputs)
    proto.output.extend(f"o{i}" for i in range(len(node.outputs)))
    proto.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
    if misread and node.op_type == "STFT":
        proto.attribute.append(onnx.helper.make_attribute("onesided", 1))
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    imports = [onnx.helper.make_opsetid("", opset)]
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        logger.debug("no shapes for %s: %s", node.op_type, error)
        return []
    return [found.get(f"o{i}", onnx.TypeProto()) for i in range(len(node.outputs))]


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    assert value.dtype is not None
    dims = shape_of(value)
    if dims is None:
        return onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=int(value.dtype)))
    return onnx.helper.make_tensor_type_proto(int(value.dtype), dims)


def _dims(found: onnx.TypeProto) -> list[Dim | None]:
    return [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in found.tensor_type.shape.dim
    ]


def _take(value: ir.Value, found: onnx.TypeProto) -> None:
    """Add what ``found`` knows and ``value`` does not."""
    if not found.HasField("tensor_type"):
        return
    if value.type is None and found.tensor_type.elem_type:
        value.type = ir.TensorType(ir.DataType(found.tensor_type.elem_type))
    if not found.tensor_type.HasField("shape"):
        return
    dims = _dims(found)
    if value.shape is None:
        value.shape = ir.Shape(dims)
        return
    if len(value.shape) != len(dims) or value.is_graph_output():
        return
    old = shape_of(value) or ()
    merged = [
        o if isinstance(o, int) or not (isinstance(d, int) or o is None) else d
        for o, d in zip(old, dims, strict=True)
    ]
    if merged != list(old):
        value.shape = ir.Shape(merged)
