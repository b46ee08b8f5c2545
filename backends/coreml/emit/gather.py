"""Reading and writing at places that are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import (
    Context,
    cast,
    emits,
    name_of,
    narrow,
    refused,
    through_ints,
    unchecked,
)
from optkit.backends.coreml.emit.elementwise import nonnegative
from optkit.backends.coreml.emit.quant import gathered
from optkit.backends.coreml.quiet import mb


def _places(c: Context, node: ir.Node, index: int, x: Any, axis: int) -> Any:
    """Indices, all of them at or above 0."""
    size = x.shape[axis]
    known = c.known(node, index)
    if known is not None:
        if not (known < 0).any():
            return narrow(known, "indices")
        if isinstance(size, int | np.integer):
            return narrow(np.where(known < 0, known + int(size), known), "indices")
    indices = c.input(node, index)
    if nonnegative(node.inputs[index]):
        return indices
    if isinstance(size, int | np.integer):
        length: Any = np.int32(size)
    else:
        length = mb.gather(x=mb.shape(x=x), indices=np.int32(axis), axis=0, **unchecked(c))
    negative = mb.cast(x=mb.less(x=indices, y=np.int32(0)), dtype="int32")
    return mb.add(x=indices, y=mb.mul(x=negative, y=length))


def _nd_places(c: Context, node: ir.Node, x: Any, batch: int = 0) -> Any:
    """Indices into several axes of ``x`` behind ``batch``, all of them at or above 0."""
    indices = c.input(node, 1)
    if nonnegative(node.inputs[1]):
        return indices
    sizes = c.sizes(x)[batch : batch + int(indices.shape[-1])]
    known = c.known(node, 1)
    if known is not None and all(isinstance(s, int) for s in sizes):
        return narrow(np.where(known < 0, known + np.asarray(sizes), known), "indices")
    negative = mb.cast(x=mb.less(x=indices, y=np.int32(0)), dtype="int32")
    return mb.add(x=indices, y=mb.mul(x=negative, y=c.shape(sizes)))


@emits("Gather")
def _gather(c: Context, node: ir.Node) -> Any:
    axis = node.attributes.get_int("axis", 0)
    table = gathered(c, node)
    x = c.input(node, 0) if table is None else table
    axis = axis + x.rank if axis < 0 else axis
    places = _places(c, node, 1, x, axis)
    if (
        x.rank == 1
        and x.val is None
        and np.ndim(getattr(places, "val", places)) == 0
        and isinstance(places, np.ndarray)
    ):
        at = int(places)
        return mb.slice_by_index(x=x, begin=[at], end=[at + 1], squeeze_mask=[True])
    return through_ints(x, lambda v: mb.gather(x=v, indices=places, axis=axis, **unchecked(c)))


@emits("GatherElements")
def _gather_elements(c: Context, node: ir.Node) -> Any:
    x, axis = c.input(node, 0), node.attributes.get_int("axis", 0)
    axis = axis + x.rank if axis < 0 else axis
    places = _places(c, node, 1, x, axis)
    shape = places.shape
    if any(x.shape[i] != shape[i] for i in range(x.rank) if i != axis):
        # ONNX reads the first ones along the other axes; Core ML wants them to agree.
        sizes = [x.shape[i] if i == axis else shape[i] for i in range(x.rank)]
        ends = [int(s) if isinstance(s, int | np.integer) else 0 for s in sizes]
        x = mb.slice_by_index(
            x=x, begin=[0] * x.rank, end=ends, end_mask=[e == 0 or i == axis for i, e in enumerate(ends)]
        )
    return through_ints(x, lambda v: mb.gather_along_axis(x=v, indices=places, axis=axis, **unchecked(c)))


@emits("GatherND")
def _gather_nd(c: Context, node: ir.Node) -> Any:
    x, dims = c.input(node, 0), node.attributes.get_int("batch_dims", 0)
    places = _nd_places(c, node, x, dims)
    return through_ints(x, lambda v: mb.gather_nd(x=v, indices=places, batch_dims=dims, **unchecked(c)))


_MODES = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}


@emits("ScatterND")
def _scatter_nd(c: Context, node: ir.Node) -> Any:
    data, updates = c.input(node, 0), c.input(node, 2)
    places = _nd_places(c, node, data)
    mode = _MODES[node.attributes.get_string("reduction", "none")]

    def scatter(v: Any) -> Any:
        return mb.scatter_nd(
            data=v, indices=places, updates=cast(updates, name_of(v)), mode=mode, **unchecked(c)
        )

    return through_ints(data, scatter)


@emits("ScatterElements")
def _scatter_elements(c: Context, node: ir.Node) -> Any:
    data, updates = c.input(node, 0), c.input(node, 2)
    axis = node.attributes.get_int("axis", 0)
    axis = axis + data.rank if axis < 0 else axis
    places = _places(c, node, 1, data, axis)
    if any(places.shape[i] != size for i, size in enumerate(data.shape) if i != axis):
        given, wanted = ([str(d) for d in v.shape] for v in (places, data))
        raise refused(
            node,
            f"its indices are {given} for data of {wanted}, and Core ML wants them to agree but on axis {axis}",
        )
    mode = _MODES[node.attributes.get_string("reduction", "none")]

    def scatter(v: Any) -> Any:
        return mb.scatter_along_axis(
            data=v, indices=places, updates=cast(updates, name_of(v)), axis=axis, mode=mode, **unchecked(c)
        )

    return through_ints(data, scatter)
