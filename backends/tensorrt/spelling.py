"""Formats with block scales in the words of TensorRT's parser.

onnx-tensorrt's importers, and what NVIDIA's ModelOpt exports: activations go through operators of the domain ``trt``, numbers of 4
bits lie packed in tensors of FLOAT4E2M1, and E8M0 scales in uint8. No other runtime reads it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from optkit.graph import walk
from optkit.microscaling import BLOCK_FORMATS, DOMAIN, format_of, is_call
from optkit.rewrite import Builder, Names, substitute

_DOMAIN = "trt"
_NVFP4, _MXFP8 = BLOCK_FORMATS["nvfp4"], BLOCK_FORMATS["mxfp8"]
_E4M3 = int(ir.DataType.FLOAT8E4M3FN)
# Operators of TensorRT and their attributes; what is dequantized to NVFP4 is two plain DequantizeLinear.
_SPELLED = {
    _NVFP4.quantize: ("TRT_FP4DynamicQuantize", {"axis": -1, "block_size": _NVFP4.size, "scale_type": _E4M3}),
    _MXFP8.quantize: ("TRT_MXFP8DynamicQuantize", {"axis": -1, "block_size": _MXFP8.size, "output_dtype": _E4M3}),
    _MXFP8.dequantize: ("TRT_MXFP8DequantizeLinear", {"block_size": _MXFP8.size}),
}  # fmt: skip
# The versions of ONNX and of its files that have FLOAT4E2M1.
_OPSET, _IR_VERSION = 23, 11


def inline(model: ir.Model) -> ir.Model:
    """``model`` without functions but those of formats with block scales; a copy where it has others."""
    kept = {name for fmt in BLOCK_FORMATS.values() for name in (fmt.quantize, fmt.dequantize)}
    if all(f.domain == DOMAIN and f.name in kept for f in model.functions.values()):
        return model
    model = model.clone()
    InlinePass(criteria=lambda f: not (f.domain == DOMAIN and f.name in kept))(model)
    return model


def spelled(model: ir.Model) -> ir.Model | None:
    """A copy in TensorRT's words; None where ``model`` has none of these formats."""
    if not any(format_of(node) is not None for node in walk(model)):
        return None
    model = model.clone()
    model.functions.clear()
    names = Names(model)
    for node in tuple(walk(model)):
        if format_of(node) == _NVFP4:
            _twice(node, names)
        elif is_call(node):
            _respell(node)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.update({"": _OPSET, _DOMAIN: 1})
    model.ir_version = _IR_VERSION
    return model


def _twice(node: ir.Node, names: Names) -> None:
    """Scales of blocks are dequantized, and then the numbers with them."""
    q, scales, scale = node.inputs
    assert q is not None
    if q.is_initializer() and q.dtype != _NVFP4.numbers:
        assert q.const_value is not None
        packed = q.const_value.numpy().astype(np.float32).astype(_NVFP4.numbers.numpy())
        q.const_value = ir.Tensor(packed, dtype=_NVFP4.numbers, name=q.name)
        q.type = ir.TensorType(_NVFP4.numbers)
    op = Builder(node, names)
    steps = op.DequantizeLinear(scales, scale)
    blocks = {"axis": node.attributes.get_int("axis"), "block_size": _NVFP4.size}
    (out,) = op.node("DequantizeLinear", [q, steps], blocks, name="numbers")
    substitute(node.outputs[0], out)
    _remove(node)


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _respell(node: ir.Node) -> None:
    if node.op_type == _MXFP8.dequantize:
        # TensorRT-RTX 1.7.1 dies of a Cast between this operator and a product.
        out, readers = node.outputs[0], [use.node for use in node.outputs[0].uses()]
        kinds = {r.attributes.get_int("to") if r.op_type == "Cast" else None for r in readers}
        kind = kinds.pop() if len(kinds) == 1 and not out.is_graph_output() else None
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", kind or int(ir.DataType.FLOAT))
        if kind is not None:
            out.type = ir.TensorType(ir.DataType(kind))
            for reader in readers:
                substitute(reader.outputs[0], out)
                _remove(reader)
    node.op_type, attributes = _SPELLED[node.op_type]
    node.domain = _DOMAIN
    for name, value in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, value)
