"""Quantized values, and constants in compressed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.blobs import unpack
from optkit.backends.coreml.reference.ops.elementwise import along
from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray


@operation("quantize")
def quantize(input: Array, scale: Any, output_dtype: str, zero_point: Any = 0, axis: int = 0) -> Array:
    """``round(input / scale) + zero_point`` in 8 bits."""
    steps = np.rint(input / along(np.asarray(scale, np.float32), input, axis))
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    return np.clip(steps + along(np.asarray(zero_point, np.float32), input, axis), low, high)


@operation("dequantize")
def dequantize(input: Array, scale: Any, zero_point: Any = 0, axis: int = 0) -> Array:
    """``(input - zero_point) * scale``."""
    steps = input.astype(np.float32) - along(np.asarray(zero_point, np.float32), input, axis)
    return steps * along(np.asarray(scale, np.float32), input, axis)


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
    """One entry a block, repeated over its block."""
    for axis, size in enumerate(shape):
        if values.shape[axis] not in (1, size):
            values = np.repeat(values, size // values.shape[axis], axis)
    return values


def _blockwise(data: Array, scale: Array, offset: Array | None) -> Array:
    values = data.astype(np.float32)
    if offset is not None:
        values -= _spread(offset.astype(np.float32), data.shape)
    values *= _spread(scale.astype(np.float32), data.shape)
    return values


@operation("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """``scale * (data - offset)``, one of each a block."""
    return _blockwise(data, scale, offset)


@operation("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: Array, zero_point: Any, scale: Any, axis: int) -> Array:
    """``scale * (data - zero_point)``, one of each, or one a channel."""
    data = quantized_data.astype(np.float32)
    data -= along(np.asarray(zero_point, np.float32), data, axis)
    data *= along(np.asarray(scale, np.float32), data, axis)
    return data


@operation("constexpr_cast")
def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    """float16 as float32."""
    return source_val


def _looked_up(indices: Array, lut: Array, vector_axis: int | None) -> Array:
    """Tables ``[*groups, entries, vector]``; each block of the indices has its own."""
    rank = indices.ndim
    groups = lut.shape[:rank]
    flat = lut.reshape(math.prod(groups), *lut.shape[rank:])
    which = np.zeros(indices.shape, np.intp)
    for axis, count in enumerate(groups):
        shape = [1] * rank
        shape[axis] = -1
        block = np.repeat(np.arange(count), indices.shape[axis] // count).reshape(shape)
        which = which * count + block
    found = flat[which, indices]
    if lut.shape[-1] == 1:
        return found[..., 0]
    assert vector_axis is not None
    axis = vector_axis % rank
    moved = np.moveaxis(found, -1, axis + 1)
    return moved.reshape([n * lut.shape[-1] if i == axis else n for i, n in enumerate(indices.shape)])


@operation("constexpr_lut_to_dense")
def lut_to_dense(
    indices: Array, lut: Array, vector_axis: int | None = None, shape: Array | None = None
) -> Array:
    """Entries of a table; with a shape, indices are packed into bytes (iOS 16)."""
    if shape is None:
        return _looked_up(indices, lut, vector_axis)
    sizes = [int(n) for n in shape]
    bits = int(lut.size).bit_length() - 1
    return lut.reshape(-1)[unpack(indices, math.prod(sizes), bits, signed=False)].reshape(sizes)


def _dense(kept: Array, mask: Array) -> Array:
    out = np.zeros(mask.shape, kept.dtype)
    out[mask] = kept
    return out


@operation("constexpr_sparse_to_dense")
def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Values where the mask is set, else 0; with a shape, the mask is packed into bytes (iOS 16)."""
    if shape is None:
        return _dense(nonzero_data, mask.astype(np.bool_))
    sizes = [int(n) for n in shape]
    bits = unpack(mask, math.prod(sizes), 1, signed=False).astype(np.bool_).reshape(sizes)
    return _dense(nonzero_data, bits)


@operation("constexpr_lut_to_sparse")
def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: int | None = None
) -> list[Array]:
    """Entries of a table where the mask is set."""
    mask = indices_mask.astype(np.bool_)
    dense = _looked_up(_dense(indices_nonzero_data, mask), lut, vector_axis)
    if lut.shape[-1] != 1:
        assert vector_axis is not None
        mask = np.repeat(mask, lut.shape[-1], vector_axis)
    return [mask, dense[mask]]


@operation("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> list[Array]:
    """As the dense form, where the mask is set."""
    mask = data_mask.astype(np.bool_)
    return [data_mask, _blockwise(_dense(nonzero_data, mask), scale, offset)[mask]]
