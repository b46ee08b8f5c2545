"""Operators over the axes of their inputs in another order: the same numbers, moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, rank
from optkit.ops import spec
from optkit.rewrite import Builder

Order = tuple[int, int, int, int]
"""For each of four axes, which one it was before; the first stays the first."""

SWAPPED: Order = (0, 1, 3, 2)

# Windows of any two axes behind the channels, and what takes all places there alike: channels have to stay second.
_WINDOWS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool"})
_EVERYWHERE = frozenset({"GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization", "BatchNormalization"})
_ALONG = {"Concat": 0, "Split": 0, "Softmax": -1, "LogSoftmax": -1}
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceL1", "ReduceL2"})  # fmt: skip


def operands(node: ir.Node) -> list[ir.Value]:
    """The inputs whose axes change with those of the outputs; a single element is the same in every order."""
    return [v for v in _moving(node) if v is not None and constant(v) is None and not _single(v)]


def results(node: ir.Node) -> list[ir.Value]:
    """The outputs whose axes change."""
    return [] if _ends(node) else list(node.outputs)


def follows(node: ir.Node, order: Order) -> bool:
    """Whether ``node`` computes the same over values in ``order``; sizes must be known, but for that of the first axis."""
    if node.domain != "" or not operands(node) or not all(map(_known, (*operands(node), *results(node)))):
        return False
    if len(node.outputs) != 1 and node.op_type != "Split":
        return False
    if _elementwise(node):
        return all(v is None or _single(v) or (rank(v) or 5) <= 4 for v in node.inputs)
    if node.op_type in _WINDOWS:
        fixed = "Conv" not in node.op_type or constant(node.inputs[1]) is not None
        return order == SWAPPED and fixed
    if node.op_type in _EVERYWHERE:
        return order == SWAPPED
    if node.op_type in _REDUCTIONS:
        return _reduces(node, order)
    if node.op_type == "Transpose":
        return _permutation(node)[0] == 0
    if node.op_type == "Slice":
        return _axes(node, 3) is not None
    if node.op_type == "Pad":
        return constant(node.inputs[1]) is not None and _axes(node, 3) is not None
    return node.op_type in _ALONG


def again(op: Builder, node: ir.Node, order: Order, now: Mapping[ir.Value, ir.Value]) -> list[ir.Value]:
    """The outputs of ``node`` in ``order``, from its operands in ``order``, which ``now`` holds."""
    place = [order.index(a) for a in range(4)]
    inputs: list[Any] = list(node.inputs)
    for index, value in enumerate(_moving(node)):
        held = constant(value)
        if value is not None and value in now:
            inputs[index] = now[value]
        elif held is not None and held.size > 1:
            wide = held.reshape((1,) * (4 - held.ndim) + held.shape)
            inputs[index] = np.ascontiguousarray(wide.transpose(order))
    changed: dict[str, object] = {}
    if node.op_type in _ALONG:
        changed["axis"] = place[node.attributes.get_int("axis", _ALONG[node.op_type]) % 4]
    elif node.op_type == "Transpose":
        permutation = _permutation(node)
        changed["perm"] = [place[permutation[a]] for a in order]
    elif node.op_type in _WINDOWS:
        for name in ("kernel_shape", "strides", "dilations", "output_padding", "output_shape", "pads"):
            if (given := node.attributes.get_ints(name)) is not None:
                changed[name] = [i for k in range(0, len(given), 2) for i in (given[k + 1], given[k])]
        if "Conv" in node.op_type:
            kernel = constant(node.inputs[1])
            assert kernel is not None
            inputs[1] = np.ascontiguousarray(kernel.transpose(SWAPPED))
    elif node.op_type in ("Slice", "Pad") or (node.op_type in _REDUCTIONS and len(inputs) > 1):
        # One axis after the other as they were named, each where it is now.
        at = 1 if node.op_type in _REDUCTIONS else 3
        axes = _axes(node, at)
        assert axes is not None
        inputs += [None] * (at + 1 - len(inputs))
        # Those of a Slice have the type of its starts.
        same = constant(node.inputs[at]) if len(node.inputs) > at else None
        kind = np.int32 if same is not None and same.dtype == np.int32 else np.int64
        inputs[at] = np.array([place[a] for a in axes], kind)
    kept = {a.name: a for a in node.attributes.values()}
    return list(op.node(node.op_type, inputs, kept | changed, outputs=len(node.outputs)))


def _known(value: ir.Value) -> bool:
    shape = shape_of(value)
    return shape is not None and len(shape) == 4 and all(isinstance(d, int) for d in shape[1:])


def _moving(node: ir.Node) -> tuple[ir.Value | None, ...]:
    return tuple(node.inputs if _elementwise(node) or node.op_type == "Concat" else node.inputs[:1])


def _elementwise(node: ir.Node) -> bool:
    row = spec(node)
    return row is not None and row.family == "elementwise"


def _single(value: ir.Value | None) -> bool:
    shape = shape_of(value)
    return shape is not None and len(shape) <= 4 and all(d == 1 for d in shape)


def _ends(node: ir.Node) -> bool:
    """Whether it takes axes away, so that its output has no order to change."""
    return node.op_type in _REDUCTIONS and attribute(node, "keepdims", 1) == 0


def _reduces(node: ir.Node, order: Order) -> bool:
    """Whether axes are named, and those that are left, where they are left alone, stay in their order."""
    axes = _axes(node, 1) if len(node.inputs) > 1 else None
    if not axes:
        return False
    left = [a for a in order if a not in axes]
    return not _ends(node) or left == sorted(left)


def _permutation(node: ir.Node) -> list[int]:
    return [int(p) for p in node.attributes.get_ints("perm", ()) or (3, 2, 1, 0)]


def _axes(node: ir.Node, at: int) -> list[int] | None:
    """The axes that input ``at`` names, all in turn where there is none; None where they are not known."""
    given = node.inputs[at] if len(node.inputs) > at else None
    if given is None:
        count = shape_of(node.inputs[1])
        size = count[0] if count is not None and len(count) == 1 else None
        return list(range(size if node.op_type == "Slice" else 4)) if isinstance(size, int) else None
    held = constant(given)
    return None if held is None else [int(a) % 4 for a in held.reshape(-1)]
