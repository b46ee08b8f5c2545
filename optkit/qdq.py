"""Scale arithmetic, and the Q/DQ pairs that carry it in the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optkit.formats import Format
from optkit.graph import users
from optkit.rewrite import Names, register

# Rows of a weight that are in float64 or int8 at a time while it is quantized: bounds the temporary memory.
_BLOCK = 1 << 22
# Ranges end here, so that the ends of the grid, which may lie half a step further out, are finite too: masks are
# often the largest float32.
_LARGEST = float(np.finfo(np.float32).max) * 255 / 256


def scale_zero(
    low: np.ndarray | float, high: np.ndarray | float, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point that let ``fmt`` hold ``[low, high]``, 0 included exactly.

    ``scale = (high - low) / steps`` and ``zero = round(fmt.low - low / scale)``; for symmetric formats
    ``scale = max(|low|, |high|) / fmt.high`` and ``zero = 0`` (Jacob et al. 2018, arXiv:1712.05877, eq. 1, with rounding
    to even). A range of one point gets scale 1. A scale is never below the smallest normal float32.

    Args:
        low: Smallest values, ``[]`` or ``[C]``; finite.
        high: Largest values, same shape.

    Returns:
        ``scale`` (float32) and ``zero`` (storage type of ``fmt``), both shaped like ``low``.
    """
    low = np.clip(np.asarray(low, np.float64), -_LARGEST, 0.0)
    high = np.clip(np.asarray(high, np.float64), 0.0, _LARGEST)
    wide = np.maximum(-low, high) if fmt.symmetric else high - low
    steps = fmt.high if fmt.symmetric else fmt.steps
    scale = (wide / steps).astype(np.float32)
    # Rounded down: ONNX Runtime drops a Clip in front of a Quantize only if the grid does not reach beyond its bound.
    scale = np.where(scale.astype(np.float64) * steps > wide, np.nextafter(scale, np.float32(0)), scale)
    scale = np.where(wide > 0, np.maximum(scale, np.finfo(np.float32).tiny), np.float32(1))
    if fmt.symmetric:
        return scale, np.zeros(scale.shape, fmt.dtype.numpy())
    zero = np.clip(np.round(fmt.low - low / scale.astype(np.float64)), fmt.low, fmt.high)
    return scale, np.asarray(zero, fmt.dtype.numpy())


def centred(low: float, high: float, fmt: Format, share: float) -> tuple[float, float]:
    """The range, or the least around it whose zero point is the middle of an unsigned ``fmt``, if that is wider by up to ``share``."""
    if fmt.symmetric or fmt.low != 0 or not -_LARGEST < low < 0 < high < _LARGEST:
        return low, high
    middle = (fmt.steps + 1) // 2
    step = max(-low / middle, high / (fmt.steps - middle))
    if step * fmt.steps > (1 + share) * (high - low):
        return low, high
    return -middle * step, (fmt.steps - middle) * step


def _along(vector: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    if axis is None or vector.ndim == 0:
        return vector
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def quantize(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray, fmt: Format, axis: int | None = None
) -> np.ndarray:
    """Round ``x`` to the grid of ``fmt``; ties go to even, and what is beyond it to its end, as in ONNX QuantizeLinear.

    Args:
        x: Any shape, float.
        scale: ``[]`` per tensor, ``[C]`` per channel with ``C = x.shape[axis]``; positive.
        zero: Same shape as ``scale``.
    """
    steps = x / _along(scale, axis, x.ndim)
    if fmt.integer:
        steps = np.round(steps) + _along(zero, axis, x.ndim).astype(np.float32)
    stored: np.ndarray = np.clip(steps, fmt.low, fmt.high).astype(fmt.dtype.numpy())
    return stored


def dequantize(q: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int | None = None) -> np.ndarray:
    """``(q - zero) * scale`` in float32, as in ONNX DequantizeLinear."""
    steps = q.astype(np.float32) - _along(zero, axis, q.ndim).astype(np.float32)
    x: np.ndarray = steps * _along(scale, axis, q.ndim)
    return x


def _blocks(array: np.ndarray) -> Iterable[slice]:
    rows = max(1, _BLOCK // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        yield slice(start, start + rows)


def weight_range(weight: np.ndarray, axis: int | None) -> np.ndarray:
    """``max |w|`` of a tensor (``[]``) or of each channel along ``axis`` (``[C]``), a block of rows at a time.

    Infinite where a weight is infinite, NaN where one is NaN.
    """
    if weight.size == 0 or weight.ndim == 0:
        shape = () if axis is None or weight.ndim == 0 else (weight.shape[axis],)
        return np.full(shape, np.abs(np.asarray(weight, np.float32)).max(initial=0.0), np.float32)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    parts = [
        np.abs(np.asarray(weight[block], np.float32)).max(axis=None if axis is None else others)
        for block in _blocks(weight)
    ]
    if axis == 0:
        return np.concatenate(parts)
    return np.asarray(np.max(np.stack(parts), axis=0))


def quantized_tensor(
    source: ir.TensorProtocol, scale: np.ndarray, zero: np.ndarray, fmt: Format, axis: int | None, name: str
) -> ir.TensorProtocol:
    """``source`` on the grid of ``fmt``, computed when it is written and not kept: one weight is in memory at a time."""

    def compute() -> ir.Tensor[np.ndarray]:
        weight = source.numpy()
        if weight.ndim == 0:
            return ir.Tensor(quantize(np.asarray(weight, np.float32), scale, zero, fmt), dtype=fmt.dtype)
        out = np.empty(weight.shape, fmt.dtype.numpy())
        for block in _blocks(weight):
            part = (scale[block], zero[block]) if axis == 0 and scale.ndim else (scale, zero)
            out[block] = quantize(np.asarray(weight[block], np.float32), *part, fmt, axis)
        return ir.Tensor(out, dtype=fmt.dtype)

    return ir.LazyTensor(compute, dtype=fmt.dtype, shape=ir.Shape(source.shape.numpy()), name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Integers in the graph, with what turns them into floats."""

    integers: ir.Value
    scale: ir.Value
    zero: ir.Value
    axis: int | None


def store(
    graph: ir.Graph,
    name: str,
    integers: np.ndarray | ir.TensorProtocol,
    scale: np.ndarray,
    zero: np.ndarray,
    axis: int | None,
    names: Names,
) -> Stored:
    """Add a quantized constant to ``graph``: ``<name>/q``, ``<name>/scale`` and ``<name>/zero``."""
    parts = ((integers, "q"), (scale, "scale"), (zero, "zero"))
    q, s, z = (register(graph, names.new(f"{name}/{end}"), part) for part, end in parts)
    return Stored(integers=q, scale=s, zero=z, axis=axis if scale.ndim else None)


def dequantize_constant(node: ir.Node, index: int, stored: Stored, name: str, names: Names) -> None:
    """Let input ``index`` of ``node`` read ``stored`` through a DequantizeLinear in front of ``node``."""
    old = node.inputs[index]
    assert old is not None
    attributes = {} if stored.axis is None else {"axis": stored.axis}
    inputs = [stored.integers, stored.scale, stored.zero]
    dq = ir.node(
        "DequantizeLinear", inputs, attributes=attributes, name=names.new(f"{name}/DequantizeLinear")
    )
    _typed(dq.outputs[0], names.new(f"{name}/dq"), ir.DataType.FLOAT, stored.integers.shape)
    dq.metadata_props.update(node.metadata_props)
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
    names: Names,
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
        value.name = names.new(f"{name}/float")
    s = register(graph, names.new(f"{name}/scale"), scale)
    z = register(graph, names.new(f"{name}/zero"), zero)
    q = ir.node("QuantizeLinear", [value, s, z], name=names.new(f"{name}/QuantizeLinear"))
    dq = ir.node("DequantizeLinear", [q.outputs[0], s, z], name=names.new(f"{name}/DequantizeLinear"))
    _typed(q.outputs[0], names.new(f"{name}/quantized"), fmt.dtype, value.shape)
    after = name if is_output else names.new(f"{name}/dequantized")
    _typed(dq.outputs[0], after, ir.DataType.FLOAT, value.shape)
    if producer is not None:
        for node in (q, dq):
            node.metadata_props.update(producer.metadata_props)
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
