"""What a graph computes in float16 or float64 in float32, for runtimes that compute in nothing less or nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import graphs
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Names

_SINGLE = ir.DataType.FLOAT
# Attributes that name the type of what comes out.
_TYPES = frozenset({"to", "dtype", "output_dtype"})


class _InSingle(GraphPass):
    """Values of the type ``of`` become float32; inputs and outputs of the graph keep their types, by casts at the borders."""

    exact: ClassVar[bool] = False
    of: ClassVar[ir.DataType]

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Every value; casts at the borders."""
        names, changes = Names(model), list[Change]()
        borders = [v.producer() for v in model.graph.outputs if self._is_border(v)]
        inputs = [v for v in model.graph.inputs if v.dtype == self.of]
        outputs = [
            index
            for index, value in enumerate(model.graph.outputs)
            if value.dtype == self.of and value.producer() is not None and not self._is_border(value)
        ]
        for graph in graphs(model):
            for value in graph.initializers.values():
                if value.dtype == self.of and value.const_value is not None and not value.is_graph_output():
                    value.const_value = ir.tensor(_single(value.const_value.numpy()), name=value.name)
                    value.type = ir.TensorType(_SINGLE)
            for value in graph.inputs if graph is not model.graph else ():
                self._typed(value)
            for node in graph:
                if node not in borders and self._converted(node):
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
            cast = _cast(value, self.of, name, names)
            model.graph.append(cast)
            model.graph.outputs[index] = cast.outputs[0]
        return changes

    def _is_border(self, value: ir.Value) -> bool:
        """Whether an output of the graph is cast from float32, for nobody else."""
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
        return value.dtype == self.of and source is not None and source.dtype == _SINGLE and not value.uses()

    def _typed(self, value: ir.Value) -> bool:
        """Let a value be float32; whether it was not."""
        found = value.dtype == self.of
        if found:
            value.type = ir.TensorType(_SINGLE)
        return found

    def _converted(self, node: ir.Node) -> bool:
        """Let a node give float32 where it gave the other type; whether it did."""
        for name, attribute in tuple(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in _TYPES and attribute.value == self.of:
                node.attributes[name] = ir.AttrInt64(name, int(_SINGLE))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == self.of:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(_single(attribute.value.numpy())))
        return any([self._typed(o) for o in node.outputs])  # every one, not up to the first


class WidenHalves(_InSingle):
    """Compute in float32 what the graph computes in float16; its inputs and outputs keep their types.

    Before: ``y = MatMul(x, w)`` in float16. After: ``y = Cast(MatMul(Cast(x), w))``, the constant ``w`` in float32 with the same values,
    which files that store on 16 bits what these hold keep small. Nothing is rounded between that and the end: the numbers are those of
    the graph with fewer roundings, and what overflowed is finite.
    """

    name: ClassVar[str] = "widen-halves"
    of: ClassVar[ir.DataType] = ir.DataType.FLOAT16


class NarrowDoubles(_InSingle):
    """Compute in float32 what the graph computes in float64, as angles of positions often are; its inputs and outputs keep their types.

    Before: ``y = Cast(Cos(Mul(Cast(x), w)))`` with a product in float64. After: ``y = Cos(Mul(x, w))`` in float32. Numbers have 24 bits in
    place of 53, and those beyond float32 are its largest ones.
    """

    name: ClassVar[str] = "narrow-doubles"
    of: ClassVar[ir.DataType] = ir.DataType.DOUBLE


def _single(array: np.ndarray) -> np.ndarray:
    """In float32; what is finite stays so."""
    most = np.finfo(np.float32).max
    kept = (
        np.where(np.isinf(array), array, np.clip(array, -most, most)) if array.dtype == np.float64 else array
    )
    return np.asarray(kept.astype(np.float32))


def _cast(value: ir.Value, dtype: ir.DataType, name: str, names: Names) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=names.new(f"{name}/Cast"))
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        name,
        ir.TensorType(dtype),
        value.shape,
    )
    return node
