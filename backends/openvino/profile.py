"""Read OpenVINO's runtime graph: which kernels ran, in which arithmetic, on how many multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optkit.backends.base import Executed

_FORMATS = {
    "f32": "fp32",
    "u8": "int8",
    "i8": "int8",
    "u4": "int4",
    "i4": "int4",
    "f16": "fp16",
    "bf16": "bf16",
    "i32": "int32",
    "i64": "int64",
}
_NOT_RUN = "not_executed"
# What the low-precision transformations append to the name of a product when they put its scale behind it.
_SCALED = "/DequantizationMultiply"
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_FILLED = ("Const", "Input", "Output")


def products(model: Any) -> dict[str, int]:
    """Multiply-accumulates of each convolution, product and recurrent layer with known shapes, by its name.

    Args:
        model: An ``openvino.Model``, reshaped to the shapes of the run.
    """
    found = {}
    for op in model.get_ordered_ops():
        count = _COUNTS.get(op.get_type_name())
        ports = [*op.inputs(), *op.outputs()]
        if count is not None and all(p.get_partial_shape().is_static for p in ports):
            found[str(op.friendly_name)] = count(op)
    return found


def _shape(port: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in port.get_shape())


def _conv(op: Any) -> int:
    # Weights [O, I, ...]: each output is a sum over all but the first axis.
    return math.prod(_shape(op.output(0))) * math.prod(_shape(op.input(1))[1:])


def _group_conv(op: Any) -> int:
    # Weights [G, O / G, I / G, ...].
    return math.prod(_shape(op.output(0))) * math.prod(_shape(op.input(1))[2:])


def _transposed(op: Any) -> int:
    # Weights [I, O, ...]: each input is spread over all but the first axis.
    return math.prod(_shape(op.input(0))) * math.prod(_shape(op.input(1))[1:])


def _group_transposed(op: Any) -> int:
    return math.prod(_shape(op.input(0))) * math.prod(_shape(op.input(1))[2:])


def _matmul(op: Any) -> int:
    first = _shape(op.input(0))
    inner = first[-2] if op.get_attributes().get("transpose_a") and len(first) > 1 else first[-1]
    return math.prod(_shape(op.output(0))) * inner


def _recurrent(op: Any) -> int:
    # Inputs X [..., I] first; among the others W [..., gates * H, I] and R [..., gates * H, H] have the most axes.
    steps = math.prod(_shape(op.input(0))[:-1])
    axes = 3 if "Sequence" in op.get_type_name() else 2
    weights = [_shape(p) for p in op.inputs()[1:]]
    gates = {"LSTM": 4, "GRUC": 3, "GRUS": 3}.get(op.get_type_name()[:4], 1)
    hidden = int(op.get_attributes()["hidden_size"])
    return steps * sum(math.prod(s) for s in weights if len(s) == axes and s[-2] == gates * hidden)


_COUNTS = {
    "Convolution": _conv, "GroupConvolution": _group_conv, "ConvolutionBackpropData": _transposed,
    "GroupConvolutionBackpropData": _group_transposed, "MatMul": _matmul, "LSTMSequence": _recurrent, "LSTMCell": _recurrent,
    "GRUSequence": _recurrent, "GRUCell": _recurrent, "RNNSequence": _recurrent, "RNNCell": _recurrent,
}  # fmt: skip


def read_runtime(nodes: Sequence[Mapping[str, str]], macs: Mapping[str, int]) -> list[Executed]:
    """The executed nodes in their order.

    Args:
        nodes: What the runtime graph says of each node, after a run with performance counters; in the order of execution.
        macs: As ``products`` gives them. Products that no node names belong, in their order, to as many nodes that compute
            one and name none; else they were fused away by name only, into the attention or elementwise subgraphs that
            hold other products.
    """
    left, counts = dict(macs), []
    ran = [n for n in nodes if n["layerType"] not in _FILLED and n.get("execTimeMcs", _NOT_RUN) != _NOT_RUN]
    for node in ran:
        originals = node.get("originalLayersNames", "").split(",")
        names = dict.fromkeys(n.removesuffix(_SCALED) for n in (node["name"], *originals))
        counts.append(sum(left.pop(name, 0) for name in names))
    # A convolution whose batch normalisation is folded into it may go by the latter's name.
    unnamed = [i for i, node in enumerate(ran) if node["layerType"] in _PRODUCTS and not counts[i]]
    if len(unnamed) == len(left):
        for i, name in zip(unnamed, tuple(left), strict=True):
            counts[i] = left.pop(name)
    inside = [i for i, node in enumerate(ran) if node["layerType"] == "Subgraph" and counts[i]]
    for i in inside:
        counts[i] += sum(left.values()) // len(inside)
    return [
        Executed(
            name=node["name"],
            op=node["layerType"],
            where="cpu",
            format=_FORMATS.get(node["runtimePrecision"], node["runtimePrecision"]),
            macs=count,
            seconds=float(node["execTimeMcs"]) * 1e-6,
        )
        for node, count in zip(ran, counts, strict=True)
    ]


def runtime_nodes(compiled: Any) -> list[dict[str, str]]:
    """The runtime graph of a compiled model as plain data."""
    nodes = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        facts = op.get_rt_info()
        nodes.append({"name": str(op.friendly_name)} | {k: str(facts[k].astype(str)) for k in facts})
    return nodes
