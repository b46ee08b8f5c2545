"""Nodes that give back what they were given go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import attribute, constant, graphs, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, label, remove_unused, replaceable, substitute


class RemoveNoops(GraphPass):
    """Remove nodes that provably return their input: the same values in the same shape.

    ``x + 0`` and ``x - 0`` count, although ``-0.0 + 0.0`` is ``0.0``: the two compare equal. Everything else keeps the
    very bits, NaN included.

    Removed as well: an Expand to the shape that the reader broadcasts to anyway, initial states of LSTM, GRU and RNN
    that are zero, and parts of a Concat without elements.
    """

    name: ClassVar[str] = "remove-noops"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Remove what returns its input, until nothing does."""
        changes: list[Change] = []
        while found := [change for graph in graphs(model) for change in _remove(graph)]:
            changes += found
        return changes


def _remove(graph: ir.Graph) -> Iterator[Change]:
    for node in tuple(graph):
        if node.domain != "":
            continue
        if node.op_type in _RECURRENT and _drop_zero_states(node):
            yield Change(rule="drop-zero-states", node=label(node), detail=node.op_type)
        if node.op_type == "Concat" and _drop_empty_parts(node):
            yield Change(rule="drop-empty-parts", node=label(node), detail=node.op_type)
        rule = _RULES.get(node.op_type)
        output = node.outputs[0]
        same = rule(node) if rule is not None and (output.uses() or output.is_graph_output()) else None
        if same is None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            continue
        if replaceable(output, same):
            yield Change(rule="remove-noop", node=label(node), detail=node.op_type)
            substitute(output, same)
            remove_unused([node])


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are known to have the same shape: equal numbers, equal names of symbolic axes."""
    x, y = shape_of(a), shape_of(b)
    return x is not None and x == y and None not in x


def fits_into(small: Sequence[int | ir.SymbolicDim], value: ir.Value | None) -> bool:
    """Whether broadcasting ``small`` against ``value`` leaves the shape of ``value`` as it is."""
    if value is None or value.shape is None or len(small) > len(value.shape):
        # A single element never widens anything but a scalar.
        return value is not None and len(small) == 0
    tail = value.shape[len(value.shape) - len(small) :]
    return all(a == 1 or (isinstance(a, int) and a == b) for a, b in zip(small, tail, strict=True))


def _input(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _all(value: ir.Value | None, number: float) -> np.ndarray | None:
    """The constant, if every element of it is ``number``."""
    array = constant(value)
    return (
        array
        if array is not None and array.size and array.dtype.kind in "fiu" and np.all(array == number)
        else None
    )


def _neutral(number: float, *, either: bool) -> Callable[[ir.Node], ir.Value | None]:
    def rule(node: ir.Node) -> ir.Value | None:
        for x, other in ((0, 1), (1, 0)) if either else ((0, 1),):
            array = _all(node.inputs[other], number)
            if array is not None and fits_into(array.shape, node.inputs[x]):
                return node.inputs[x]
        return None

    return rule


def _truth(neutral: bool) -> Callable[[ir.Node], ir.Value | None]:
    def rule(node: ir.Node) -> ir.Value | None:
        for x, other in ((0, 1), (1, 0)):
            array = constant(node.inputs[other])
            if (
                array is not None
                and array.size
                and np.all(array == neutral)
                and fits_into(array.shape, node.inputs[x])
            ):
                return node.inputs[x]
        return node.inputs[0] if node.inputs[0] is node.inputs[1] else None

    return rule


def _dropout(node: ir.Node) -> ir.Value | None:
    training = (
        constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.array(False)
    )
    return node.inputs[0] if training is not None and not training.any() else None


def _cast(node: ir.Node) -> ir.Value | None:
    x, to = node.inputs[0], attribute(node, "to")
    return x if x is not None and x.dtype is not None and x.dtype == to else None


def _cast_like(node: ir.Node) -> ir.Value | None:
    x, like = node.inputs
    return x if x is not None and like is not None and x.dtype is not None and x.dtype == like.dtype else None


def _transpose(node: ir.Node) -> ir.Value | None:
    x, permutation = node.inputs[0], node.attributes.get_ints("perm", ())
    if not permutation:
        return x if x is not None and x.shape is not None and len(x.shape) <= 1 else None
    return x if list(permutation) == list(range(len(permutation))) else None


def _reshape(node: ir.Node) -> ir.Value | None:
    x, target = node.inputs[0], constant(node.inputs[1])
    if same_shape(x, node.outputs[0]):
        return x
    if x is None or x.shape is None or target is None or attribute(node, "allowzero", 0):
        return None
    return x if keeps_shape(list(x.shape), [int(t) for t in target]) else None


def keeps_shape(shape: Sequence[int | ir.SymbolicDim], target: Sequence[int]) -> bool:
    """Whether a Reshape of ``shape`` to ``target`` (0: as it is, -1: what is left) leaves the shape as it is."""
    if len(shape) != len(target):
        return False
    # The number of elements is the same, so one axis may be whatever is left; of no elements, anything may be left.
    differing = sum(not (t == 0 or t == d) for t, d in zip(target, shape, strict=True))
    return differing == 0 or (differing == 1 and -1 in target and 0 not in shape)


def _flatten(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    return (
        x
        if x is not None
        and x.shape is not None
        and len(x.shape) == 2
        and attribute(node, "axis", 1) in (1, -1)
        else None
    )


def _same_rank_and_elements(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if same_shape(node.inputs[0], node.outputs[0]) else None


def _squeeze(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = constant(node.inputs[1])
        return x if axes is not None and axes.size == 0 else None
    return (
        x
        if x is not None and x.shape is not None and x.shape.is_static() and 1 not in x.shape.numpy()
        else None
    )


def _unsqueeze(node: ir.Node) -> ir.Value | None:
    axes = constant(node.inputs[1])
    return node.inputs[0] if axes is not None and axes.size == 0 else None


def _expand(node: ir.Node) -> ir.Value | None:
    target = constant(node.inputs[1])
    if target is not None and fits_into([int(d) for d in target], node.inputs[0]):
        return node.inputs[0]
    if _same_rank_and_elements(node) is not None or _broadcast_anyway(node):
        return node.inputs[0]
    return None


def _broadcast_anyway(node: ir.Node) -> bool:
    """Whether every reader is elementwise and has another operand of the shape that the Expand makes."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or y.is_graph_output() or len(x.shape) > len(y.shape):
        return False
    for user in users(y):
        others = [v for v in user.inputs if v is not y]
        if (
            user.op_type not in _BROADCASTING
            or user.domain != ""
            or not any(same_shape(v, y) for v in others)
        ):
            return False
    return True


def _drop_zero_states(node: ir.Node) -> bool:
    """Leave out initial states that are zero, which is what an absent one means."""
    dropped = False
    for index in range(5, min(len(node.inputs), 7)):
        value = node.inputs[index]
        if value is not None and _is_zero(value):
            node.replace_input_with(index, None)
            dropped = True
    return dropped


def _drop_empty_parts(node: ir.Node) -> bool:
    """Leave out inputs that are known to be empty along the axis, as rotary embeddings of all channels have them."""
    axis = node.attributes.get_int("axis", 0)
    full = [v for v in node.inputs if (shape_of(v) or {axis: None})[axis] != 0]
    if not full or len(full) == len(node.inputs):
        return False
    gone = [v.producer() for v in node.inputs if v is not None and v not in full]
    node.resize_inputs(len(full))
    for index, value in enumerate(full):
        node.replace_input_with(index, value)
    remove_unused([n for n in gone if n is not None])
    return True


def _is_zero(value: ir.Value) -> bool:
    """Whether every element is zero, whatever the shape."""
    array = constant(value)
    if array is not None:
        return array.dtype.kind == "f" and not np.any(array)
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "ConstantOfShape":
        held = node.attributes.get("value")
        return held is None or not np.any(held.as_tensor().numpy())
    moves = ("Expand", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Tile", "Transpose", "Identity", "Gather")
    return node.op_type in moves and node.inputs[0] is not None and _is_zero(node.inputs[0])


def _tile(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if _all(node.inputs[1], 1) is not None or _empty(node.inputs[1]) else None


def _empty(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.size == 0


def _slice(node: ir.Node) -> ir.Value | None:
    x, starts, ends = node.inputs[0], constant(node.inputs[1]), _sizes(node.inputs[2])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if len(node.inputs) > 4 and node.inputs[4] is not None and (steps is None or np.any(steps != 1)):
        return None
    if x is None or starts is None or ends is None:
        return None
    if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
        return None
    places, shape = np.arange(len(starts)) if axes is None else axes, shape_of(x)
    for start, end, axis in zip(starts, ends, places, strict=True):
        size = shape[int(axis)] if shape is not None and int(axis) < len(shape) else None
        starts_at_zero = start == 0 or (isinstance(size, int) and start <= -size)
        # Symbolic axes end at their own size, or where ONNX says "to the end": the largest number of the type, or of int32.
        most = size if isinstance(size, int) else np.iinfo(np.int32).max
        if not starts_at_zero or end is None or not (end >= most if isinstance(end, int) else end == size):
            return None
    return x


def _sizes(value: ir.Value | None) -> Sequence[Dim | None] | None:
    """A list of integers, where it is constant or the sizes of a value."""
    array, node = constant(value), None if value is None else value.producer()
    if array is not None:
        return [int(v) for v in array]
    if node is None or node.op_type != "Shape" or node.domain != "":
        return None
    sizes = shape_of(node.inputs[0])
    first, last = attribute(node, "start", 0), attribute(node, "end")
    return None if sizes is None else sizes[slice(first, last)]  # type: ignore[arg-type]


def _pad(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if _all(node.inputs[1], 0) is not None else None


def _one_input(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _split(node: ir.Node) -> ir.Value | None:
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    whole = len(node.outputs) == 1 or (sizes is not None and not sizes[1:].any())
    return node.inputs[0] if whole else None


def _clip(node: ir.Node) -> ir.Value | None:
    low = node.inputs[1] if len(node.inputs) > 1 else None
    high = node.inputs[2] if len(node.inputs) > 2 else None
    return node.inputs[0] if _unbounded(low, -1) and _unbounded(high, 1) else None


def _unbounded(value: ir.Value | None, sign: int) -> bool:
    if value is None:
        return True
    array = constant(value)
    if array is None or array.size != 1:
        return False
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        return bool(array == (limits.max if sign > 0 else limits.min))
    return bool(array == sign * np.inf)


def _relu(node: ir.Node) -> ir.Value | None:
    """What cannot be negative, NaN aside, which Relu keeps."""
    x = node.inputs[0]
    producer = x.producer() if x is not None else None
    if producer is None or producer.domain != "":
        return None
    if producer.op_type in ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs"):
        return x
    if producer.op_type == "Clip" and len(producer.inputs) > 1:
        low = constant(producer.inputs[1])
        return x if low is not None and np.all(low >= 0) else None
    return None


def _idempotent(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    producer = x.producer() if x is not None else None
    return x if producer is not None and producer.op_type == node.op_type and producer.domain == "" else None


def _involution(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    producer = x.producer() if x is not None else None
    if producer is None or producer.op_type != node.op_type or producer.domain != "":
        return None
    return producer.inputs[0]


def _where(node: ir.Node) -> ir.Value | None:
    condition, a, b = node.inputs
    array = constant(condition)
    if array is not None and array.size and (np.all(array) or not np.any(array)):
        kept, other = (a, b) if np.all(array) else (b, a)
        if same_shape(kept, node.outputs[0]) or (
            fits_into(array.shape, kept)
            and other is not None
            and other.shape is not None
            and fits_into(tuple(other.shape), kept)
        ):
            return kept
    return a if a is b and same_shape(a, node.outputs[0]) else None


def _resize(node: ir.Node) -> ir.Value | None:
    if (
        attribute(node, "mode", "nearest") == "cubic"
        or attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize"
    ):
        return None
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    x = node.inputs[0]
    if scales is not None and (array := constant(scales)) is not None and array.size:
        return (
            x
            if np.all(array == 1) and x is not None and x.shape is not None and len(array) == len(x.shape)
            else None
        )
    return (
        _same_rank_and_elements(node)
        if x is not None and x.shape is not None and x.shape.is_static()
        else None
    )


def _pool(node: ir.Node) -> ir.Value | None:
    get = node.attributes.get_ints
    ones = all(k == 1 for k in (*get("kernel_shape", (0,)), *get("strides", ())))
    padded = any(get("pads", ())) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return node.inputs[0] if ones and not padded else None


def _reduce(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    if len(node.inputs) < 2 or node.inputs[1] is None or _empty(node.inputs[1]):
        return x if attribute(node, "noop_with_empty_axes", 0) else None
    axes = constant(node.inputs[1])
    if axes is None or x is None or x.shape is None or not attribute(node, "keepdims", 1):
        return None
    return x if all(x.shape[int(axis)] == 1 for axis in axes) else None


def _global_pool(node: ir.Node) -> ir.Value | None:
    x = node.inputs[0]
    return x if x is not None and x.shape is not None and all(d == 1 for d in x.shape[2:]) else None


def _block(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if attribute(node, "blocksize") == 1 else None


_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_BROADCASTING = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "And", "Or", "Xor", "Equal", "Less", "Greater", "LessOrEqual",
        "GreaterOrEqual", "Where", "Mod",
    }
)  # fmt: skip
_RULES: dict[str, Callable[[ir.Node], ir.Value | None]] = {
    "Identity": _input,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Pad": _pad,
    "Concat": _one_input,
    "Sum": _one_input,
    "Max": _one_input,
    "Min": _one_input,
    "Mean": _one_input,
    "Split": _split,
    "Add": _neutral(0, either=True),
    "Sub": _neutral(0, either=False),
    "Mul": _neutral(1, either=True),
    "Div": _neutral(1, either=False),
    "Pow": _neutral(1, either=False),
    "And": _truth(True),
    "Or": _truth(False),
    "Not": _involution,
    "Neg": _involution,
    "Relu": _relu,
    "Abs": _idempotent,
    "Floor": _idempotent,
    "Ceil": _idempotent,
    "Round": _idempotent,
    "Clip": _clip,
    "Where": _where,
    "Resize": _resize,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "ReduceSum": _reduce,
    "ReduceMean": _reduce,
    "ReduceMax": _reduce,
    "ReduceMin": _reduce,
    "ReduceProd": _reduce,
    "DepthToSpace": _block,
    "SpaceToDepth": _block,
}
