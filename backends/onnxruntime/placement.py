"""Where ONNX Runtime's CPU kernels want Q/DQ pairs."""

from __future__ import annotations

from optkit.placement import Placement, Row, rows

_ABSORBED = frozenset({"Relu", "Clip"})

# QLinearConv gives integers only, so a convolution always has a pair behind it. QGemm and MatMulIntegerToFloat give
# float: a pair there only costs accuracy (MiniLM: pooled cosine 0.93 with, 0.993 without, at the same latency).
DEFAULT = Placement(
    name="default",
    activation="u8",
    weight="s8",
    rows=rows(
        Row(op="Conv", absorbs=_ABSORBED, max_rank=4),
        Row(op="Gemm", output=False),
        Row(op="MatMul", output=False, max_rank=2),
        # ONNX Runtime drops a Relu or Clip in front of a Quantize whose grid ends there; a pair before it would leave
        # a Dequantize and a Quantize that nothing fuses.
        Row(op="Add", role="between", absorbs=_ABSORBED),
        Row(op="Mul", role="between", absorbs=_ABSORBED),
        Row(op="Concat", role="between"),
        Row(op="MaxPool", role="between"),
        Row(op="AveragePool", role="between"),
        Row(op="GlobalAveragePool", role="between"),
        Row(op="Relu", role="between"),
        Row(op="LeakyRelu", role="between"),
        Row(op="Resize", role="between"),
        *(
            Row(op=op, role="between")
            for op in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split")
        ),
    ),
    source="onnxruntime/core/optimizer/qdq_transformer/selectors_actions (1.32) and timings of both spellings",
)

# Sigmoid too, as a table of 256 entries. x * Sigmoid(x) then never leaves the integers, which is faster than the one float
# kernel that the default rows leave whole, and rounds twice more.
ALL = Placement(
    name="all",
    activation="u8",
    weight="s8",
    rows={**DEFAULT.rows, **rows(Row(op="Sigmoid", role="between"))},
    source="as the default rows; YOLOv8n-shaped: 2.0x ONNX Runtime fp32 instead of 1.35x",
)

# Linear layers alone: convolutions stay in float.
LINEAR = Placement(
    name="linear",
    activation="u8",
    weight="s8",
    rows=rows(Row(op="Gemm", output=False), Row(op="MatMul", output=False, max_rank=2)),
    source="as the default rows, without convolutions",
)

# Convolutions with nothing quantized between them: for networks whose activations ONNX Runtime has no integer kernel for.
CONV = Placement(
    name="conv",
    activation="u8",
    weight="s8",
    rows=rows(Row(op="Conv", absorbs=_ABSORBED, max_rank=4)),
    source="as the default rows, convolutions alone",
)

PLACEMENTS = {p.name: p for p in (DEFAULT, ALL, LINEAR, CONV)}
