"""Integer products of u8 by u8, which widen before they multiply, in place of those of u8 by s8, which saturate on some processors."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, walk
from optkit.rewrite import Names, label

_MICROSOFT = "com.microsoft"
# Where the activation, the weights and their zero points stand.
_AT = {
    ("", "MatMulInteger"): (0, 1, 3), ("", "ConvInteger"): (0, 1, 3),
    ("", "QLinearMatMul"): (0, 3, 5), ("", "QLinearConv"): (0, 3, 5),
    (_MICROSOFT, "MatMulIntegerToFloat"): (0, 1, 5), (_MICROSOFT, "DynamicQuantizeMatMul"): (0, 1, 3),
}  # fmt: skip


def signed(model: ir.Model) -> list[ir.Node]:
    """Operators on integers that multiply u8 by constant s8, also in bodies; Q/DQ pairs are none."""
    return [node for node in walk(model) if (node.domain, node.op_type) in _AT and _is_signed(node)]


def unsigned(model: ir.Model) -> None:
    """Write 128 more for the weights of ``signed`` products and for their zero points, which changes no product."""
    names = Names(model)
    for node in signed(model):
        _, weights, zero = _AT[node.domain, node.op_type]
        held, offset = constant(node.inputs[weights]), constant(_input(node, zero))
        assert held is not None
        if len(node.inputs) <= zero:
            node.resize_inputs(zero + 1)
        for at, array in ((weights, held), (zero, np.zeros((), np.int8) if offset is None else offset)):
            name = names.new(f"{label(node)}/unsigned")
            tensor = ir.tensor((array.astype(np.int16) + 128).astype(np.uint8), name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            # Bodies read what is around them.
            model.graph.register_initializer(value)
            node.replace_input_with(at, value)


def _input(node: ir.Node, at: int) -> ir.Value | None:
    return node.inputs[at] if at < len(node.inputs) else None


def _is_signed(node: ir.Node) -> bool:
    at, weights, zero = _AT[node.domain, node.op_type]
    x, held, offset = node.inputs[at], constant(node.inputs[weights]), _input(node, zero)
    known = offset is None or constant(offset) is not None
    return (
        x is not None and x.dtype != ir.DataType.INT8 and held is not None and held.dtype == np.int8 and known
    )
