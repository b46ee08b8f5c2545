"""Constants become initializers, and what depends on constants alone is computed once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from optkit.graph import IR_VERSION, OPSET, RANDOM, attribute, constant, graphs, subgraphs
from optkit.inference import infer_node
from optkit.passes.base import Context, GraphPass
from optkit.reference import first_line, session_options
from optkit.rewrite import Change, label, register, remove, replaceable, substitute

logger = logging.getLogger(__name__)

# Quantized weights stay quantized; control flow has rules of its own; sequences and optionals are no tensors.
_KEPT = RANDOM | {
    "Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "If", "Loop", "Scan", "Dropout",
    "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength",
    "SequenceMap", "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement",
}  # fmt: skip
# Results that depend on the data, but are no larger than a few times the input. Any other unknown shape may be any size.
_BOUNDED = frozenset({"NonZero", "Unique", "Compress", "Slice", "Reshape", "Squeeze"})
_NUMPY_TYPES = frozenset(
    getattr(ir.DataType, name)
    for name in (
        "FLOAT", "DOUBLE", "FLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
    )
)  # fmt: skip
_EVALUATION_ERRORS = (
    ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented, ort_errors.RuntimeException, ort_errors.EPFail,
)  # fmt: skip
# Bytes of constants that one evaluation may hold beside the model.
_BATCH = 8 << 20
# An unknown result of inputs below this is computed to see how large it is.
_TINY = 64 << 10


class LiftConstants(GraphPass):
    """Turn Constant nodes into initializers of the same graph, bodies included.

    A Constant that is an output of its graph stays: not every reader takes an initializer for an output.
    """

    name: ClassVar[str] = "lift-constants"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Lift every Constant."""
        changes = []
        for graph in graphs(model):
            for node in tuple(graph):
                if node.op_type != "Constant" or node.domain != "":
                    continue
                tensor = _tensor(node)
                if tensor is None:
                    continue
                if node.outputs[0].is_graph_output():
                    node.outputs[0].const_value = tensor
                    continue
                changes.append(Change(rule="lift-constant", node=label(node)))
                become_constant(node.outputs[0], tensor)
        return changes


def _tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """What a Constant holds; None for sparse tensors."""
    (held,) = node.attributes.values()
    name = node.outputs[0].name
    match held.name:
        case "value":
            return held.as_tensor()
        case "value_float" | "value_floats":
            return ir.tensor(np.array(held.value, np.float32), name=name)
        case "value_int" | "value_ints":
            return ir.tensor(np.array(held.value, np.int64), name=name)
        case "value_string":
            return ir.StringTensor([held.as_string().encode()], shape=ir.Shape(()), name=name)
        case "value_strings":
            strings = [s.encode() for s in held.as_strings()]
            return ir.StringTensor(strings, shape=ir.Shape((len(strings),)), name=name)
    return None


def become_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let the output of a node be a constant of the same name; the node goes when no other output of it is read.

    An output of the graph becomes a Constant node instead.
    """
    node, name = value.producer(), value.name
    assert node is not None
    assert name is not None
    graph = node.graph
    assert graph is not None
    is_output = value.is_graph_output()
    value.name = f"{name}/folded"
    if is_output:
        tensor.name = name
        holder = ir.node("Constant", [], {"value": tensor}, name=f"{label(node)}/Constant")
        node.prepend(holder)
        new = holder.outputs[0]
        new.name, new.type, new.shape, new.const_value = name, value.type, value.shape, tensor
    else:
        new = register(graph, name, tensor)
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    if not any(o.uses() or o.is_graph_output() for o in node.outputs):
        inputs = [v for v in node.inputs if v is not None]
        graph.remove(node, safe=True)
        _drop_unused(inputs)


def _drop_unused(values: Iterable[ir.Value]) -> None:
    """Free constants at once, so that a folded weight is not held beside what it was folded into."""
    for value in dict.fromkeys(values):
        if value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
            assert value.graph is not None
            assert value.name is not None
            value.graph.initializers.pop(value.name)


class FoldConstants(GraphPass):
    """Compute nodes whose inputs are all constant, and inline the branch of an If whose condition is constant.

    Values come from ONNX Runtime's own kernels, so they are the bits that it would have computed at run time.
    Random operators are never folded, and neither are QuantizeLinear and DequantizeLinear: quantized weights stay so.
    """

    name: ClassVar[str] = "fold-constants"

    max_bytes: int = 1 << 20
    """The most bytes that folding one node may add to the model; what its inputs free is taken off."""
    widen: bool = False
    """Whether weights that are stored in a narrow float format and cast to a wider one are stored wide."""

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Fold until nothing more is constant."""
        changes: list[Change] = []
        while True:
            found = [change for graph in graphs(model) for change in self._fold(graph)]
            # Inlining takes bodies apart, so the bodies are looked up again after each graph.
            found += next((inlined for graph in graphs(model) if (inlined := _inline_branches(graph))), [])
            if not found:
                return changes
            changes += found

    def _fold(self, graph: ir.Graph) -> list[Change]:
        changes: list[Change] = []
        ready, seen = [node for node in graph if self._foldable(node)], set[ir.Node]()
        while ready:
            seen.update(ready)
            following: dict[ir.Node, None] = {}
            for batch in _batches(ready):
                for node, results in zip(batch, _evaluate(batch), strict=True):
                    if results is None:
                        continue
                    changes.append(Change(rule="fold-constant", node=label(node), detail=node.op_type))
                    for output, tensor in zip(tuple(node.outputs), results, strict=True):
                        if tensor is None:
                            continue
                        following.update((use.node, None) for use in output.uses() if use.node.graph is graph)
                        become_constant(output, tensor)
            ready = [node for node in following if node not in seen and self._foldable(node)]
        return changes

    def _foldable(self, node: ir.Node) -> bool:
        if (
            node.domain != ""
            or node.op_type in _KEPT
            or any(True for _ in subgraphs(node))
            or not node.inputs
            # ONNX Runtime refuses nodes without outputs, and with them all that is evaluated beside.
            or not any(o.uses() or o.is_graph_output() for o in node.outputs)
        ):
            return False
        tensors = []
        for value in node.inputs:
            if value is None:
                continue
            tensor = known_tensor(value)
            if tensor is None or tensor.dtype not in _NUMPY_TYPES:
                return False
            tensors.append(tensor)
        if (
            node.op_type in ("Div", "Mod")
            and tensors[1].dtype.is_integer()
            and not np.all(tensors[1].numpy())
        ):
            return False  # stops the whole process in ONNX Runtime
        infer_node(node)
        freed = sum(
            v.const_value.nbytes
            for v in dict.fromkeys(node.inputs)
            if v is not None and v.const_value is not None and not v.is_graph_output()
            and all(use.node is node for use in v.uses())
        )  # fmt: skip
        added = 0
        for output in node.outputs:
            if not (output.uses() or output.is_graph_output()):
                continue
            if (
                not isinstance(output.type, ir.TensorType)
                or output.dtype is None
                or output.dtype not in _NUMPY_TYPES
            ):
                return False
            if output.shape is None or not output.shape.is_static():
                if node.op_type not in _BOUNDED or sum(t.nbytes for t in tensors) > _TINY:
                    return False
                continue
            added += math.prod(output.shape.numpy()) * int(output.dtype.itemsize)
        widens = (
            node.op_type == "Cast"
            and tensors[0].dtype.is_floating_point()
            and added > freed
            and added > _TINY
        )
        return added - freed <= self.max_bytes and (self.widen or not widens)


def known_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Like ``constant``, without touching the data."""
    if value is None or value.const_value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    return (
        value.const_value if node is not None and node.op_type == "Constant" and node.domain == "" else None
    )


def _view(node: ir.Node) -> ir.TensorProtocol | None:
    """The result of moving a large tensor about, read from where that tensor lies whenever it is asked for.

    A model's weights in a mapped file stay there, and no second copy of them is made.
    """
    tensor = known_tensor(node.inputs[0])
    shape = node.outputs[0].shape
    if tensor is None or tensor.nbytes <= _BATCH or shape is None or not shape.is_static():
        return None
    if node.op_type == "Transpose":
        permutation = node.attributes.get_ints("perm", tuple(range(len(tensor.shape)))[::-1])
        return ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(permutation))),
            dtype=tensor.dtype,
            shape=ir.Shape(shape.numpy()),
        )
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"):
        return ir.LazyTensor(
            lambda: ir.tensor(tensor.numpy().reshape(shape.numpy())),
            dtype=tensor.dtype,
            shape=ir.Shape(shape.numpy()),
        )
    return None


def _batches(nodes: Sequence[ir.Node]) -> Iterator[list[ir.Node]]:
    """Nodes that are evaluated together: many small ones, or one large one."""
    batch: list[ir.Node] = []
    size = 0
    for node in nodes:
        inputs = sum(v.const_value.nbytes for v in node.inputs if v is not None and v.const_value is not None)
        if batch and size + inputs > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(node)
        size += inputs
    if batch:
        yield batch


def _evaluate(nodes: Sequence[ir.Node]) -> list[list[ir.TensorProtocol | None] | None]:
    """The outputs of each node, None where nothing reads one; None for nodes that cannot be evaluated."""
    if len(nodes) == 1 and (view := _view(nodes[0])) is not None:
        return [[view]]
    try:
        return _run(nodes)
    except _EVALUATION_ERRORS as error:
        if len(nodes) == 1:
            logger.debug("cannot fold %s: %s", label(nodes[0]), first_line(error))
            return [None]
        # One that fails must not cost a session for each of the others.
        half = len(nodes) // 2
        return [*_evaluate(nodes[:half]), *_evaluate(nodes[half:])]


def _run(nodes: Sequence[ir.Node]) -> list[list[ir.TensorProtocol | None] | None]:
    """Run ``nodes``, which do not read each other, in a graph of their own."""
    feeds: dict[ir.Value, ir.Value] = {}
    copies, wanted = [], []
    for number, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value not in feeds:
                tensor = known_tensor(value)
                assert tensor is not None
                feeds[value] = ir.Value(
                    name=f"i{len(feeds)}",
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()),
                )
        outputs = [
            ir.Value(name=f"o{number}_{index}" if o.uses() or o.is_graph_output() else "", type=o.type)
            for index, o in enumerate(node.outputs)
        ]
        inputs = [None if v is None else feeds[v] for v in node.inputs]
        copies.append(
            ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=outputs, name=f"n{number}")
        )
        wanted += [o for o in outputs if o.name]
    graph = ir.Graph(list(feeds.values()), wanted, nodes=copies, opset_imports={"": OPSET}, name="constants")
    source = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = ort.InferenceSession(
        source, session_options(threads=1, optimize=False), providers=["CPUExecutionProvider"]
    )
    values = session.run(
        None,
        {str(copy.name): v.const_value.numpy() for v, copy in feeds.items() if v.const_value is not None},
    )
    found = {output: ir.tensor(np.asarray(array)) for output, array in zip(wanted, values, strict=True)}
    return [[found.get(output) for output in copy.outputs] for copy in copies]


def _inline_branches(graph: ir.Graph) -> list[Change]:
    changes = []
    for node in tuple(graph):
        if node.op_type != "If" or node.domain != "":
            continue
        condition = constant(node.inputs[0])
        if condition is None or condition.size != 1:
            continue
        branch = attribute(node, "then_branch" if condition.reshape(())[()] else "else_branch")
        assert isinstance(branch, ir.Graph)
        changes.append(
            Change(rule="inline-branch", node=label(node), detail=str(bool(condition.reshape(())[()])))
        )
        _inline(node, branch, graph)
    return changes


def _inline(node: ir.Node, branch: ir.Graph, graph: ir.Graph) -> None:
    """Put what ``branch`` holds in the place of the If ``node``."""
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, initializer in tuple(branch.initializers.items()):
        branch.initializers.pop(name)
        graph.register_initializer(initializer)
    nodes = list(branch)
    branch.remove(nodes)
    node.prepend(nodes)
    for output, result in zip(tuple(node.outputs), results, strict=True):
        if not replaceable(output, result):
            copy = ir.node("Identity", [result], name=f"{label(node)}/{output.name}")
            copy.outputs[0].name = f"{output.name}/inlined"
            copy.outputs[0].type, copy.outputs[0].shape = result.type, result.shape
            node.prepend(copy)
            result = copy.outputs[0]
        substitute(output, result)
    remove(node)
