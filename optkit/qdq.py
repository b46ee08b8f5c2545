"""Scale arithmetic, and the Q/DQ pairs that carry it in the graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from optkit.formats import Format
from optkit.graph import initializer, users

# Rows of a weight that are in float64 or int8 at a time while it is quantized: bounds the temporary memory.
_BLOCK = 1 << 22


def scale_zero(
    low: np.ndarray | float, high: np.ndarray | float, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point that let ``fmt`` hold ``[low, high]``, 0 included exactly.

    ``scale = (high - low) / steps`` and ``zero = round(fmt.low - low / scale)``; for symmetric formats
    ``scale = max(|low|, |high|) / fmt.high`` and ``zero = 0`` (Jacob et al. 2018, arXiv:1712.05877, eq. 1, with rounding
    to even). A range of one point gets scale 1.

    Args:
        low: Smallest values, ``[]`` or ``[C]``.
        high: Largest values, same shape.

    Returns:
        ``scale`` (float32) and ``zero`` (storage type of ``fmt``), both shaped like ``low``.
    """
    low, high = np.minimum(np.asarray(low, np.float64), 0.0), np.maximum(np.asarray(high, np.float64), 0.0)
    if fmt.symmetric:
        scale = np.maximum(-low, high) / fmt.high
        scale = np.asarray(np.where(scale > 0, scale, 1.0), np.float32)
        return scale, np.zeros(scale.shape, fmt.dtype.numpy())
    scale = (high - low) / fmt.steps
    scale = np.where(scale > 0, scale, 1.0)
    zero = np.clip(np.round(fmt.low - low / scale), fmt.low, fmt.high)
    return np.asarray(scale, np.float32), np.asarray(zero, fmt.dtype.numpy())


def _along(vector: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    if axis is None or vector.ndim == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def quantize(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray, fmt: Format, axis: int | None = None
) -> np.ndarray:
    """Round ``x`` to the grid of ``fmt``; ties go to even, as in ONNX QuantizeLinear.

    Args:
        x: Any shape, float.
        scale: ``[]`` per tensor, ``[C]`` per channel with ``C = x.shape[axis]``; positive.
        zero: Same shape as ``scale``.
    """
    steps = np.round(x / _along(scale, axis, x.ndim)) + _along(zero, axis, x.ndim).astype(np.float32)
    return np.clip(steps, fmt.low, fmt.high).astype(fmt.dtype.numpy())


def dequantize(q: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int | None = None) -> np.ndarray:
    """``(q - zero) * scale`` in float32, as in ONNX DequantizeLinear."""
    return (q.astype(np.float32) - _along(zero, axis, q.ndim).astype(np.float32)) * _along(
        scale, axis, q.ndim
    )


def _blocks(array: np.ndarray) -> Iterable[slice]:
    rows = max(1, _BLOCK // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        yield slice(start, start + rows)


def weight_range(weight: np.ndarray, axis: int | None) -> np.ndarray:
    """``max |w|`` of a tensor (``[]``) or of each channel along ``axis`` (``[C]``), a block of rows at a time."""
    if weight.size == 0 or weight.ndim == 0:
        return np.abs(np.asarray(weight, np.float32)).max(initial=0.0)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    parts = [
        np.abs(np.asarray(weight[block], np.float32)).max(axis=None if axis is None else others)
        for block in _blocks(weight)
    ]
    if axis == 0:
        return np.concatenate(parts)
    return np.max(np.stack(parts), axis=0)


def quantized_tensor(
    source: ir.TensorProtocol, scale: np.ndarray, zero: np.ndarray, fmt: Format, axis: int | None, name: str
) -> ir.TensorProtocol:
    """``source`` on the grid of ``fmt``, computed when it is written and not kept: one weight is in memory at a time."""

    def compute() -> ir.Tensor:
        weight = source.numpy()
        if weight.ndim == 0:
            return ir.Tensor(quantize(np.asarray(weight, np.float32), scale, zero, fmt), dtype=fmt.dtype)
        out = np.empty(weight.shape, fmt.dtype.numpy())
        for block in _blocks(weight):
            part = (scale[block], zero[block]) if axis == 0 and scale.ndim else (scale, zero)
            out[block] = quantize(np.asarray(weight[block], np.float32), *part, fmt, axis)
        return ir.Tensor(out, dtype=fmt.dtype)

    return ir.LazyTensor(compute, dtype=fmt.dtype, shape=ir.Shape(source.shape), name=name)


def dequantize_constant(
    node: ir.Node,
    index: int,
    tensor: ir.TensorProtocol,
    scale: np.ndarray,
    zero: np.ndarray,
    axis: int | None,
    name: str,
) -> None:
    """Let input ``index`` of ``node`` read ``tensor`` (integers) through a DequantizeLinear in front of ``node``."""
    graph = node.graph
    assert graph is not None and node.inputs[index] is not None
    old = node.inputs[index]
    assert old is not None
    q = initializer(graph, f"{name}/q", tensor)
    s, z = initializer(graph, f"{name}/scale", scale), initializer(graph, f"{name}/zero", zero)
    attributes = {"axis": axis} if axis is not None and scale.ndim else {}
    dq = ir.node("DequantizeLinear", [q, s, z], attributes=attributes, name=f"{name}/DequantizeLinear")
    _typed(dq.outputs[0], f"{name}/dq", ir.DataType.FLOAT, old.shape)
    node.prepend(dq)
    node.replace_input_with(index, dq.outputs[0])


def insert_pair(
    value: ir.Value,
    readers: Iterable[tuple[ir.Node, int]],
    scale: np.ndarray,
    zero: np.ndarray,
    fmt: Format,
    *,
    outputs: bool,
) -> None:
    """Put Quantize and Dequantize behind ``value``; ``readers`` (node, input index) read the result.

    Args:
        outputs: Whether outputs of the graph read it too; the name of the output stays.
    """
    name = str(value.name)
    readers = tuple(readers)
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    assert isinstance(graph, ir.Graph)
    is_output = outputs and value.is_graph_output()
    if is_output:
        value.name = f"{name}/float"
    s, z = initializer(graph, f"{name}/scale", scale), initializer(graph, f"{name}/zero", zero)
    q = ir.node("QuantizeLinear", [value, s, z], name=f"{name}/QuantizeLinear")
    dq = ir.node("DequantizeLinear", [q.outputs[0], s, z], name=f"{name}/DequantizeLinear")
    _typed(q.outputs[0], f"{name}/quantized", fmt.dtype, value.shape)
    _typed(dq.outputs[0], name if is_output else f"{name}/dequantized", ir.DataType.FLOAT, value.shape)
    if producer is not None:
        producer.append([q, dq])
    else:
        graph.insert_before(graph[0], [q, dq])
    for node, index in readers:
        node.replace_input_with(index, dq.outputs[0])
    if is_output:
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = dq.outputs[0]


def _typed(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape


def is_quantized(value: ir.Value | None) -> bool:
    """Whether a value comes out of a DequantizeLinear or goes into a QuantizeLinear alone."""
    if value is None:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return True
    readers = users(value)
    return bool(readers) and all(r.op_type == "QuantizeLinear" for r in readers)
