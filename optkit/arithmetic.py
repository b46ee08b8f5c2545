"""What the products of a graph are computed in, read from the types of their operands and the Q/DQ pairs in front of them."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import walk
from optkit.microscaling import format_of
from optkit.ops import spec

_INTEGER_PRODUCTS = frozenset(
    {
        "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul",
        "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",  # of ONNX Runtime
    }
)  # fmt: skip
_FLOATS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "fp64",
}
FLOATS = frozenset(_FLOATS.values())
_GRIDS = {
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT8E5M2: "fp8",
}
# Between a DequantizeLinear and a product; a runtime multiplies what lies in front of them.
_KEEPING = frozenset({"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"})


def product_format(node: ir.Node) -> str:
    """The grid that both operands of ``node`` come from, else their float type; ``fp32`` where nothing is known."""
    if node.op_type in _INTEGER_PRODUCTS:
        return "int8"
    grids = {_grid(value) for value in node.inputs[:2]}
    if len(node.inputs) > 1 and len(grids) == 1 and (grid := grids.pop()) is not None:
        return grid
    return float_format(node)


def float_format(node: ir.Node) -> str:
    """Of the numbers that ``node`` is handed, whatever grid they come from; ``fp32`` where nothing is known."""
    value = node.inputs[0] if node.inputs else None
    return "fp32" if value is None or value.dtype is None else _FLOATS.get(value.dtype, "fp32")


def _grid(value: ir.Value | None) -> str | None:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            return None if source is None or source.dtype is None else _GRIDS.get(source.dtype)
        if (blocks := format_of(node)) is not None:
            return blocks.name
        if node.op_type not in _KEEPING:
            return None
        value = node.inputs[0]
        # Floats of 8 bits are numbers of their grid without a scale too; what integers stand for, only a scale tells.
        if value is not None and value.dtype is not None and _GRIDS.get(value.dtype) == "fp8":
            return "fp8"
    return None


def stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that ``value`` is, or that is dequantized, cast or moved into it."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type == "Gather":
            return None
        row, back = spec(producer), producer.op_type in ("DequantizeLinear", "Cast")
        if not back and format_of(producer) is None and (row is None or row.family != "shape"):
            return None
        value = producer.inputs[0]
    return value


def products(model: ir.Model) -> dict[str, int]:
    """Products with weights, counted by what they are computed in."""
    found: dict[str, int] = {}
    for node in walk(model):
        known = spec(node)
        if known is None or known.weight is None or known.macs is None or known.weight >= len(node.inputs):
            continue
        if stored(node.inputs[known.weight]) is not None:
            fmt = product_format(node)
            found[fmt] = found.get(fmt, 0) + 1
    return dict(sorted(found.items()))
