"""Read ONNX Runtime's profile: which kernels ran, in which arithmetic, on how many multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from optkit.backends.base import Executed
from optkit.graph import elements, users, walk

if TYPE_CHECKING:
    import onnx_ir as ir

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
        "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "GemmFloat8", "MatMulNBits",
    }
)  # fmt: skip
_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
# Where the weights of a convolution are among the inputs.
_WEIGHT = {"QLinearConv": 3}
# How ONNX Runtime names convolutions in its own layout: after their output.
_BLOCKED = "_nchwc"
# Operators that it may merge into the convolution before them.
_MERGED = frozenset(
    {"Add", "Mul", "BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"}
)


def conv_weights(model: ir.Model) -> dict[str, int]:
    """Elements of the weights of each convolution, by the names that its output may have once neighbours are merged."""
    sizes: dict[str, int] = {}
    for node in walk(model):
        if node.op_type != "Conv" or node.domain != "" or node.inputs[1] is None:
            continue
        size, value = elements(node.inputs[1].shape), node.outputs[0]
        while size is not None:
            sizes[str(value.name)] = size
            readers = users(value)
            if len(readers) != 1 or readers[0].op_type not in _MERGED:
                break
            value = readers[0].outputs[0]
    return sizes


def _shape(entry: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    return tuple(int(d) for d in next(iter(entry.values())))


def _macs(
    op: str,
    name: str,
    inputs: Sequence[Mapping[str, Sequence[int]]],
    outputs: Sequence[Mapping[str, Sequence[int]]],
    weights: Mapping[str, int],
) -> int:
    if not outputs:
        return 0
    out = _shape(outputs[0])
    if op in _CONV:
        # The blocked layout pads channels to whole vectors; the graph knows how many there are.
        known = weights.get(name.removesuffix(_BLOCKED)) if name.endswith(_BLOCKED) else None
        if known is not None:
            return math.prod(out) // out[1] * known
        return math.prod(out) * math.prod(_shape(inputs[_WEIGHT.get(op, 1)])[1:])
    if op == "ConvTranspose":
        return math.prod(_shape(inputs[0])) * math.prod(_shape(inputs[1])[1:])
    if op in _RECURRENT:
        x, w, r = (_shape(i) for i in inputs[:3])
        return x[0] * x[1] * (math.prod(w) + math.prod(r))
    if op in _MATMUL:
        # Activations come first and are contracted along their last axis, or the one before if they are transposed.
        x = _shape(inputs[0])
        turned = len(x) > 1 and len(out) > 1 and x[-2] != out[-2] and x[-1] == out[-2]
        return math.prod(out) * x[-2 if turned else -1]
    return 0


def read_profile(
    events: Sequence[Mapping[str, Any]], weights: Mapping[str, int] = MappingProxyType({})
) -> list[Executed]:
    """The executed nodes, in the order in which they ran.

    Args:
        events: The JSON that ``end_profiling`` wrote; kernels are the events of category ``Node`` ending ``_kernel_time``.
            Of a session without prepacking: packed weights are missing from the lists of inputs.
        weights: As ``conv_weights`` gives them.
    """
    executed = []
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        op, name = str(arguments["op_name"]), str(event["name"]).removesuffix("_kernel_time")
        inputs, outputs = arguments.get("input_type_shape", []), arguments.get("output_type_shape", [])
        kinds = {next(iter(e)) for e in (*inputs[:1], *outputs[:1]) if e}
        fmt = (
            "int4"
            if op == "MatMulNBits"
            else "int8"
            if op in _INT8 or (kinds and kinds <= {"int8", "uint8"})
            else "fp16"
            if "float16" in kinds
            else "fp32"
        )
        executed.append(
            Executed(
                name=name,
                op=op,
                where=str(arguments.get("provider", "CPUExecutionProvider"))
                .removesuffix("ExecutionProvider")
                .lower(),
                format=fmt,
                macs=_macs(op, name, inputs, outputs, weights),
                seconds=float(event.get("dur", 0)) / 1e6,
            )
        )
    return executed
