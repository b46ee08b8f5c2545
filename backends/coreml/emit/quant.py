"""Quantized tensors, and weights in the compressed forms that Core ML keeps in the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, cast, emits, is_float, name_of, narrow, refused
from optkit.backends.coreml.emit.compressed import affine, palettized, scaled, sparse, uncompressed
from optkit.backends.coreml.quiet import mb
from optkit.graph import constant

_EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)
_FOUR = (ir.DataType.INT4, ir.DataType.UINT4)


def is_weight(c: Context, node: ir.Node, index: int) -> bool:
    """Whether an input is a constant, compressed or not."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is not None and (value in c.quantized or constant(value) is not None)


def weight(c: Context, node: ir.Node, index: int, *, transposed: bool = False) -> Any:
    """The variable of an input with weights; constants in the smallest form that holds exactly their values.

    Args:
        transposed: Whether the last two axes trade places; of constants alone.
    """
    value = node.inputs[index]
    assert value is not None
    key = (value, transposed)
    if key in c.weights:
        return c.weights[key]
    if value in c.quantized:
        if not transposed:
            return dense(c, value)
        c.weights[key] = _stored(c, c.quantized[value], True)
        return c.weights[key]
    array = constant(value)
    if array is None:
        return c[value]
    if not transposed and value in c.variables:
        return c.variables[value]
    array = narrow(array, f"the constant {value.name!r}")
    array = np.ascontiguousarray(np.swapaxes(array, -1, -2)) if transposed else array
    found = sparse(c.version, array) if array.dtype.kind == "f" else None
    c.weights[key] = uncompressed(array) if found is None else found
    return c.weights[key]


def dense(c: Context, value: ir.Value) -> Any:
    """The variable of a compressed constant in its own layout."""
    key = (value, False)
    if key not in c.weights:
        c.weights[key] = _stored(c, c.quantized[value], False)
    return c.weights[key]


def _floats(node: ir.Node) -> type[np.floating[Any]]:
    """The type of the floats that come out."""
    return np.float16 if node.outputs[0].dtype == ir.DataType.FLOAT16 else np.float32


def _kind(node: ir.Node) -> ir.DataType | None:
    """Of the first input."""
    value = node.inputs[0]
    return None if value is None else value.dtype


def stored_constant(node: ir.Node) -> bool:
    """Whether a node gives the same floats each time, out of a smaller form: a dequantized constant, or a palette.

    A palette may have a factor for each index of one axis.
    """
    if node.op_type == "Mul":
        entries, scale = _entries(node), constant(node.inputs[1])
        return (
            entries is not None
            and scale is not None
            and scale.ndim == constant(entries.inputs[1]).ndim  # type: ignore[union-attr]
            and sum(n > 1 for n in scale.shape) <= 1
        )
    if node.op_type == "DequantizeLinear":
        inputs = [constant(v) for v in node.inputs if v is not None]
        return all(a is not None for a in inputs) and _kind(node) in (*_EIGHT, *_FOUR)
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    table, indices = constant(node.inputs[0]), constant(node.inputs[1])
    if table is None or indices is None or table.dtype.kind != "f" or indices.ndim < 2:
        return False
    # A palette has few entries, and is read at every place of a weight.
    return table.ndim == 1 and table.size <= 1 << 17 and bool(indices.min() >= 0)


def _entries(node: ir.Node) -> ir.Node | None:
    """The palette that a product scales."""
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    return (
        producer
        if producer is not None and producer.op_type == "Gather" and stored_constant(producer)
        else None
    )


def _stored(c: Context, node: ir.Node, transposed: bool) -> Any:
    if node.op_type == "Mul":
        entries, scale = _entries(node), constant(node.inputs[1])
        assert entries is not None and scale is not None
        scale = np.swapaxes(scale, -1, -2) if transposed else scale
        return scaled(c.version, _stored(c, entries, transposed), np.ascontiguousarray(scale, _floats(node)))
    if node.op_type == "Gather":
        table, indices = constant(node.inputs[0]), constant(node.inputs[1])
        assert table is not None and indices is not None
        indices = np.swapaxes(indices, -1, -2) if transposed else indices
        return palettized(c.version, np.ascontiguousarray(indices), narrow(table, "a palette"))
    return _affine(c, node, (lambda a: np.swapaxes(a, -1, -2)) if transposed else np.asarray)


def rows(c: Context, node: ir.Node, index: int, first: int, order: np.ndarray, kind: Any) -> Any:
    """Of constant weights ``[D, rows, columns]``, compressed or of ``kind``, entry ``first`` with its rows in ``order``."""

    def taken(array: np.ndarray) -> np.ndarray:
        # Scales and zero points may have one entry for all.
        part: np.ndarray = array[first if len(array) > 1 else 0]
        return part[order] if len(part) > 1 else part

    value = node.inputs[index]
    assert value is not None
    if value in c.quantized:
        return _affine(c, c.quantized[value], taken)
    array = constant(value)
    assert array is not None
    return np.ascontiguousarray(taken(array).astype(kind))


def _affine(c: Context, node: ir.Node, arranged: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A dequantized constant, its integers, scales and zero points ``arranged``."""
    integers, scale = constant(node.inputs[0]), constant(node.inputs[1])
    assert integers is not None and scale is not None
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    bits = 4 if _kind(node) in _FOUR else 8
    kind = np.int8 if _kind(node) in (ir.DataType.INT8, ir.DataType.INT4) else np.uint8
    integers = np.asarray(integers).astype(kind)
    scale, zero = _aligned(node, integers, scale, zero)
    integers, scale = (np.ascontiguousarray(arranged(a)) for a in (integers, scale))
    zero = None if zero is None else np.ascontiguousarray(arranged(zero))
    try:
        return affine(c.version, integers, scale.astype(_floats(node)), zero, bits)
    except ValueError as error:
        raise refused(node, str(error)) from error


def _aligned(
    node: ir.Node, integers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale and zero point with the rank of the integers; along a blocked axis one entry for each block."""
    if scale.ndim <= 1 and integers.ndim != scale.ndim:
        shape = [1] * integers.ndim
        if scale.size > 1:
            shape[node.attributes.get_int("axis", 1)] = scale.size
    elif scale.ndim <= 1 and scale.size == 1:
        shape = [1] * integers.ndim
    else:
        scale, zero = _even(node, integers, scale), None if zero is None else _even(node, integers, zero)
        shape = list(scale.shape)
    if zero is not None:
        zero = np.asarray(zero).astype(integers.dtype).reshape(shape)
        zero = zero if zero.any() else None
    return scale.reshape(shape), zero


def _even(node: ir.Node, integers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One for each block, of blocks that divide the axis: smaller ones where the last block is not full."""
    block, axis = node.attributes.get_int("block_size", 0), node.attributes.get_int("axis", 1)
    size = integers.shape[axis]
    if not block or size % block == 0:
        return values
    part = math.gcd(size, block)
    return np.repeat(values, block // part, axis).take(np.arange(size // part), axis)


def _refuse_quantize(node: ir.Node) -> str | None:
    if any(constant(v) is None for v in node.inputs[1:] if v is not None):
        return "Core ML needs scales and zero points when it is compiled"
    kind = node.outputs[0].dtype if node.op_type == "QuantizeLinear" else node.inputs[0].dtype  # type: ignore[union-attr]
    held = node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None
    if held and kind in (*_FOUR, ir.DataType.INT32, *_EIGHT):
        return None
    if kind not in _EIGHT:
        return f"Core ML quantizes activations to 8 bits, not to {kind.name.lower() if kind else '?'}"
    return (
        "Core ML quantizes activations per tensor or channel"
        if node.attributes.get_int("block_size", 0)
        else None
    )


def _parameters(c: Context, node: ir.Node, x: Any) -> dict[str, Any]:
    scale, zero = c.known(node, 1), c.known(node, 2)
    assert scale is not None
    # In float32, as ``_quantize`` and ``_dequantize`` see to; coremltools casts what computes in float16.
    single = scale.size == 1
    found: dict[str, Any] = {
        "input": x, "scale": np.float32(scale.reshape(())) if single else np.ascontiguousarray(scale, np.float32)
    }  # fmt: skip
    if zero is not None and zero.any():
        found["zero_point"] = zero.reshape(())[()] if single else zero
    if not single:
        found["axis"] = node.attributes.get_int("axis", 1)
    return found


@emits("QuantizeLinear", refuse=_refuse_quantize, oldest=17)
def _quantize(c: Context, node: ir.Node) -> Any:
    kind = "int8" if node.outputs[0].dtype == ir.DataType.INT8 else "uint8"
    return mb.quantize(output_dtype=kind, **_parameters(c, node, cast(c.input(node, 0), "fp32")))


@emits("DequantizeLinear", refuse=_refuse_quantize)
def _dequantize(c: Context, node: ir.Node) -> Any:
    held = constant(node.inputs[0])
    if held is None:
        x = c.input(node, 0)
        if name_of(x) == "int32":  # As which inputs of 8 bits are passed.
            x = cast(x, "int8" if _kind(node) == ir.DataType.INT8 else "uint8")
        found = mb.dequantize(**_parameters(c, node, x))
        return cast(found, "fp16") if _floats(node) is np.float16 else found
    # An int32 bias.
    scale = np.asarray(constant(node.inputs[1]), np.float64)
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    scale, zero = _aligned(node, held, scale, None if zero is None else np.asarray(zero))
    floats = (held.astype(np.float64) - (0 if zero is None else zero)) * scale
    return mb.const(val=floats.astype(_floats(node)))


def gathered(c: Context, node: ir.Node) -> Any | None:
    """A table of embeddings, of which rows are read: stored like weights. None where it is not a constant table."""
    value = node.inputs[0]
    if value is None or (value not in c.quantized and (constant(value) is None or constant(value).ndim < 2)):  # type: ignore[union-attr]
        return None
    found = weight(c, node, 0)
    return found if is_float(found) else None
