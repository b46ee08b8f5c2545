"""Grids of a graph: what scales and zero points say, in signed integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.flat import Grid
from optkit.graph import attribute, constant, rank

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


def grid_of(node: ir.Node) -> Grid:
    """The grid of a node, in signed integers."""
    found = _parameters(node)
    assert found is not None
    scale, zero, dtype = found
    along = node.attributes.get_int("axis", 1)
    axis = along % max(rank(node.inputs[0]) or 1, 1) if scale.size > 1 else 0
    shift = _SIGNED if dtype == np.uint8 else 0
    zeros = np.broadcast_to(zero.astype(np.int64) - shift, scale.shape)
    return Grid(scale=scale.reshape(-1).astype(np.float32), zero=zeros.reshape(-1), axis=axis)


def refusal(node: ir.Node) -> str | None:
    """Why LiteRT has no such grid, or None."""
    found = _parameters(node)
    if found is None:
        return "LiteRT needs constant scales and zero points"
    scale, zero, dtype = found
    if attribute(node, "block_size", 0):
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


def stored(value: ir.Value | None) -> tuple[np.ndarray, Grid] | None:
    """Integers and grid of a constant that is dequantized."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or refusal(node) is not None:
        return None
    array = constant(node.inputs[0])
    if array is None:
        return None
    if array.dtype == np.uint8:
        array = (array.astype(np.int16) - _SIGNED).astype(np.int8)
    return array, grid_of(node)


def floats_of(value: ir.Value) -> np.ndarray:
    """Elements of a constant, also of one that is dequantized."""
    array, kept = constant(value), stored(value)
    if array is not None:
        return array
    assert kept is not None
    return _floats(*kept)


def halved(array: np.ndarray) -> np.ndarray | None:
    """float32 in float16, where that loses nothing."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    return narrow if np.array_equal(narrow, array) else None


def _floats(array: np.ndarray, grid: Grid) -> np.ndarray:
    shape = [1] * array.ndim
    if grid.scale.size > 1:
        shape[grid.axis] = -1
    floats = (array.astype(np.float64) - grid.zero.reshape(shape)) * grid.scale.reshape(shape)
    return np.asarray(floats, np.float32)
