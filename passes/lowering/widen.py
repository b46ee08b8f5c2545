"""A graph in float16 as one in float32, for runtimes whose processors compute in nothing less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import graphs
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Names

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Attributes that name the type of what comes out.
_TYPES = frozenset({"to", "dtype", "output_dtype"})


class WidenHalves(GraphPass):
    """Compute in float32 what the graph computes in float16; its inputs and outputs keep their types.

    Before: ``y = MatMul(x, w)`` in float16. After: ``y = Cast(MatMul(Cast(x), w))``, the constant ``w`` in float32 with the same values,
    which files that store on 16 bits what these hold keep small. Nothing is rounded between that and the end: the numbers are those of
    the graph with fewer roundings, and what overflowed is finite.
    """

    name: ClassVar[str] = "widen-halves"
    exact: ClassVar[bool] = False

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Widen every value; casts at the borders."""
        names, changes = Names(model), list[Change]()
        borders = [v.producer() for v in model.graph.outputs if _is_border(v)]
        inputs = [v for v in model.graph.inputs if v.dtype == _HALF]
        outputs = [
            index
            for index, value in enumerate(model.graph.outputs)
            if value.dtype == _HALF and value.producer() is not None and not _is_border(value)
        ]
        for graph in graphs(model):
            for value in graph.initializers.values():
                if value.dtype == _HALF and value.const_value is not None and not value.is_graph_output():
                    wide = value.const_value.numpy().astype(np.float32)
                    value.const_value = ir.tensor(wide, name=value.name)
                    value.type = ir.TensorType(_SINGLE)
            for value in graph.inputs if graph is not model.graph else ():
                _typed(value)
            for node in graph:
                if node not in borders and _widened(node):
                    changes.append(
                        Change(rule=self.name, node=str(node.name), detail=f"{node.op_type} in float32")
                    )
        for value in inputs:
            readers = [u for u in value.uses() if u.node.op_type != "Cast"]
            if readers:
                cast = _cast(value, _SINGLE, names.new(f"{value.name}/float"), names)
                model.graph.insert_before(model.graph[0], cast)
                for node, index in readers:
                    node.replace_input_with(index, cast.outputs[0])
        for index in outputs:
            value = model.graph.outputs[index]
            name, value.name = str(value.name), names.new(f"{value.name}/float")
            cast = _cast(value, _HALF, name, names)
            model.graph.append(cast)
            model.graph.outputs[index] = cast.outputs[0]
        return changes


def _is_border(value: ir.Value) -> bool:
    """Whether an output of the graph is cast from float32, for nobody else."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return value.dtype == _HALF and source is not None and source.dtype == _SINGLE and not value.uses()


def _typed(value: ir.Value) -> bool:
    """Let a value be float32 that was float16; whether it was."""
    found = value.dtype == _HALF
    if found:
        value.type = ir.TensorType(_SINGLE)
    return found


def _widened(node: ir.Node) -> bool:
    """Let a node give float32 where it gave float16; whether it did."""
    for name, attribute in tuple(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in _TYPES and attribute.value == _HALF:
            node.attributes[name] = ir.AttrInt64(name, int(_SINGLE))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _HALF:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
    return any([_typed(o) for o in node.outputs])  # every one, not up to the first


def _cast(value: ir.Value, dtype: ir.DataType, name: str, names: Names) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=names.new(f"{name}/Cast"))
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        name,
        ir.TensorType(dtype),
        value.shape,
    )
    return node
