"""Operators that move elements and compute none; integers stay integers where the grid stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import MOVED, TO_LAST, Context, End, Layout, emits, size, together
from optkit.backends.litert.emit.grids import grid_of, stored
from optkit.backends.litert.emit.quant import store
from optkit.backends.litert.flat import Settings, Tensor
from optkit.graph import constant, ints


def _carried(c: Context, node: ir.Node, layout: Layout | None = None) -> tuple[End, Tensor, Layout]:
    """The first input, as integers where the output shall lie on the same grid."""
    source = node.inputs[0]
    assert source is not None
    form = c.layout(source) if layout is None else layout
    end = c.end(node, activations=False)
    q = c.integers(source, form) if end.quantizer is not None else None
    if (
        q is not None
        and q.grid is not None
        and end.quantizer is not None
        and q.grid.same(grid_of(end.quantizer))
    ):
        return end, q, form
    return end, c.get(source, form), form


@emits("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    shape = size(node.outputs[0])
    # Where channels are all there is of a picture, they are in order in either layout.
    flat = len(size(source)) == 4 and size(source)[2:] == (1, 1) and c.layout(source) == "last"
    end, x, _ = _carried(c, node, "last" if flat else "plain")
    store(c, end, c.reshaped(x, shape), "plain")


@emits("Transpose")
def _transpose(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    order = ints(node, "perm", list(reversed(range(len(size(source))))))
    end, x, layout = _carried(c, node)
    if layout == "last":
        order = [MOVED[i] for i in order]
    store(c, end, c.transposed(x, order), "plain")


@emits("Concat")
def _concat(c: Context, node: ir.Node) -> None:
    values = [v for v in node.inputs if v is not None]
    shape = size(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    layout = together(c, values, len(shape))
    end = c.end(node, activations=False)
    found = [c.integers(v, layout) for v in values] if end.quantizer is not None else [None]
    grid = grid_of(end.quantizer) if end.quantizer is not None else None
    same = [
        q for q in found if q is not None and q.grid is not None and grid is not None and q.grid.same(grid)
    ]
    parts = same if len(same) == len(values) else [c.get(v, layout) for v in values]
    placed = [shape[i] for i in (TO_LAST if layout == "last" else range(len(shape)))]
    made = c.op(
        "CONCATENATION", parts, placed, settings=("ConcatenationOptions", {"axis": MOVED[axis] if layout == "last" else axis}),
        grid=parts[0].grid, name=str(end.value.name),
    )  # fmt: skip
    store(c, end, made, layout)


def _refuse_slice(node: ir.Node) -> str | None:
    return (
        "LiteRT: bounds must be constant"
        if any(constant(v) is None for v in node.inputs[1:] if v is not None)
        else None
    )


@emits("Slice", refuse=_refuse_slice)
def _slice(c: Context, node: ir.Node) -> None:
    end, x, layout = _carried(c, node)
    source = node.inputs[0]
    assert source is not None
    shape = size(source)
    given = [constant(v) if v is not None else None for v in node.inputs[1:]] + [None] * 4
    starts, ends, axes, steps = given[:4]
    assert starts is not None and ends is not None
    first, last, by = [0] * len(shape), list(shape), [1] * len(shape)
    chosen = range(len(starts)) if axes is None else [int(a) % len(shape) for a in axes]
    for k, axis in enumerate(chosen):
        step = 1 if steps is None else int(steps[k])
        begin, stop, _ = slice(int(starts[k]), int(ends[k]), step).indices(shape[axis])
        place = MOVED[axis] if layout == "last" else axis
        first[place], last[place], by[place] = begin, stop, step
    for place, axis in enumerate(TO_LAST if layout == "last" else range(len(shape))):
        if by[place] == 1 and first[place] == 0 and axis not in chosen:
            last[place] = shape[axis]
    # Backwards to before the first element has no number of its own: the mask says it.
    mask = sum(1 << i for i, stop in enumerate(last) if stop < 0)
    out = size(node.outputs[0])
    placed = [out[i] for i in (TO_LAST if layout == "last" else range(len(out)))]
    inputs = [x, c.vector(first), c.vector([max(v, 0) for v in last]), c.vector(by)]
    settings = {"beginMask": 0, "endMask": mask}
    store(
        c,
        end,
        c.op("STRIDED_SLICE", inputs, placed, settings=("StridedSliceOptions", settings), grid=x.grid),
        layout,
    )


@emits("Split", refuse=_refuse_slice)
def _split(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    layout = c.layout(source)
    x = c.get(source, layout)
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    place = MOVED[axis] if layout == "last" else axis
    sizes = [size(o)[axis] for o in node.outputs]
    outputs = [
        (str(output.name), [n if i == place else d for i, d in enumerate(x.shape)])
        for output, n in zip(node.outputs, sizes, strict=True)
    ]
    inputs = [x, c.vector(sizes), c.number(place, np.int32)]
    made = c.ops("SPLIT_V", inputs, outputs, settings=("SplitVOptions", {"numSplits": len(outputs)}))
    for output, tensor in zip(node.outputs, made, strict=True):
        c.put(output, tensor, layout)


def _edges(node: ir.Node) -> np.ndarray | None:
    """Elements before and behind each axis, ``[axes, 2]``; None where they are not constant."""
    source, pads = node.inputs[0], constant(node.inputs[1])
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = None if given is None else constant(given)
    if source is None or source.shape is None or pads is None or (given is not None and axes is None):
        return None
    found = np.zeros((len(source.shape), 2), np.int64)
    found[slice(None) if axes is None else axes] = pads.reshape(2, -1).T
    return found


def _refuse_pad(node: ir.Node) -> str | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None and constant(value) is None:
        return "LiteRT: the value of pads must be constant"
    edges = _edges(node)
    return "LiteRT: pads must be constant and not negative" if edges is None or (edges < 0).any() else None


# Modes that repeat elements, by the names that NumPy has for them too.
_REPEATED = frozenset({"reflect", "edge", "wrap"})


@emits("Pad", refuse=_refuse_pad)
def _pad(c: Context, node: ir.Node) -> None:
    source, mode = node.inputs[0], node.attributes.get_string("mode", "constant")
    assert source is not None
    layout = c.layout(source)
    x, found = c.get(source, layout), _edges(node)
    assert found is not None
    edges = found[list(TO_LAST)] if layout == "last" else found
    shape = [d + int(e.sum()) for d, e in zip(x.shape, edges, strict=True)]
    if mode == "reflect" and all(e.max() < d for d, e in zip(x.shape, edges, strict=True)):
        inputs = [x, c.graph.constant(edges.astype(np.int32))]
        made = c.op("MIRROR_PAD", inputs, shape, settings=("MirrorPadOptions", {"mode": 0}))
    elif mode in _REPEATED:
        made = x
        for axis, (n, e) in enumerate(zip(x.shape, edges, strict=True)):
            if e.any():
                places = c.vector(np.pad(np.arange(n), tuple(map(int, e)), mode=mode).tolist())  # type: ignore[call-overload]
                placed = [*made.shape[:axis], n + int(e.sum()), *made.shape[axis + 1 :]]
                settings = ("GatherOptions", {"axis": axis, "batchDims": 0})
                made = c.op("GATHER", [made, places], placed, settings=settings)
    else:
        value = node.inputs[2] if len(node.inputs) > 2 else None
        held = np.zeros(1) if value is None else constant(value)
        assert held is not None
        fill = c.graph.constant(np.asarray(held.reshape(-1)[0], x.dtype))
        inputs = [x, c.graph.constant(edges.astype(np.int32)), fill]
        made = c.op("PADV2", inputs, shape, settings=("PadV2Options", {}))
    c.put(node.outputs[0], made, layout)


@emits("Expand")
def _expand(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    c.put(node.outputs[0], c.spread(c.get(source), size(node.outputs[0])))


@emits("Tile", refuse=_refuse_slice)
def _tile(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    times = constant(node.inputs[1])
    assert times is not None
    c.put(
        node.outputs[0],
        c.op(
            "TILE",
            [c.get(source), c.vector(times.tolist())],
            size(node.outputs[0]),
            settings=("TileOptions", {}),
        ),
    )


@emits("Gather")
def _gather(c: Context, node: ir.Node) -> None:
    source, places = node.inputs[0], node.inputs[1]
    assert source is not None and places is not None
    table, axis, shape = (
        size(source),
        node.attributes.get_int("axis", 0) % len(size(source)),
        size(node.outputs[0]),
    )
    known = constant(places)
    if known is not None:
        indices = c.graph.constant(np.where(known < 0, known + table[axis], known).astype(np.int32))
    else:
        # Negative ones count from the end.
        given = c.get(places)
        n = c.number(table[axis], given.dtype)
        indices = c.op("FLOOR_MOD", [given, n], given.shape, settings=("FloorModOptions", {}))
    settings = ("GatherOptions", {"axis": axis, "batchDims": 0})
    kept = stored(source)
    if kept is None or kept[0].dtype != np.int8 or kept[1].zero.any():
        plain = constant(source)
        floats = plain is not None and plain.dtype == np.float32
        x = c.weights(plain, str(source.name)) if floats and plain is not None else c.get(source)
        c.put(
            node.outputs[0],
            c.op("GATHER", [x, indices], shape, settings=settings, name=str(node.outputs[0].name)),
        )
        return
    # Rows of a table in integers: those that are looked up become floats, not the table.
    array, grid = kept
    rows = c.op("GATHER", [c.graph.constant(array, str(source.name)), indices], shape, settings=settings)
    if grid.scale.size > 1 and grid.axis == axis:
        scale = c.op(
            "GATHER",
            [c.graph.constant(grid.scale), indices],
            indices.shape,
            settings=("GatherOptions", {"axis": 0, "batchDims": 0}),
        )
        scale = c.reshaped(scale, (*indices.shape, *(1,) * (len(table) - 1 - axis)))
    else:
        behind = len(table) - 1 - grid.axis if grid.scale.size > 1 else 0
        scale = c.graph.constant(grid.scale.reshape(-1, *(1,) * behind))
    c.put(
        node.outputs[0],
        c.op(
            "MUL",
            [c.cast(rows, np.float32), scale],
            shape,
            settings=("MulOptions", {}),
            name=str(node.outputs[0].name),
        ),
    )


@emits("DepthToSpace")
def _depth_to_space(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    out, block = size(node.outputs[0]), node.attributes.get_int("blocksize", 1)
    x = c.get(source, "last")
    if node.attributes.get_string("mode", "DCR") == "CRD":
        # Channels in the order of the other mode, which is the kernel's.
        order = np.arange(x.shape[3]).reshape(-1, block * block).T.reshape(-1)
        settings: Settings = ("GatherOptions", {"axis": 3, "batchDims": 0})
        x = c.op("GATHER", [x, c.vector(order.tolist())], x.shape, settings=settings)
    shape = (out[0], out[2], out[3], out[1])
    settings = ("DepthToSpaceOptions", {"blockSize": block})
    c.put(node.outputs[0], c.op("DEPTH_TO_SPACE", [x], shape, settings=settings), "last")


@emits("SpaceToDepth")
def _space_to_depth(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    out, block = size(node.outputs[0]), node.attributes.get_int("blocksize", 1)
    shape = (out[0], out[2], out[3], out[1])
    settings = ("SpaceToDepthOptions", {"blockSize": block})
    c.put(node.outputs[0], c.op("SPACE_TO_DEPTH", [c.get(source, "last")], shape, settings=settings), "last")
