"""Operators of quantized graphs."""

from __future__ import annotations

from optkit.ops.spec import OpSpec, conv_macs, matmul_macs

ROWS = (
    OpSpec(name="QuantizeLinear", family="quant"),
    OpSpec(name="DequantizeLinear", family="quant"),
    OpSpec(name="DynamicQuantizeLinear", family="quant"),
    OpSpec(name="MatMulInteger", family="quant", weight=1, macs=matmul_macs),
    OpSpec(name="ConvInteger", family="quant", weight=1, macs=conv_macs),
)
