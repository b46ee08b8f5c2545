"""What is known about ONNX operators: ``spec(node)`` gives the row."""

from __future__ import annotations

import onnx_ir as ir

from optkit.ops import attention, conv, elementwise, matmul, norm, quant, reduce, shape
from optkit.ops.spec import OpSpec

OPS: dict[str, OpSpec] = {
    row.name: row
    for family in (conv, matmul, elementwise, norm, attention, reduce, shape, quant)
    for row in family.ROWS
}

__all__ = ["OPS", "OpSpec", "spec"]


def spec(node: ir.Node) -> OpSpec | None:
    """The row of a node's operator, or None for operators outside the table and other domains."""
    return OPS.get(node.op_type) if node.domain == "" else None
