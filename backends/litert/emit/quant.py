"""Q/DQ pairs: integers on grids, from layer to layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, End, Layout, emits, integer
from optkit.backends.litert.flat import Grid, Tensor
from optkit.graph import constant, rank

_SIGNED = 128


def _parameters(node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.dtype[np.generic]] | None:
    """Scale, zero point and type of a Q or DQ node; None where they are not constant."""
    scale = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is not None:
        zero = constant(given)
        return None if scale is None or zero is None else (scale, zero, zero.dtype)
    value = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    kind = np.dtype(np.uint8) if value is None or value.dtype is None else value.dtype.numpy()
    return None if scale is None else (scale, np.zeros((), kind), kind)


def _grid(node: ir.Node) -> Grid:
    """The grid of a node, in signed integers."""
    found = _parameters(node)
    assert found is not None
    scale, zero, dtype = found
    axis = integer(node, "axis", 1) % max(rank(node.inputs[0]) or 1, 1) if scale.size > 1 else 0
    shift = _SIGNED if dtype == np.uint8 else 0
    zeros = np.broadcast_to(zero.astype(np.int64) - shift, scale.shape)
    return Grid(scale=scale.reshape(-1).astype(np.float32), zero=zeros.reshape(-1), axis=axis)


def _refuse(node: ir.Node) -> str | None:
    found = _parameters(node)
    if found is None:
        return "LiteRT needs constant scales and zero points"
    scale, zero, dtype = found
    if integer(node, "block_size"):
        return "LiteRT has no scales of blocks"
    if dtype not in (np.int8, np.uint8, np.int32):
        return f"LiteRT has no grids of {dtype.name}"
    if node.op_type == "QuantizeLinear" and scale.size > 1:
        return "LiteRT has activations with one scale alone"
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if (
        node.op_type == "DequantizeLinear"
        and constant(node.inputs[0]) is None
        and (source is None or source.op_type != "QuantizeLinear")
    ):
        return "LiteRT takes integers of a QuantizeLinear or constants alone"
    if scale.size > 1 and zero.any():
        return "LiteRT has no zero points of channels"
    return None


def grid_of(quantizer: ir.Node) -> Grid:
    """The grid that a QuantizeLinear puts its input on."""
    return _grid(quantizer)


def stored(value: ir.Value | None) -> tuple[np.ndarray, Grid] | None:
    """Integers and grid of a constant that is dequantized."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or _refuse(node) is not None:
        return None
    array = constant(node.inputs[0])
    if array is None:
        return None
    if array.dtype == np.uint8:
        array = (array.astype(np.int16) - _SIGNED).astype(np.int8)
    return array, _grid(node)


def store(c: Context, end: End, tensor: Tensor, layout: Layout) -> None:
    """What a kernel made: integers that the quantizer would give, or what it computes in."""
    if tensor.grid is not None and end.quantizer is not None:
        c.done.add(end.quantizer)
        c.put_integers(end.quantizer.outputs[0], tensor, layout)
    else:
        c.put(end.value, tensor, layout)


@emits("QuantizeLinear", refuse=_refuse)
def _quantize(c: Context, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    layout = c.layout(x, rows=True)
    found, grid = c.integers(x, layout), _grid(node)
    source = found if found is not None else c.get(x, layout)
    if found is not None and found.grid is not None and found.grid.same(grid):
        made = found
    else:
        made = c.op(
            "QUANTIZE",
            [source],
            source.shape,
            np.int8,
            ("QuantizeOptions", {}),
            grid=grid,
            name=str(node.outputs[0].name),
        )
    c.put_integers(node.outputs[0], made, layout)


@emits("DequantizeLinear", refuse=_refuse)
def _dequantize(c: Context, node: ir.Node) -> None:
    q, x = node.inputs[0], node.outputs[0]
    assert q is not None
    kept = stored(x)
    if kept is not None:
        array, grid = kept
        if array.dtype == np.int8:
            c.put_integers(x, c.graph.constant(array, str(q.name), grid))
        else:
            c.put(x, c.graph.constant(_floats(array, grid), str(x.name)))
        return
    layout = c.layout(q, rows=True)
    found = c.integers(q, layout)
    assert found is not None, "DequantizeLinear reads a QuantizeLinear"
    c.put_integers(x, found, layout)


def _floats(array: np.ndarray, grid: Grid) -> np.ndarray:
    shape = [1] * array.ndim
    if grid.scale.size > 1:
        shape[grid.axis] = -1
    floats = (array.astype(np.float64) - grid.zero.reshape(shape)) * grid.scale.reshape(shape)
    return np.asarray(floats, np.float32)
