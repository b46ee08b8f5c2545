"""Elements at places that are computed: looked up, written, the largest.

ONNX lets places count from the end, LiteRT does not. Its kernels write where nothing was, and add where two values meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, emits, size
from optkit.backends.litert.flat import Tensor
from optkit.graph import constant


def _places(c: Context, value: ir.Value, sizes: Sequence[int] | int) -> Tensor:
    """Places along axes of ``sizes``, one for each entry of the last axis, counted from the beginning, in int32."""
    known, limit = constant(value), np.asarray(sizes)
    if known is not None:
        return c.graph.constant(np.where(known < 0, known + limit, known).astype(np.int32))
    given = c.cast(c.get(value), np.int32)
    limits = c.graph.constant(limit.astype(np.int32))
    return c.op("FLOOR_MOD", [given, limits], given.shape, settings=("FloorModOptions", {}))


@emits(
    "GatherND",
    refuse=lambda n: (
        "LiteRT: places of each sample of a batch" if n.attributes.get_int("batch_dims", 0) else None
    ),
)
def _gather_nd(c: Context, node: ir.Node) -> None:
    source, places = node.inputs[0], node.inputs[1]
    assert source is not None and places is not None
    depth = size(places)[-1]
    inputs = [c.get(source), _places(c, places, size(source)[:depth])]
    made = c.op("GATHER_ND", inputs, size(node.outputs[0]), settings=("GatherNdOptions", {}))
    c.put(node.outputs[0], made)


def _flat_places(c: Context, node: ir.Node) -> Tensor:
    """Where in the elements of the first input, in one line, those are that ``GatherElements`` and ``ScatterElements`` mean."""
    source, places = node.inputs[0], node.inputs[1]
    assert source is not None and places is not None
    whole, shape = size(source), size(places)
    axis = node.attributes.get_int("axis", 0) % len(whole)
    strides = [int(np.prod(whole[i + 1 :])) for i in range(len(whole))]
    others = [n if i != axis else 1 for i, n in enumerate(shape)]
    grids = np.indices(others)
    offset = sum(
        (g * s for i, (g, s) in enumerate(zip(grids, strides, strict=True)) if i != axis), np.zeros(others, np.int64)
    )  # fmt: skip
    along = _places(c, places, whole[axis])
    scaled = c.op("MUL", [along, c.number(strides[axis], np.int32)], shape, settings=("MulOptions", {}))
    # One line of each: kernels add along fewer axes than there may be.
    flat = c.reshaped(scaled, (int(np.prod(shape)),))
    more = c.graph.constant(np.broadcast_to(offset, shape).reshape(-1).astype(np.int32))
    return c.op("ADD", [flat, more], flat.shape, settings=("AddOptions", {}))


@emits("GatherElements")
def _gather_elements(c: Context, node: ir.Node) -> None:
    source, places = node.inputs[0], node.inputs[1]
    assert source is not None and places is not None
    line = c.reshaped(c.get(source), (int(np.prod(size(source))),))
    flat = _flat_places(c, node)
    made = c.op("GATHER", [line, flat], flat.shape, settings=("GatherOptions", {"axis": 0, "batchDims": 0}))
    c.put(node.outputs[0], c.reshaped(made, size(places)))


_REDUCTIONS = ("none", "add")


def _refuse_scatter(node: ir.Node) -> str | None:
    how = node.attributes.get_string("reduction", "none")
    return None if how in _REDUCTIONS else f"LiteRT writes values or adds them, not their {how}"


def _scattered(
    c: Context, node: ir.Node, data: Tensor, places: Tensor, updates: Tensor, count: Sequence[int]
) -> Tensor:
    """``data`` with ``updates`` at ``places [*count, depth]``."""
    where = c.vector(data.shape)
    written = c.op(
        "SCATTER_ND", [places, updates, where], data.shape, updates.dtype, ("ScatterNdOptions", {})
    )
    if node.attributes.get_string("reduction", "none") == "add":
        return c.op("ADD", [data, written], data.shape, settings=("AddOptions", {}))
    ones = c.graph.constant(np.ones((*count, *data.shape[places.shape[-1] :]), np.int32))
    marks = c.op("SCATTER_ND", [places, ones, where], data.shape, np.int32, ("ScatterNdOptions", {}))
    there = c.op("GREATER", [marks, c.number(0, np.int32)], data.shape, np.bool_, ("GreaterOptions", {}))
    return c.op("SELECT_V2", [there, written, data], data.shape, data.dtype, ("SelectV2Options", {}))


@emits("ScatterND", refuse=_refuse_scatter)
def _scatter_nd(c: Context, node: ir.Node) -> None:
    source, places, updates = node.inputs[:3]
    assert source is not None and places is not None and updates is not None
    depth = size(places)[-1]
    # In one line, which kernels compare and add along however many axes there are.
    whole, rest = size(source), size(source)[depth:]
    line = (int(np.prod(whole[:depth])), int(np.prod(rest)))
    strides = [int(np.prod(whole[i + 1 : depth])) for i in range(depth)]
    found = _places(c, places, whole[:depth])
    count = int(np.prod(found.shape[:-1]))
    scaled = c.op(
        "MUL", [found, c.graph.constant(np.asarray(strides, np.int32))], found.shape, settings=("MulOptions", {})
    )  # fmt: skip
    rows = c.op(
        "SUM", [c.reshaped(scaled, (count, depth)), c.vector([1])], (count, 1), settings=("ReducerOptions", {"keepDims": True}),
    )  # fmt: skip
    made = _scattered(
        c, node, c.reshaped(c.get(source), line), rows, c.reshaped(c.get(updates), (count, line[1])), (count,)
    )
    c.put(node.outputs[0], c.reshaped(made, whole))


@emits("ScatterElements", refuse=_refuse_scatter)
def _scatter_elements(c: Context, node: ir.Node) -> None:
    source, _, updates = node.inputs[:3]
    assert source is not None and updates is not None
    flat = _flat_places(c, node)
    count = flat.shape[0]
    line = c.reshaped(c.get(source), (int(np.prod(size(source))),))
    made = _scattered(
        c, node, line, c.reshaped(flat, (count, 1)), c.reshaped(c.get(updates), (count,)), (count,)
    )
    c.put(node.outputs[0], c.reshaped(made, size(source)))


def _refuse_top(node: ir.Node) -> str | None:
    return "LiteRT: how many are kept must be constant" if constant(node.inputs[1]) is None else None


@emits("TopK", refuse=_refuse_top)
def _top(c: Context, node: ir.Node) -> None:
    source, largest = node.inputs[0], bool(node.attributes.get_int("largest", 1))
    assert source is not None
    shape = size(source)
    axis = node.attributes.get_int("axis", -1) % len(shape)
    # The kernel looks along the last axis, and from the largest on.
    order = [*(i for i in range(len(shape)) if i != axis), axis]
    back = [order.index(i) for i in range(len(shape))]
    x = c.transposed(c.get(source), order)
    x = x if largest else _reversed(c, x)
    count = size(node.outputs[0])[axis]
    placed = (*x.shape[:-1], count)
    values, places = (
        c.graph.tensor(f"{node.name}/{n}", placed, k) for n, k in (("values", x.dtype), ("places", np.int32))
    )
    c.graph.op("TOPK_V2", [x, c.number(count, np.int32)], [values, places], ("TopKV2Options", {}))
    values = values if largest else _reversed(c, values)
    c.put(node.outputs[0], c.transposed(values, back))
    if len(node.outputs) > 1:
        c.put(node.outputs[1], c.cast(c.transposed(places, back), np.int64))


def _reversed(c: Context, x: Tensor) -> Tensor:
    """In reverse order, and back; of integers, whose lowest has no counterpart, by ``-1 - x``."""
    if x.dtype.kind == "f":
        return c.op("NEG", [x], x.shape, settings=("NegOptions", {}))
    return c.op("SUB", [c.number(-1, x.dtype), x], x.shape, settings=("SubOptions", {}))


def _refuse_hot(node: ir.Node) -> str | None:
    known = constant(node.inputs[1]) is not None and constant(node.inputs[2]) is not None
    return None if known else "LiteRT: depth and values must be constant"


@emits("OneHot", refuse=_refuse_hot)
def _one_hot(c: Context, node: ir.Node) -> None:
    places, values = node.inputs[0], constant(node.inputs[2])
    assert places is not None and values is not None
    shape = size(node.outputs[0])
    axis = node.attributes.get_int("axis", -1) % len(shape)
    depth = c.number(shape[axis], np.int32)
    given = c.cast(c.get(places), np.int32)
    # From the end; what is beyond either is nowhere.
    ahead = c.op("ADD", [given, depth], given.shape, settings=("AddOptions", {}))
    behind = c.op("LESS", [given, c.number(0, np.int32)], given.shape, np.bool_, ("LessOptions", {}))
    found = c.op("SELECT_V2", [behind, ahead, given], given.shape, np.int32, ("SelectV2Options", {}))
    inputs = [found, depth, c.number(values[1], values.dtype), c.number(values[0], values.dtype)]
    last = axis == len(shape) - 1
    settings = ("OneHotOptions", {"axis": -1 if last else axis})
    c.put(node.outputs[0], c.op("ONE_HOT", inputs, shape, values.dtype, settings))


def _refuse_triangle(node: ir.Node) -> str | None:
    given = node.inputs[1] if len(node.inputs) > 1 else None
    return None if given is None or constant(given) is not None else "LiteRT: which diagonal must be constant"


@emits("Trilu", refuse=_refuse_triangle)
def _triangle(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    shape, given = (
        size(source),
        constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None,
    )
    k = 0 if given is None else int(given.reshape(-1)[0])
    x = c.get(source)
    ones = np.ones(shape[-2:], bool)
    kept = np.triu(ones, k) if node.attributes.get_int("upper", 1) else np.tril(ones, k)
    flat = c.reshaped(x, (int(np.prod(shape[:-2])), *shape[-2:]))
    inputs = [c.graph.constant(kept[None]), flat, c.number(0, x.dtype)]
    made = c.op("SELECT_V2", inputs, flat.shape, x.dtype, ("SelectV2Options", {}))
    c.put(node.outputs[0], c.reshaped(made, shape))
