"""What TensorRT cannot run, said before any work begins."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import constant
from optkit.microscaling import format_of
from optkit.targets import Target

# TensorRT's parser has no importer for integer arithmetic spelled as operators; only Q/DQ pairs are read.
_OPERATOR_INT8 = frozenset(
    {
        "ConvInteger",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "DynamicQuantizeLinear",
        "QLinearAdd",
        "QGemm",
    }
)
_NO_TENSORS = ("Sequence", "String", "Optional")
_MISSING = frozenset({"Det", "DeformConv", "Unique", "RegexFullMatch", "TfIdfVectorizer"})
# Stored types of Q/DQ pairs, and the format that the card needs for them.
_STORED = {
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT8E5M2: "fp8",
    ir.DataType.INT4: "w4a16",
    ir.DataType.FLOAT4E2M1: "nvfp4",
}

# The first architecture that Triton's kernels are compiled for.
_KERNELS = (8, 0)


def refusal(node: ir.Node, target: Target) -> str | None:
    """Why ``node`` cannot be in an engine for ``target``; None where nothing speaks against it."""
    if (node.domain == "" and node.op_type in _OPERATOR_INT8) or node.op_type in ("QLinearAdd", "QGemm"):
        return "TensorRT has no int8 operators; it reads QuantizeLinear and DequantizeLinear alone (--precision int8)"
    if node.domain == "" and (node.op_type in _MISSING or node.op_type.startswith(_NO_TENSORS)):
        return "TensorRT's parser has no importer for it"
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    if ir.DataType.DOUBLE in kinds:
        return "TensorRT computes float64 in float32, which the graph must say itself: export it in float32"
    if node.domain == "" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _pair(node, target)
    if (blocks := format_of(node)) is not None:
        return target.refusal(blocks.name)
    for value in node.inputs:
        if (
            value is not None
            and value.is_initializer()
            and value.dtype in (ir.DataType.INT8, ir.DataType.INT4)
        ):
            return "TensorRT takes quantized constants right in front of a DequantizeLinear alone"
    return target.refusal("bf16") if ir.DataType.BFLOAT16 in kinds else None


def _pair(node: ir.Node, target: Target) -> str | None:
    stored = (
        node.outputs[0].dtype
        if node.op_type == "QuantizeLinear"
        else None
        if node.inputs[0] is None
        else node.inputs[0].dtype
    )
    if stored == ir.DataType.INT32:
        return "TensorRT keeps biases in float: there is no grid of int32"
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    moved = zero is not None and bool(np.asarray(zero, np.float32).any())
    if stored == ir.DataType.UINT4 or (stored == ir.DataType.INT4 and moved):
        kernels = target.capability is not None and target.capability >= _KERNELS
        out = "; -r triton-fp16 has kernels for weights of 4 bits with zero points" if kernels else ""
        found = "this is uint4" if stored == ir.DataType.UINT4 else "this has others"
        return f"TensorRT takes int4 with zero point 0 alone, {found}{out}"
    if stored in (ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16):
        return f"TensorRT takes signed grids with zero point 0, this one is {stored.name.lower()}"
    wanted = None if stored is None else _STORED.get(stored)
    if wanted is not None and (why := target.refusal(wanted)) is not None:
        return why
    return "TensorRT takes zero point 0 alone" if moved else None
