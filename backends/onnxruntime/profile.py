"""Read ONNX Runtime's profile: which kernels ran, in which arithmetic, on how many multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optkit.backends.base import Executed

_INT8 = frozenset(
    {
        "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "QGemm", "QAttention", "DynamicQuantizeLSTM", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool",
        "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearReduceMean", "QLinearWhere",
        "NhwcMaxPool",
    }
)  # fmt: skip
_CONV = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"})
_MATMUL = frozenset(
    {
        "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "TransposeMatMul", "QLinearMatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "GemmFloat8",
    }
)  # fmt: skip
# Where the weights of a convolution are among the inputs.
_WEIGHT = {"QLinearConv": 3}


def _shape(entry: Mapping[str, Sequence[int]]) -> tuple[str, tuple[int, ...]]:
    kind, shape = next(iter(entry.items()))
    return kind, tuple(int(d) for d in shape)


def _macs(
    op: str, inputs: Sequence[Mapping[str, Sequence[int]]], outputs: Sequence[Mapping[str, Sequence[int]]]
) -> int:
    if not outputs or (op not in _CONV and op not in _MATMUL):
        return 0
    out = math.prod(_shape(outputs[0])[1])
    if op in _CONV:
        return out * math.prod(_shape(inputs[_WEIGHT.get(op, 1)])[1][1:])
    # Activations come first and are contracted along their last axis.
    return out * _shape(inputs[0])[1][-1]


def read_profile(events: Sequence[Mapping[str, Any]]) -> list[Executed]:
    """The executed nodes, in the order in which they ran.

    Args:
        events: The JSON that ``end_profiling`` wrote; kernels are the events of category ``Node`` ending ``_kernel_time``.
            Of a session without prepacking: packed weights are missing from the lists of inputs.
    """
    executed = []
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        op = str(arguments["op_name"])
        inputs, outputs = arguments.get("input_type_shape", []), arguments.get("output_type_shape", [])
        kinds = {next(iter(e)) for e in (*inputs[:1], *outputs[:1]) if e}
        fmt = (
            "int8"
            if op in _INT8 or (kinds and kinds <= {"int8", "uint8"})
            else "fp16"
            if "float16" in kinds
            else "fp32"
        )
        executed.append(
            Executed(
                name=str(event["name"]).removesuffix("_kernel_time"),
                op=op,
                where=str(arguments.get("provider", "CPUExecutionProvider"))
                .removesuffix("ExecutionProvider")
                .lower(),
                format=fmt,
                macs=_macs(op, inputs, outputs),
                seconds=float(event.get("dur", 0)) * 1e-6,
            )
        )
    return executed
