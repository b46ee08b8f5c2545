"""Convert a graph, node by node, from whatever operator set it was written in to the one that passes know.

``onnx.version_converter`` does this for whole serialized models: it needs the weights in memory, forgets metadata, does
not look into all bodies, and passes some operators through although their meaning changed (Hardmax). The rules below are
the differences between the operators' schemas that are more than a wider choice of types.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from optkit.errors import ModelError, UnsupportedOpError
from optkit.functions import NotDefinedError, alone, put, written_out
from optkit.graph import OPSET, constant, describe, subgraphs, walk
from optkit.store import outline

logger = logging.getLogger(__name__)

# The oldest operator set whose broadcasting is today's.
OLDEST = 7


class _NotConvertible(Exception):
    """Why one node has no equivalent at the working opset; collected, never seen outside."""


# What ONNX infers about values in their own operator set. Not noted in the graph: rules still change it.
_Types = dict[ir.Value | None, tuple[ir.DataType | None, ir.Shape | None]]


@dataclass(slots=True)
class _At:
    """Edits at one node; new nodes and constants are named after it and get its metadata."""

    node: ir.Node
    # Functions have no initializers: their constants are nodes.
    function: bool
    types: _Types

    def shape(self, value: ir.Value | None) -> ir.Shape | None:
        return self.types[value][1] if value in self.types else None if value is None else value.shape

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        return self.types[value][0] if value in self.types else None if value is None else value.dtype

    def attribute(self, name: str) -> ir.Attr | None:
        """Take an attribute off the node."""
        found = self.node.attributes.pop(name, None)
        if found is not None and found.is_ref():
            raise _NotConvertible(f"its {name} comes from a parameter of the function around it")
        return found

    def constant(self, values: Any, dtype: Any, what: str) -> ir.Value:
        array = np.asarray(values, dtype)
        name = f"{self._base()}/{what}"
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
        )
        graph = self.node.graph
        assert graph is not None
        if self.function:
            return self.before("Constant", [], what, value=ir.tensor(array, name=name))
        while value.name in graph.initializers:
            value.name = f"{value.name}_"
        value.const_value = ir.tensor(array, name=value.name)
        graph.register_initializer(value)
        return value

    def before(
        self, op_type: str, inputs: Sequence[ir.Value | None], what: str, **attributes: Any
    ) -> ir.Value:
        new = self._new(op_type, inputs, what, attributes)
        self.node.prepend(new)
        return new.outputs[0]

    def after(
        self, op_type: str, inputs: Sequence[ir.Value | None], what: str, **attributes: Any
    ) -> ir.Value:
        """Add a node behind; its output takes over the name, type and users of the node's own output."""
        old = self.node.outputs[0]
        uses = tuple(old.uses())
        new = self._new(op_type, inputs, what, attributes)
        self.node.append(new)
        value = new.outputs[0]
        value.type, value.shape = old.type, old.shape
        value.metadata_props.update(old.metadata_props)
        for user, index in uses:
            user.replace_input_with(index, value)
        graph = self.node.graph
        assert graph is not None
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = value
        name, old.name = old.name, f"{self._base()}/{self.node.op_type}"
        value.name, old.shape = name, None
        return value

    def set_input(self, index: int, value: ir.Value | None) -> None:
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, value)

    def _base(self) -> str:
        return self.node.name or self.node.outputs[0].name or self.node.op_type

    def _new(
        self, op_type: str, inputs: Sequence[ir.Value | None], what: str, attributes: dict[str, Any]
    ) -> ir.Node:
        new = ir.node(op_type, inputs, attributes=attributes, name=f"{self._base()}/{what}", version=OPSET)
        new.outputs[0].name = f"{self._base()}/{what}"
        new.metadata_props.update(self.node.metadata_props)
        return new


def _ints(found: ir.Attr) -> list[int]:
    return list(found.as_ints())


def _to_inputs(*names: str) -> Callable[[_At], None]:
    """Lists of integers that were attributes and now are the inputs from the second on."""

    def rule(at: _At) -> None:
        for index, name in enumerate(names, start=1):
            found = at.attribute(name)
            if found is not None:
                at.set_input(index, at.constant(_ints(found), np.int64, name))

    return rule


def _set_default(name: str, value: str) -> Callable[[_At], None]:
    """Write out a default that later changed."""

    def rule(at: _At) -> None:
        if name not in at.node.attributes:
            at.node.attributes[name] = ir.AttrString(name, value)

    return rule


def _element_type(at: _At) -> Any:
    return (at.dtype(at.node.inputs[0]) or ir.DataType.FLOAT).numpy()


def _clip(at: _At) -> None:
    for index, name in enumerate(("min", "max"), start=1):
        found = at.attribute(name)
        if found is not None:
            at.set_input(index, at.constant(found.as_float(), _element_type(at), name))


def _pad(at: _At) -> None:
    pads, value = at.attribute("pads"), at.attribute("value")
    if pads is None:
        raise _NotConvertible("it has no pads")
    at.set_input(1, at.constant(_ints(pads), np.int64, "pads"))
    if value is not None and value.as_float() != 0:
        at.set_input(2, at.constant(value.as_float(), _element_type(at), "value"))


def _top_k(at: _At) -> None:
    k = at.attribute("k")
    if k is None:
        raise _NotConvertible("it has no k")
    at.set_input(1, at.constant([k.as_int()], np.int64, "k"))


def _upsample_scales(at: _At) -> None:
    scales = at.attribute("scales")
    if scales is None:
        raise _NotConvertible("it has no scales")
    at.set_input(1, at.constant(list(scales.as_floats()), np.float32, "scales"))


def _resize(at: _At) -> None:
    """To Resize as of opset 11. What it left open before is what ONNX Runtime does for those versions.

    Coordinates are scaled without a shift; the nearest pixel is the one below when enlarging, above when shrinking
    (UpsampleNearest with ResizeNearestMode::SIMPLE in onnxruntime/core/providers/cpu/tensor/upsample.h).
    """
    if len(at.node.inputs) != 2:
        raise _NotConvertible("it has no scales")
    scales = at.node.inputs[1]
    known = constant(scales)
    shrinks = known is not None and bool((known < 1).any())
    if known is not None and shrinks and bool((known > 1).any()):
        raise _NotConvertible("it enlarges one axis and shrinks another")
    at.node.op_type = "Resize"
    at.set_input(1, None)
    at.set_input(2, scales)
    at.node.attributes["coordinate_transformation_mode"] = ir.AttrString(
        "coordinate_transformation_mode", "asymmetric"
    )
    at.node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")


def _scatter(at: _At) -> None:
    at.node.op_type = "ScatterElements"


def _dropout(at: _At) -> None:
    # At inference the input is passed on, whatever the ratio is.
    at.attribute("ratio")


def _flat_softmax(at: _At) -> None:
    """Softmax, LogSoftmax and Hardmax worked on ``axis`` and all axes behind it as one."""
    found = at.attribute("axis")
    axis, x = found.as_int() if found is not None else 1, at.node.inputs[0]
    shape = at.shape(x)
    if shape is not None and len(shape) and all(d == 1 for d in shape[axis % len(shape) + 1 :]):
        at.node.attributes["axis"] = ir.AttrInt64("axis", axis % len(shape))
        return
    flat = at.before("Flatten", [x], "flat", axis=axis)
    sizes = at.before("Shape", [x], "shape")
    at.set_input(0, flat)
    at.node.attributes["axis"] = ir.AttrInt64("axis", -1)
    at.after("Reshape", [at.node.outputs[0], sizes], "Reshape")


def _split(at: _At) -> None:
    if len(at.node.inputs) < 2 or at.node.inputs[1] is None:
        at.node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(at.node.outputs))


def _spatial(at: _At) -> None:
    found = at.attribute("spatial")
    shape = at.shape(at.node.inputs[0])
    if found is not None and found.as_int() != 1 and (shape is None or len(shape) != 2):
        raise _NotConvertible("it normalises each position by itself (spatial=0)")


def _statistics(at: _At) -> None:
    if any(v.uses() or v.is_graph_output() for v in at.node.outputs[1:]):
        raise _NotConvertible("its running statistics are used: the model was exported in training mode")
    at.node.resize_outputs(1)


def _grid_sample(at: _At) -> None:
    found = at.attribute("mode")
    if found is not None:
        mode = found.as_string()
        at.node.attributes["mode"] = ir.AttrString(
            "mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
        )


def _dft(at: _At) -> None:
    found = at.attribute("axis")
    at.set_input(2, at.constant(found.as_int() if found is not None else 1, np.int64, "axis"))


def _group_normalization(at: _At) -> None:
    """Scale and bias were given for each group, now for each channel."""
    shape = at.shape(at.node.inputs[0])
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    groups = at.node.attributes.get_int("num_groups", 0)
    if not isinstance(channels, int) or not groups or channels % groups:
        raise _NotConvertible("the number of channels of its input is not known")
    each = at.constant([1, channels // groups], np.int64, "each")
    column, flat = at.constant([-1, 1], np.int64, "column"), at.constant([-1], np.int64, "flat")
    for index, what in ((1, "scale"), (2, "bias")):
        as_column = at.before("Reshape", [at.node.inputs[index], column], f"{what}_column")
        spread = at.before("Expand", [as_column, each], f"{what}_spread")
        at.set_input(index, at.before("Reshape", [spread, flat], what))


def _scan(at: _At) -> None:
    raise _NotConvertible("Scan with a batch axis (opset 8) is not supported")


# Applied in order to nodes written before that version. Everything not listed means the same in all versions up to
# OPSET from OLDEST on; a test holds this table against the schemas.
_axes = _to_inputs("axes")
_RULES: dict[str, tuple[tuple[int, Callable[[_At], None]], ...]] = {
    "BatchNormalization": ((9, _spatial), (14, _statistics)),
    "Clip": ((11, _clip),),
    "DFT": ((20, _dft),),
    "Dropout": ((12, _dropout),),
    "GridSample": ((20, _grid_sample),),
    "GroupNormalization": ((21, _group_normalization),),
    "Hardmax": ((13, _flat_softmax),),
    "LogSoftmax": ((13, _flat_softmax),),
    "Pad": ((11, _pad),),
    "ReduceL1": ((18, _axes),),
    "ReduceL2": ((18, _axes),),
    "ReduceLogSum": ((18, _axes),),
    "ReduceLogSumExp": ((18, _axes),),
    "ReduceMax": ((18, _axes),),
    "ReduceMean": ((18, _axes),),
    "ReduceMin": ((18, _axes),),
    "ReduceProd": ((18, _axes),),
    "ReduceSum": ((13, _axes),),
    "ReduceSumSquare": ((18, _axes),),
    "Resize": ((11, _resize),),
    "RoiAlign": ((16, _set_default("coordinate_transformation_mode", "output_half_pixel")),),
    "Scan": ((9, _scan),),
    "Scatter": ((11, _scatter),),
    "Slice": ((10, _to_inputs("starts", "ends", "axes")),),
    "Softmax": ((13, _flat_softmax),),
    "Split": ((13, _to_inputs("split")), (18, _split)),
    "Squeeze": ((13, _axes),),
    "TopK": ((10, _top_k),),
    "Unsqueeze": ((13, _axes),),
    "Upsample": ((9, _upsample_scales), (10, _resize)),
}

# Rules that look at types or shapes.
_TYPED = frozenset({_clip, _flat_softmax, _group_normalization, _pad, _spatial})


def convert(model: ir.Model, *, name: str) -> None:
    """Rewrite every node whose ``version`` is not ``OPSET`` to mean the same there, in place.

    Every node must carry the version it was written for, and the model import one that fits most. Newer operators are
    written out with the function that their schema defines.

    Raises:
        ModelError: The version is before ``OLDEST``.
        UnsupportedOpError: Lists every node without an equivalent.
    """
    problems: list[tuple[str, str]] = []
    types = _infer(model)
    for graph, function in ((model.graph, False), *((f.graph, True) for f in model.functions.values())):
        for scope in (graph, *graph.subgraphs()):
            for node in tuple(scope):
                if node.domain == "" and node.version != OPSET:
                    _convert_node(_At(node, function, types), problems, name)
    if problems:
        raise UnsupportedOpError(
            f"{name}: conversion to opset {OPSET}", problems, hint=f"export the model with opset {OPSET}"
        )
    model.opset_imports[""] = OPSET
    for f in model.functions.values():
        f.opset_imports[""] = OPSET


def _infer(model: ir.Model) -> _Types:
    """Types and shapes as ONNX's inference finds them, without weights; empty where no rule will ask."""
    scopes = (model.graph, *(f.graph for f in model.functions.values()))
    nodes = (n for scope in scopes for n in walk(scope) if n.domain == "" and n.version)
    if not any(_asks(node.op_type, node.version or OPSET) for node in nodes):
        return {}
    try:
        # Without data propagation: that would make constants as large as the model says.
        proto = onnx.shape_inference.infer_shapes(outline(model), data_prop=False)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        logger.debug("shape inference stopped: %s", error)
        return {}
    types: _Types = {}
    _collect(model.graph, proto.graph, types)
    return types


def _asks(op_type: str, version: int) -> bool:
    return version > OPSET or any(version < v and rule in _TYPED for v, rule in _RULES.get(op_type, ()))


def _collect(graph: ir.Graph, proto: onnx.GraphProto, types: _Types) -> None:
    infos = {info.name: info.type for info in (*proto.input, *proto.output, *proto.value_info)}
    for value in (*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)):
        kind = infos.get(value.name or "")
        if kind is not None and kind.HasField("tensor_type"):
            dtype = ir.DataType(kind.tensor_type.elem_type)
            types[value] = (
                dtype if dtype != ir.DataType.UNDEFINED else value.dtype,
                ir.serde.deserialize_type_proto_for_shape(kind),
            )
    for node, twin in zip(graph, proto.node, strict=True):
        bodies = [
            b for a in twin.attribute for b in ((a.g,) if a.type == onnx.AttributeProto.GRAPH else a.graphs)
        ]
        for body, inner in zip(subgraphs(node), bodies, strict=True):
            _collect(body, inner, types)


def _convert_node(at: _At, problems: list[tuple[str, str]], name: str) -> None:
    node = at.node
    version = node.version or OPSET
    if version < OLDEST:
        raise ModelError(
            f"{name}: written for opset {version}, older than {OLDEST}",
            hint=f"export it again with opset {OPSET}, or convert it with onnx.version_converter first",
        )
    label = describe(node)
    try:
        if version > OPSET:
            _lower(at, version, problems, name)
        else:
            for before, rule in _RULES.get(node.op_type, ()):
                if version < before:
                    rule(at)
    except _NotConvertible as error:
        problems.append((label, str(error)))
    node.version = OPSET


def _lower(at: _At, version: int, problems: list[tuple[str, str]], name: str) -> None:
    """Write a node of a newer operator set in terms of ``OPSET``."""
    node = at.node
    newer = onnx.defs.get_schema(node.op_type, version, "")
    if newer.since_version <= OPSET:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        _expand(at, newer, version, problems, name)
        return
    for attribute in tuple(node.attributes.values()):
        if attribute.name in schema.attributes:
            continue
        default = newer.attributes[attribute.name].default_value
        if attribute.is_ref() or ir.serde.deserialize_attribute(default).value != attribute.value:
            raise _NotConvertible(f"opset {OPSET} does not have its attribute {attribute.name}")
        del node.attributes[attribute.name]
    if any(v is not None for v in node.inputs[schema.max_input :]):
        raise _NotConvertible(f"opset {OPSET} has only {schema.max_input} inputs for it")
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for index, value in enumerate(node.inputs):
        dtype = at.dtype(value)
        if dtype is None:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        kind = f"tensor({_type_name(dtype)})"
        if formal in allowed and kind not in allowed[formal]:
            raise _NotConvertible(f"opset {OPSET} does not have it for {kind}")


def _type_name(dtype: ir.DataType) -> str:
    """As in schemas: ``float16``, ``float8e4m3fn``; but float32 is ``float`` and float64 is ``double``."""
    return str(onnx.TensorProto.DataType.Name(int(dtype))).lower()


def _expand(
    at: _At, schema: onnx.defs.OpSchema, version: int, problems: list[tuple[str, str]], name: str
) -> None:
    """Put the function that defines a newer operator in its place."""
    node = at.node
    defined = schema.has_function or schema.has_context_dependent_function  # type: ignore[attr-defined]
    if not defined or any(True for _ in subgraphs(node)):
        raise _NotConvertible(
            f"it exists from opset {schema.since_version} on and has no definition in older operators"
        )
    if node.op_type == "Attention":
        _mask_nothing(at, version)
    try:
        written = written_out(alone(node, version, lambda v: (at.dtype(v), at.shape(v))))
    except NotDefinedError as error:
        raise _NotConvertible(f"it exists from opset {schema.since_version} on and {error}") from error
    for new in put(node, ir.serde.deserialize_model(written).graph):
        for inner in (new, *(n for body in subgraphs(new) for n in walk(body))):
            inner.version = version
            _convert_node(_At(inner, at.function, at.types), problems, name)


def _mask_nothing(at: _At, version: int) -> None:
    """Attention's definition is not written out where inputs behind the mask are given and the mask is not: 0 changes nothing."""
    query, key, _, mask, past = (*at.node.inputs, None, None)[:5]
    dtype = at.dtype(query)
    if len(at.node.inputs) <= 4 or mask is not None or dtype is None:
        return
    if version < 24:
        at.set_input(3, at.constant([[0.0]], dtype.numpy(), "mask"))
        return
    # As long as there are keys: what is shorter hides the rest.
    length = at.before("Shape", [key], "keys", start=-2, end=-1)
    if past is not None:
        length = at.before("Add", [length, at.before("Shape", [past], "past", start=-2, end=-1)], "whole")
    shape = at.before("Concat", [at.constant([1], np.int64, "one"), length], "shape", axis=0)
    zeros = at.before("Expand", [at.constant(0, dtype.numpy(), "zero"), shape], "mask")
    zeros.type, zeros.shape = ir.TensorType(dtype), ir.Shape([1, None])
    at.set_input(3, zeros)
