"""Convolutions and pooling windows, with channels last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from ai_edge_litert.schema_py_generated import Padding

from optkit.backends.litert.emit.base import Context, End, emits, size
from optkit.backends.litert.emit.grids import floats_of, grid_of, stored
from optkit.backends.litert.emit.quant import store
from optkit.backends.litert.flat import Grid, Tensor
from optkit.graph import constant, ints, rank

Pair = tuple[int, int]


def _area(value: ir.Value) -> list[int]:
    """Rows and columns of a picture or a kernel; what has one axis has one row."""
    found = list(size(value)[2:])
    return found if len(found) == 2 else [1, *found]


def _filled(array: np.ndarray) -> np.ndarray:
    """A kernel over two axes."""
    return array if array.ndim == 4 else array[:, :, None]


def _refuse_window(node: ir.Node) -> str | None:
    return None if rank(node.inputs[0]) in (3, 4) else "LiteRT slides windows over one or two axes"


def _picture(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """An attribute over two axes; what slides over one axis slides over a picture of one row.

    Args:
        default: Of two axes, or of the beginnings and ends of both.
    """
    found, first = ints(node, name, default), default[0]
    if rank(node.inputs[0]) == 4 or len(found) == len(default):
        return found
    return [first, found[0]] if len(default) == 2 else [0, found[0], 0, found[1]]


def _refuse_conv(node: ir.Node) -> str | None:
    reason = _refuse_window(node)
    if reason is not None:
        return reason
    if constant(node.inputs[1]) is None and stored(node.inputs[1]) is None:
        return "LiteRT needs the weights of a convolution to be constant"
    if any(p < 0 for p in ints(node, "pads")):
        return "LiteRT has no negative pads"
    return None


def _edges(
    node: ir.Node, shape: Sequence[int], kernel: Pair, strides: Pair, dilations: Pair
) -> tuple[list[int], list[int]]:
    """Rows and columns around (top, left, bottom, right), and those that the schema calls SAME."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(shape, strides, reach, strict=True)]
    same = [t // 2 for t in total] + [t - t // 2 for t in total]
    if automatic == "VALID":
        return [0] * 4, same
    if automatic == "SAME_LOWER":
        return same[2:] + same[:2], same
    return (same if automatic == "SAME_UPPER" else _picture(node, "pads", [0] * 4)), same


def _beyond(
    node: ir.Node, shape: Sequence[int], kernel: Pair, strides: Pair, pads: Sequence[int]
) -> list[int]:
    """Pads with what the last window of an axis reaches beyond them, as it does where sizes are rounded up."""
    if not node.attributes.get_int("ceil_mode", 0):
        return list(pads)
    outs = _area(node.outputs[0])
    more = [
        max(0, (o - 1) * s + k - (n + pads[i] + pads[2 + i]))
        for i, (o, s, k, n) in enumerate(zip(outs, strides, kernel, shape, strict=True))
    ]
    return [*pads[:2], *(p + m for p, m in zip(pads[2:], more, strict=True))]


def padded(
    node: ir.Node, shape: Sequence[int], kernel: Pair, strides: Pair, dilations: Pair
) -> tuple[int, list[int]]:
    """The schema's padding, and rows and columns to pad before (top, left, bottom, right) where that is not enough."""
    pads, same = _edges(node, shape, kernel, strides, dilations)
    pads = _beyond(node, shape, kernel, strides, pads)
    if not any(pads):
        return Padding.VALID, []
    return (Padding.SAME, []) if pads == same else (Padding.VALID, pads)


def _pad(c: Context, x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    if not any(pads):
        return x
    top, left, bottom, right = pads
    edges = c.graph.constant(np.asarray([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32))
    shape = (x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right, x.shape[3])
    if value:
        return c.op("PADV2", [x, edges, c.number(value, x.dtype)], shape, settings=("PadV2Options", {}))
    return c.op("PAD", [x, edges], shape, settings=("PadOptions", {}), grid=x.grid)


@emits("Conv", refuse=_refuse_conv)
def _conv(c: Context, node: ir.Node) -> None:
    source, weights = node.inputs[0], node.inputs[1]
    assert source is not None and weights is not None
    channels, outs, ins = size(source)[1], *size(weights)[:2]
    area, kernel = _area(source), _area(weights)
    groups = node.attributes.get_int("group", 1)
    strides, dilations = _picture(node, "strides", [1, 1]), _picture(node, "dilations", [1, 1])
    end, kept = c.end(node), stored(weights)
    depthwise = ins == 1 and groups == channels
    q = c.integers(source, "last")
    eight = kept is not None and kept[0].dtype == np.int8 and not kept[1].zero.any()
    whole = q is not None and eight and end.quantizer is not None
    x = q if whole and q is not None else c.get(source, "last")
    order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
    grid = None
    # Integers with float activations: the kernel rounds these while it runs. Depthwise ones gain nothing from it.
    if kept is not None and eight and (whole or not depthwise):
        array, scales = kept
        w = c.graph.constant(
            np.ascontiguousarray(np.transpose(_filled(array), order)), str(weights.name),
            Grid(scale=scales.scale, zero=scales.zero, axis=3 if depthwise else 0),
        )  # fmt: skip
    else:
        w = c.weights(np.transpose(_filled(floats_of(weights)), order), str(weights.name))
    if whole:
        assert kept is not None and x.grid is not None and end.quantizer is not None
        b, grid = bias(c, node, outs, x.grid, kept[1]), grid_of(end.quantizer)
    else:
        b = _float_bias(c, node, outs)
    kind, pads = padded(
        node, area, (kernel[0], kernel[1]), (strides[0], strides[1]), (dilations[0], dilations[1])
    )
    x = _pad(c, x, pads)
    rows = [
        -(-x.shape[i + 1] // s) if kind == Padding.SAME else (x.shape[i + 1] - (k - 1) * d - 1) // s + 1
        for i, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True))
    ]
    settings = {
        "padding": kind, "strideH": strides[0], "strideW": strides[1], "dilationHFactor": dilations[0],
        "dilationWFactor": dilations[1], "fusedActivationFunction": end.activation,
    }  # fmt: skip
    if depthwise:
        settings["depthMultiplier"] = outs // channels
    made = c.op(
        "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [x, w, b], (x.shape[0], *rows, outs), np.int8 if whole else np.float32,
        ("DepthwiseConv2DOptions" if depthwise else "Conv2DOptions", settings), grid=grid, name=str(end.value.name),
    )  # fmt: skip
    store(c, end, made, "last")


def _float_bias(c: Context, node: ir.Node, outs: int) -> Tensor:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return c.get(value) if value is not None else c.graph.constant(np.zeros(outs, np.float32), "no bias")


def bias(c: Context, node: ir.Node, outs: int, inputs: Grid, weights: Grid) -> Tensor:
    """The bias in 32 bits, on the grid of the products."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    scale = (inputs.scale.astype(np.float64) * weights.scale).astype(np.float32)
    array = np.zeros(outs, np.int32)
    if value is not None:
        kept, plain = stored(value), constant(value)
        if kept is not None and np.allclose(kept[1].scale, scale, rtol=1e-6):
            array = kept[0].astype(np.int32)
        else:
            if plain is None:
                assert kept is not None
                plain = kept[0] * kept[1].scale.astype(np.float64)
            wide = np.rint(
                np.broadcast_to(plain.reshape(-1), outs) / np.broadcast_to(scale, outs).astype(np.float64)
            )
            limit = np.iinfo(np.int32)
            array = np.clip(wide, limit.min, limit.max).astype(np.int32)
    return c.graph.constant(array, "bias", Grid(scale=scale, zero=np.zeros(scale.shape, np.int64)))


def _pool(c: Context, node: ir.Node, code: str) -> None:
    source = node.inputs[0]
    assert source is not None
    kernel, strides = _picture(node, "kernel_shape", [1, 1]), _picture(node, "strides", [1, 1])
    area = _area(source)
    kind, pads = padded(node, area, (kernel[0], kernel[1]), (strides[0], strides[1]), (1, 1))
    end = c.end(node)
    x = _same_grid(c, source, end) if not pads else None
    if x is None:
        x = c.get(source, "last")
    if pads:
        # What is never the largest.
        lowest = (np.finfo if x.dtype.kind == "f" else np.iinfo)(x.dtype).min
        x = _pad(c, x, pads, float(lowest))
    rows = [
        -(-x.shape[i + 1] // s) if kind == Padding.SAME else (x.shape[i + 1] - k) // s + 1
        for i, (k, s) in enumerate(zip(kernel, strides, strict=True))
    ]
    settings = {
        "padding": kind, "strideH": strides[0], "strideW": strides[1], "filterHeight": kernel[0], "filterWidth": kernel[1],
        "fusedActivationFunction": end.activation,
    }  # fmt: skip
    made = c.op(
        code,
        [x],
        (x.shape[0], *rows, x.shape[3]),
        settings=("Pool2DOptions", settings),
        grid=x.grid,
        name=str(end.value.name),
    )
    store(c, end, made, "last")


def _same_grid(c: Context, source: ir.Value, end: End) -> Tensor | None:
    """The integers of ``source``, where what comes out shall be on their grid too."""
    q = c.integers(source, "last") if end.quantizer is not None else None
    if q is None or q.grid is None or end.quantizer is None or not q.grid.same(grid_of(end.quantizer)):
        return None
    return q


def _refuse_pool(node: ir.Node) -> str | None:
    if set(_picture(node, "dilations", [1, 1])) != {1}:
        return "LiteRT has no pools with gaps"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "LiteRT gives no indices of a pool"
    return _refuse_window(node)


@emits("MaxPool", refuse=_refuse_pool)
def _max_pool(c: Context, node: ir.Node) -> None:
    _pool(c, node, "MAX_POOL_2D")


@emits("AveragePool", refuse=_refuse_pool)
def _average_pool(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    kernel, strides = _picture(node, "kernel_shape", [1, 1]), _picture(node, "strides", [1, 1])
    area, counted = _area(source), node.attributes.get_int("count_include_pad", 0)
    given, same = _edges(node, area, (kernel[0], kernel[1]), (strides[0], strides[1]), (1, 1))
    pads = _beyond(node, area, (kernel[0], kernel[1]), (strides[0], strides[1]), given)
    if not any(pads) or (pads == same and not counted):
        _pool(c, node, "AVERAGE_POOL_2D")
        return
    # The kernel leaves out what SAME pads and counts what is padded before: the averages of other windows are made larger.
    x = _pad(c, c.get(source, "last"), pads)
    rows = [(x.shape[i + 1] - k) // s + 1 for i, (k, s) in enumerate(zip(kernel, strides, strict=True))]
    settings = {
        "padding": Padding.VALID, "strideH": strides[0], "strideW": strides[1], "filterHeight": kernel[0], "filterWidth": kernel[1],
    }  # fmt: skip
    shape = (x.shape[0], *rows, x.shape[3])
    made = c.op("AVERAGE_POOL_2D", [x], shape, settings=("Pool2DOptions", settings))
    if not counted or pads != given:
        # From where to where elements count: those of the picture, or of its pads as well.
        before, after = (given[:2], given[2:]) if counted else ([0, 0], [0, 0])
        shares = [
            [k / (min(i * s - p + k, n + e) - max(i * s - p, -b)) for i in range(r)]
            for k, s, p, n, b, e, r in zip(kernel, strides, given, area, before, after, rows, strict=False)
        ]
        larger = np.multiply.outer(*shares)[None, :, :, None].astype(np.float32)
        made = c.op("MUL", [made, c.graph.constant(larger)], shape, settings=("MulOptions", {}))
    c.put(node.outputs[0], made, "last")


@emits("GlobalMaxPool", refuse=_refuse_window)
def _largest(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x, settings = c.get(source, "last"), ("ReducerOptions", {"keepDims": True})
    shape = (x.shape[0], 1, 1, x.shape[3])
    c.put(node.outputs[0], c.op("REDUCE_MAX", [x, c.vector([1, 2])], shape, settings=settings), "last")


@emits("GlobalAveragePool", refuse=_refuse_window)
def _global(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    end = c.end(node, activations=False)
    q = c.integers(source, "last") if end.quantizer is not None else None
    x = q if q is not None else c.get(source, "last")
    grid = grid_of(end.quantizer) if q is not None and end.quantizer is not None else None
    made = c.op(
        "MEAN", [x, c.vector([1, 2])], (x.shape[0], 1, 1, x.shape[3]), settings=("ReducerOptions", {"keepDims": True}),
        grid=grid, name=str(end.value.name),
    )  # fmt: skip
    store(c, end, made, "last")


def _refuse_transpose(node: ir.Node) -> str | None:
    if rank(node.inputs[0]) not in (3, 4) or (
        constant(node.inputs[1]) is None and stored(node.inputs[1]) is None
    ):
        return "LiteRT transposes convolutions over one or two axes with constant weights alone"
    return None


def _before(node: ir.Node, area: Sequence[int], reach: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Rows and columns that are cut off ahead of what a transposed convolution gives without pads."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic == "VALID":
        return [0, 0]
    if automatic == "NOTSET" and not ints(node, "output_shape"):
        return _picture(node, "pads", [0] * 4)[:2]
    outs, more = _area(node.outputs[0]), _picture(node, "output_padding", [0, 0])
    cut = [
        max(0, s * (n - 1) + m + r - o)
        for n, s, m, r, o in zip(area, strides, more, reach, outs, strict=True)
    ]
    return [t // 2 if automatic == "SAME_UPPER" else t - t // 2 for t in cut]


@emits("ConvTranspose", refuse=_refuse_transpose)
def _conv_transpose(c: Context, node: ir.Node) -> None:
    source, weights = node.inputs[0], node.inputs[1]
    assert source is not None and weights is not None
    array, x = _filled(floats_of(weights)), c.get(source, "last")
    strides, dilations = _picture(node, "strides", [1, 1]), _picture(node, "dilations", [1, 1])
    groups = node.attributes.get_int("group", 1)
    reach = [(k - 1) * d + 1 for k, d in zip(array.shape[2:], dilations, strict=True)]
    spread = np.zeros((*array.shape[:2], *reach), array.dtype)
    spread[:, :, :: dilations[0], :: dilations[1]] = array
    each, ins = array.shape[1], array.shape[0] // groups
    rows = [(x.shape[i + 1] - 1) * s + r for i, (s, r) in enumerate(zip(strides, reach, strict=True))]
    outs, before = _area(node.outputs[0]), _before(node, x.shape[1:3], reach, strides)
    inside = [min(n - b, o) for n, b, o in zip(rows, before, outs, strict=True)]
    # Beyond what the products reach there is nothing but the bias, which then is added at the end.
    wider = inside != outs
    bias = _float_bias(c, node, each * groups)
    settings = {"padding": Padding.VALID, "strideH": strides[0], "strideW": strides[1]}
    parts = []
    for g in range(groups):
        some = x if groups == 1 else _channels(c, x, g * ins, ins)
        w = c.weights(np.transpose(spread[g * ins : (g + 1) * ins], (1, 2, 3, 0)), str(weights.name))
        placed = (x.shape[0], *rows, each)
        inputs = [c.vector(placed), w, some, *([bias] if groups == 1 and not wider else [])]
        parts.append(c.op("TRANSPOSE_CONV", inputs, placed, np.float32, ("TransposeConvOptions", settings)))
    made = parts[0]
    if groups > 1:
        shape = (*made.shape[:3], each * groups)
        made = c.op("CONCATENATION", parts, shape, settings=("ConcatenationOptions", {"axis": 3}))
    if any(before) or inside != rows:
        begin, sizes = [0, *before, 0], [made.shape[0], *inside, made.shape[3]]
        made = c.op("SLICE", [made, c.vector(begin), c.vector(sizes)], sizes, settings=("SliceOptions", {}))
    made = _pad(c, made, [0, 0, outs[0] - inside[0], outs[1] - inside[1]])
    if groups > 1 or wider:
        made = c.op("ADD", [made, bias], made.shape, settings=("AddOptions", {}))
    c.put(node.outputs[0], made, "last")


def _channels(c: Context, x: Tensor, first: int, count: int) -> Tensor:
    """Some channels of a picture."""
    sizes = (*x.shape[:3], count)
    return c.op(
        "SLICE", [x, c.vector((0, 0, 0, first)), c.vector(sizes)], sizes, settings=("SliceOptions", {})
    )
