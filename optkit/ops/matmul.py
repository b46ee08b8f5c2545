"""Matrix products and recurrent cells."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import attribute, rank
from optkit.ops.spec import OpSpec, gemm_macs, matmul_macs, recurrent_macs


def _last(node: ir.Node) -> int:
    return (rank(node.inputs[1]) or 2) - 1


ROWS = (
    OpSpec(
        name="MatMul", family="matmul", activations=(0, 1), weight=1, channel_axis=_last, macs=matmul_macs
    ),
    OpSpec(
        name="Gemm",
        family="matmul",
        weight=1,
        bias=2,
        channel_axis=lambda node: 0 if attribute(node, "transB", 0) else 1,
        macs=gemm_macs,
    ),
    OpSpec(name="Einsum", family="matmul"),
    OpSpec(name="LSTM", family="matmul", macs=recurrent_macs),
    OpSpec(name="GRU", family="matmul", macs=recurrent_macs),
    OpSpec(name="RNN", family="matmul", macs=recurrent_macs),
)
