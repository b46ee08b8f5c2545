"""Operators that OpenVINO (2026.4) computes otherwise than ONNX says, without a word: what it makes of a node instead.

Found by ONNX's own cases of operators and by comparing forms of operators with ONNX Runtime, with sizes fixed and free. What takes
another form than this is in ``spelling``. Differences that nothing here prevents:

* Equal values come out of TopK in any order (sorting stably takes 10 to 100 times as long).
* The largest and smallest of infinities, or of nothing, are float32's ends, unless Equal with -inf is what reads the largest.
* int64 is computed in 32 bits (constants and inputs beyond them are refused, results are not seen), Div, Mod, comparisons and sums of
  integers exactly to 2^24; float64 in float32, with infinities as its largest number. NaN does not survive Relu, Clip, Max and Min.
* DynamicQuantizeLinear and, with an odd zero point, QuantizeLinear may round a half to the other step; ReduceLogSum and linear Resize
  of integers round where ONNX Runtime cuts off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import attribute, constant, ints, rank


def misread(node: ir.Node) -> str | None:
    """What OpenVINO makes of ``node`` instead of what it says; None where that is the same."""
    if node.domain != "":
        return None
    look = _FORMS.get(node.op_type)
    said = (None if look is None else look(node)) or _integers(node)
    return None if said is None else f"OpenVINO {said}"


def _integers(node: ir.Node) -> str | None:
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype in _UNSIGNED and node.op_type != "Identity":
            return f"computes {value.dtype.name.lower()} in 32 bits with a sign"
    for value in node.inputs:
        wide = value is not None and value.dtype == ir.DataType.INT64
        found = constant(value) if wide else None
        if found is None or not found.size or -(2**31) <= found.min() <= found.max() < 2**31:
            continue
        if not _cut_off(node):
            return f"cuts integers off at 32 bits, here {value.name}"  # type: ignore[union-attr]
    return None


def _cut_off(node: ir.Node) -> bool:
    """Whether the last integer of 32 bits does for what comes out of ``node`` as well as one beyond it."""
    rest, seen = [node], {node}
    while rest:
        node = rest.pop()
        if node.op_type in _BOUNDED:
            continue
        if node.op_type not in _MOVED or any(o.is_graph_output() for o in node.outputs):
            return False
        after = {user for output in node.outputs for user, _ in output.uses()} - seen
        rest += after
        seen |= after
    return True


def _recurrent(node: ir.Node) -> str | None:
    if len(node.inputs) > 4 and node.inputs[4] is not None and not _fixed(node.inputs[0]):
        return "leaves out sequence_lens where sizes are free"
    names = node.attributes["activations"].as_strings() if "activations" in node.attributes else []
    half = len(names) // 2
    if attribute(node, "direction") == "bidirectional" and list(names[:half]) != list(names[half:]):
        return "takes the activations of one direction for both"
    if attribute(node, "layout", 0):
        return "reads a batch that comes first as steps in time (layout 1)"
    if node.op_type == "LSTM" and len(node.inputs) > 7 and node.inputs[7] is not None:
        return "leaves out peepholes (P)"
    if node.op_type == "LSTM" and attribute(node, "input_forget", 0):
        return "leaves out input_forget"
    return None


def _resize(node: ir.Node) -> str | None:
    if attribute(node, "antialias", 0):
        return "leaves out antialias"
    if attribute(node, "exclude_outside", 0):
        return "leaves out exclude_outside"
    policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
    return None if policy == "stretch" else f"leaves out the keep_aspect_ratio_policy {policy}"


def _roi_align(node: ir.Node) -> str | None:
    return (
        "takes the largest of other samples in mode max" if attribute(node, "mode", "avg") == "max" else None
    )


def _dft(node: ir.Node) -> str | None:
    """It reads the attributes of opset 17, where the axis was one, 1 by default, and takes real signals for pairs."""
    count, given = rank(node.inputs[0]), node.inputs[2] if len(node.inputs) > 2 else None
    axis = constant(given) if given is not None else -2
    if count is None or axis is None or int(axis) % count != 1:
        return "transforms axis 1, whatever the axis"
    return "leaves the last axis as it is where signals are real" if attribute(node, "onesided", 0) else None


def _stft(node: ir.Node) -> str | None:
    told = len(node.inputs) > 3 and node.inputs[3] is not None
    return None if told and _fixed(node.inputs[0]) else "takes signals of fixed sizes with frame_length alone"


def _max_pool(node: ir.Node) -> str | None:
    if attribute(node, "storage_order", 0) and len(node.outputs) > 1:
        return "counts indices by rows, whatever the storage_order"
    return _overhanging(node)


def _average_pool(node: ir.Node) -> str | None:
    if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0) and any(_pads(node)):
        return "counts what windows reach over behind the pads (ceil_mode with count_include_pad)"
    return _overhanging(node)


def _lp_pool(node: ir.Node) -> str | None:
    """It scales up what a window that reaches over has fewer of."""
    if not attribute(node, "ceil_mode", 0):
        return None
    whole = all(
        isinstance(n, int) and (n + before + behind - window) % s == 0
        for window, s, before, behind, n in _windows(node)
    )
    return None if whole else "counts elements that are not there where a window reaches over (ceil_mode)"


def _overhanging(node: ir.Node) -> str | None:
    """With ``ceil_mode`` ONNX leaves out windows that begin behind the last element, in the pads; OpenVINO does not.

    None begins there where a stride and the pads behind are no longer than a window; else the sizes tell, where they are known.
    """
    if not attribute(node, "ceil_mode", 0):
        return None
    for window, s, before, behind, n in _windows(node):
        if s + behind <= window:
            continue
        if not isinstance(n, int) or -(-(n + before + behind - window) // s) * s >= n + before:
            return "adds a window that begins behind the last element (ceil_mode)"
    return None


def _windows(node: ir.Node) -> Iterator[tuple[int, int, int, int, Dim | None]]:
    """Of each axis how long a window is, the stride, the pads before and behind, and the size."""
    kernel = ints(node, "kernel_shape")
    count = len(kernel)
    strides, dilations = ints(node, "strides") or [1] * count, ints(node, "dilations") or [1] * count
    pads, sizes = _pads(node), (shape_of(node.inputs[0]) or (None,) * (count + 2))[2:]
    longs = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    yield from zip(longs, strides, pads[:count], pads[count:], sizes, strict=True)


def _pads(node: ir.Node) -> list[int]:
    return ints(node, "pads") or [0] * (2 * len(ints(node, "kernel_shape")))


def _cast(node: ir.Node) -> str | None:
    to = ir.DataType(node.attributes["to"].as_int())
    bytes_ = to.name.startswith("FLOAT8") and attribute(node, "saturate", 1)
    return f"does not saturate in {to.name.lower()}" if bytes_ else None


def _constant(node: ir.Node) -> str | None:
    value = constant(node.outputs[0])
    empty = value is not None and value.size == 0 and node.outputs[0].is_graph_output()
    return "gives one element for an output that is a constant without any" if empty else None


def _conv_transpose(node: ir.Node) -> str | None:
    side, told = attribute(node, "auto_pad", "NOTSET"), ints(node, "output_shape")
    if (told or side in ("SAME_UPPER", "SAME_LOWER")) and not _fixed(node.inputs[0]):
        return f"leaves out {'output_shape' if told else f'auto_pad {side}'} where sizes are free"
    return (
        "cuts off the other end for an output_shape with SAME_UPPER"
        if told and side == "SAME_UPPER"
        else None
    )


def _fixed(value: ir.Value | None) -> bool:
    return all(isinstance(n, int) for n in shape_of(value) or (None,))


def _p_relu(node: ir.Node) -> str | None:
    slope = shape_of(node.inputs[1])
    along = slope is None or (len(slope) == 1 and slope[0] != 1)
    return (
        "takes slopes along the last axis for those of channels"
        if along and rank(node.inputs[0]) != 2
        else None
    )


def _arithmetic(node: ir.Node) -> str | None:
    kind = node.inputs[0].dtype if node.inputs[0] is not None else None
    eight = kind in (ir.DataType.INT8, ir.DataType.UINT8)
    return (
        f"saturates or rounds {kind.name.lower()} where ONNX wraps and cuts off" if kind and eight else None
    )


def _lrn(node: ir.Node) -> str | None:
    bias = node.attributes.get_float("bias", 1.0)
    return None if bias == int(bias) else f"cuts the bias {bias:g} to an integer"


def _pointwise_reduction(node: ir.Node) -> str | None:
    """With ``noop_with_empty_axes`` and no axes, what a reduction does to each element still takes place."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = None if given is None else constant(given)
    if not attribute(node, "noop_with_empty_axes", 0) or (
        given is not None and (axes is None or axes.size > 0)
    ):
        return None
    return "gives back elements as they are where nothing is reduced (noop_with_empty_axes)"


_UNSIGNED = (ir.DataType.UINT32, ir.DataType.UINT64)
# What is compared with integers of 32 bits, or says how far these go, may as well be the last of them.
_BOUNDED = frozenset({
    "Clip", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Loop", "Max", "Min", "Slice",
})  # fmt: skip
_MOVED = frozenset({
    "Concat", "Expand", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip

_FORMS: Mapping[str, Callable[[ir.Node], str | None]] = {
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), _arithmetic),
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Constant": _constant,
    "ConvTranspose": _conv_transpose,
    "DFT": _dft,
    "GRU": _recurrent,
    "LRN": _lrn,
    "LSTM": _recurrent,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "PRelu": _p_relu,
    "RNN": _recurrent,
    "ReduceL1": _pointwise_reduction,
    "ReduceL2": _pointwise_reduction,
    "ReduceLogSum": _pointwise_reduction,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "STFT": _stft,
}
