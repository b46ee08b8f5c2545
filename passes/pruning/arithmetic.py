"""What operators that compute say of the labels of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute

if TYPE_CHECKING:
    from optkit.passes.pruning.labelling import Axes, Labelling

_UNARY = (
    "Abs Acos Asin Atan BitShift Cast CastLike Ceil Celu Clip Cos Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish "
    "Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt "
    "Swish Tanh ThresholdedRelu"
)
_BROADCAST = "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
_POOLS = "AveragePool GlobalAveragePool GlobalMaxPool LpPool MaxPool GlobalLpPool"


def _unary(work: Labelling, node: ir.Node) -> None:
    work.axes[node.outputs[0]] = list(work.of(node.inputs[0]))


def _by_broadcast(work: Labelling, node: ir.Node) -> None:
    operands = [work.of(v) for v in node.inputs if v is not None]
    work.axes[node.outputs[0]] = _broadcast(work, operands, node)


def _broadcast(work: Labelling, operands: Sequence[Axes], node: ir.Node) -> Axes:
    rank = max(map(len, operands))
    result: Axes = []
    for position in range(-rank, 0):
        found = [o[position] for o in operands if len(o) >= -position]
        long = [a for a in found if not isinstance(a, np.ndarray) or len(a) != 1]
        if not long:
            result.append(found[0])
            continue
        for other in long[1:]:
            work.labels.join(long[0], other, f"meets an axis of unknown size at {node.op_type}")
        result.append(None if any(a is None for a in long) else long[0])
    return result


def _conv(work: Labelling, node: ir.Node) -> None:
    x, w = work.of(node.inputs[0]), work.of(node.inputs[1])
    groups = node.attributes.get_int("group", 1)
    channels, outs, ins = x[1], w[0], w[1]
    if (
        not isinstance(channels, np.ndarray)
        or not isinstance(outs, np.ndarray)
        or not isinstance(ins, np.ndarray)
    ):
        work.unknown(node)
        return
    if groups == 1:
        work.labels.join(ins, channels)
    elif groups == len(channels):
        # Depthwise: output channels belong to their input channel.
        for k, label in enumerate(channels.tolist()):
            work.labels.join_all([label, *outs.reshape(groups, -1)[k]])
    else:
        # The same position of every group goes, so that groups stay equal.
        for k, label in enumerate(ins.tolist()):
            work.labels.join_all([label, *channels.reshape(groups, -1)[:, k]])
        for column in outs.reshape(groups, -1).T:
            work.labels.join_all(column)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        work.labels.join(work.of(node.inputs[2])[0], outs)
    work.axes[node.outputs[0]] = [x[0], outs, *_spatial(work, node)]


def _conv_transpose(work: Labelling, node: ir.Node) -> None:
    if attribute(node, "group", 1) != 1:
        work.unknown(node)
        return
    x, w = work.of(node.inputs[0]), work.of(node.inputs[1])
    work.labels.join(w[0], x[1])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        work.labels.join(work.of(node.inputs[2])[0], w[1])
    work.axes[node.outputs[0]] = [x[0], w[1], *_spatial(work, node)]


def _spatial(work: Labelling, node: ir.Node) -> Axes:
    axes = work.fresh(node.outputs[0])[2:]
    if node.op_type in ("Conv", "ConvTranspose"):
        for axis in work.of(node.inputs[1])[2:]:
            work.labels.freeze(axis, "positions of a kernel")
    for axis in axes:
        work.labels.freeze(axis, "positions of a picture or a signal")
    for axis in work.of(node.inputs[0])[2:]:
        work.labels.freeze(axis, "positions of a picture or a signal")
    return axes


def _pool(work: Labelling, node: ir.Node) -> None:
    work.axes[node.outputs[0]] = [*work.of(node.inputs[0])[:2], *_spatial(work, node)]


def _gemm(work: Labelling, node: ir.Node) -> None:
    a, b = list(work.of(node.inputs[0])), list(work.of(node.inputs[1]))
    if attribute(node, "transA", 0):
        a.reverse()
    if attribute(node, "transB", 0):
        b.reverse()
    work.labels.join(a[1], b[0])
    out: Axes = [a[0], b[1]]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        out = _broadcast(work, [out, work.of(node.inputs[2])], node)
    work.axes[node.outputs[0]] = out


def _matmul(work: Labelling, node: ir.Node) -> None:
    a, b = work.of(node.inputs[0]), work.of(node.inputs[1])
    work.labels.join(a[-1], b[-2] if len(b) > 1 else b[0])
    lead = [o[:-2] for o in (a, b) if len(o) > 2]
    out: Axes = _broadcast(work, lead, node) if lead else []
    out += a[-2:-1] if len(a) > 1 else []
    out += b[-1:] if len(b) > 1 else []
    work.axes[node.outputs[0]] = out


def _norm_by_channel(work: Labelling, node: ir.Node) -> None:
    x = work.of(node.inputs[0])
    for value in node.inputs[1:]:
        if value is not None:
            work.labels.join(work.of(value)[0], x[1])
    work.axes[node.outputs[0]] = list(x)


def _norm_by_axis(work: Labelling, node: ir.Node) -> None:
    """Statistics over channels change when one goes."""
    x = work.of(node.inputs[0])
    first = node.attributes.get_int("axis", -1)
    for axis in x[first if first < 0 else first - len(x) :]:
        work.labels.freeze(axis, f"{node.op_type} computes statistics over it")
    for value in node.inputs[1:]:
        if value is not None:
            work.freeze(value, f"{node.op_type} computes statistics over it")
    work.axes[node.outputs[0]] = list(x)


def _softmax(work: Labelling, node: ir.Node) -> None:
    x = work.of(node.inputs[0])
    work.labels.freeze(x[node.attributes.get_int("axis", -1)], f"{node.op_type} runs over it")
    work.axes[node.outputs[0]] = list(x)


RULES: dict[str, Callable[[Labelling, ir.Node], None]] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_BROADCAST.split(), _by_broadcast),
    **dict.fromkeys(_POOLS.split(), _pool),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _norm_by_channel,
    "InstanceNormalization": _norm_by_channel,
    "LayerNormalization": _norm_by_axis,
    "RMSNormalization": _norm_by_axis,
    "LpNormalization": _softmax,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
}
