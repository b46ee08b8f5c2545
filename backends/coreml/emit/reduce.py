"""Reductions, selections and cumulative operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, emits, is_float, like, refused, wide
from optkit.backends.coreml.quiet import mb, types
from optkit.graph import constant, ints, scalar

_REDUCE = {
    "ReduceMean": "reduce_mean", "ReduceSum": "reduce_sum", "ReduceMax": "reduce_max", "ReduceMin": "reduce_min",
    "ReduceProd": "reduce_prod", "ReduceL1": "reduce_l1_norm", "ReduceL2": "reduce_l2_norm",
    "ReduceSumSquare": "reduce_sum_square", "ReduceLogSumExp": "reduce_log_sum_exp", "ReduceLogSum": "reduce_sum",
}  # fmt: skip


@emits(*_REDUCE)
def _reduce(c: Context, node: ir.Node) -> Any:
    x = wide(c.input(node, 0))
    boolean = x.dtype == types.bool
    x = mb.cast(x=x, dtype="int32") if boolean else x
    axes = ints(node, "axes") or None
    if c.has(node, 1):
        axes = c.known_ints(node, 1)
        if axes is None:
            raise refused(node, "the axes of a reduction are computed at run time")
    if not axes:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return _of_each(node, wide(c.input(node, 0)))
        axes = list(range(x.rank))
    keep = bool(node.attributes.get_int("keepdims", 1))
    out = getattr(mb, _REDUCE[node.op_type])(x=x, axes=axes, keep_dims=keep)
    if node.op_type == "ReduceLogSum":
        out = mb.log(x=out, epsilon=like(out, 0))
    if out.rank and not keep and len(axes) == x.rank:
        out = mb.squeeze(x=out, axes=[0])
    return mb.cast(x=out, dtype="bool") if boolean else out


def _of_each(node: ir.Node, x: Any) -> Any:
    """A reduction along no axis: each element alone."""
    if node.op_type in ("ReduceL1", "ReduceL2"):
        return mb.abs(x=x)
    if node.op_type == "ReduceSumSquare":
        return mb.mul(x=x, y=x)
    if node.op_type == "ReduceLogSum":
        return mb.log(x=x, epsilon=like(x, 0))
    return mb.identity(x=x)


def _refuse_arg(node: ir.Node) -> str | None:
    return (
        "Core ML gives the first of several, not the last"
        if node.attributes.get_int("select_last_index", 0)
        else None
    )


@emits("ArgMax", "ArgMin", refuse=_refuse_arg)
def _arg(c: Context, node: ir.Node) -> Any:
    reduce = mb.reduce_argmax if node.op_type == "ArgMax" else mb.reduce_argmin
    x = wide(c.input(node, 0))
    return reduce(
        x=x, axis=node.attributes.get_int("axis", 0), keep_dims=bool(node.attributes.get_int("keepdims", 1))
    )


@emits("TopK")
def _top_k(c: Context, node: ir.Node) -> Any:
    k = c.known_ints(node, 1)
    x = wide(c.input(node, 0))
    axis, largest = node.attributes.get_int("axis", -1) % x.rank, bool(node.attributes.get_int("largest", 1))
    if k is not None:
        return mb.topk(x=x, k=k[0], axis=axis, ascending=not largest)
    # Core ML needs k when it is compiled: all in order, and as many of them as are wanted.
    order = mb.argsort(x=x, axis=axis, ascending=not largest)
    here = [i == axis for i in range(x.rank)]
    count = mb.reshape(x=c.input(node, 1), shape=[1])
    ends = [count if own else np.array([0], np.int32) for own in here]
    first = mb.slice_by_index(
        x=order,
        begin=[0] * x.rank,
        end=mb.concat(values=ends, axis=0) if x.rank > 1 else count,
        end_mask=[not own for own in here],
    )
    unchecked = {"validate_indices": False} if c.version >= 17 else {}
    return [mb.gather_along_axis(x=x, indices=first, axis=axis, **unchecked), first]


def _refuse_cumulative(node: ir.Node) -> str | None:
    return None if scalar(node.inputs[1]) is not None else "Core ML needs the axis when it is compiled"


@emits("CumSum", refuse=_refuse_cumulative)
def _cumulative(c: Context, node: ir.Node) -> Any:
    x = wide(c.input(node, 0))
    axis = int(scalar(node.inputs[1]) or 0) % x.rank
    exclusive, reverse = (
        bool(node.attributes.get_int("exclusive", 0)),
        bool(node.attributes.get_int("reverse", 0)),
    )
    return mb.cumsum(x=x, axis=axis, exclusive=exclusive, reverse=reverse)


def _refuse_one_hot(node: ir.Node) -> str | None:
    if scalar(node.inputs[1]) is None or constant(node.inputs[2]) is None:
        return "Core ML needs the depth and the values when it is compiled"
    return None


@emits("OneHot", refuse=_refuse_one_hot)
def _one_hot(c: Context, node: ir.Node) -> Any:
    depth = int(scalar(node.inputs[1]) or 0)
    indices, values = c.input(node, 0), c.input(node, 2)
    if is_float(indices):
        indices = mb.cast(x=indices, dtype="int32")
    # Negative indices count from the end.
    negative = mb.cast(x=mb.less(x=indices, y=np.int32(0)), dtype="int32")
    indices = mb.add(x=indices, y=mb.mul(x=negative, y=np.int32(depth)))
    off, on = np.asarray(values.val).reshape(-1)
    return mb.one_hot(
        indices=indices,
        one_hot_vector_size=depth,
        axis=node.attributes.get_int("axis", -1),
        on_value=on,
        off_value=off,
    )
