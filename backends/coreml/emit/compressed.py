"""Constants in Core ML's compressed forms. Each holds exactly the values that it was given.

The operations are those of "Optimize Models" in coremltools' guide: ``constexpr_affine_dequantize`` and the packed tables
of iOS 16, and the block-wise, sub-byte and joint forms of iOS 18.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optkit.backends.coreml.quiet import mb, types

# A bit mask costs one bit an element; below this share of zeros nothing worth it is saved.
_ZEROS = 0.3
# Smaller constants stay as they are: they are read at once and cost nothing.
_SMALL = 1024
# Bits of the indices into a palette that the file format has.
_INDEX_BITS = {16: (1, 2, 4, 6, 8), 18: (1, 2, 3, 4, 6, 8)}


def uncompressed(array: np.ndarray) -> Any:
    """A plain constant."""
    return mb.const(val=array)


def _unsigned(array: np.ndarray, bits: int) -> np.ndarray:
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
    return np.asarray(array).astype(kind)


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian bit fields, the first in the lowest bits of the first byte."""
    flat = np.asarray(values, np.uint8).reshape(-1)
    spread = np.unpackbits(flat[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(spread.reshape(-1), bitorder="little")


def _is_sparse(zero: np.ndarray) -> bool:
    return zero.size >= _SMALL and zero.mean() >= _ZEROS


def sparse(version: int, array: np.ndarray) -> Any | None:
    """Values that are not zero and a bit mask; None where that is not smaller."""
    zero = array == 0
    if not _is_sparse(zero):
        return None
    kept = np.ascontiguousarray(array[~zero])
    if not kept.size:
        return None
    if version >= 18:
        return mb.constexpr_sparse_to_dense(nonzero_data=kept, mask=_unsigned(~zero, 1))
    return mb.constexpr_sparse_to_dense(
        nonzero_data=kept, mask=_packed(~zero, 1), shape=np.asarray(array.shape, np.uint32)
    )


def affine(version: int, integers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> Any:
    """``(integers - zero) * scale``.

    Args:
        version: Major version of iOS.
        integers: int8 or uint8, also where they have 4 bits.
        scale: Of the rank of ``integers``; each axis divides that of ``integers``.
        zero: Shaped like ``scale``, of the type of ``integers``; None for 0.
        bits: 8 or 4.

    Raises:
        ValueError: The version has no form for these scales or bits.
    """
    if version < 18:
        along = [i for i, n in enumerate(scale.shape) if n > 1]
        if bits != 8:
            raise ValueError("weights of 4 bits need iOS 18")
        if len(along) > 1 or any(scale.shape[i] != integers.shape[i] for i in along):
            raise ValueError("scales for blocks of weights need iOS 18")
        axis = along[0] if along else 0
        flat = scale.reshape(-1) if along else scale.reshape(())[()]
        offset = np.zeros_like(flat, integers.dtype) if zero is None else zero.reshape(np.shape(flat))
        return mb.constexpr_affine_dequantize(
            quantized_data=integers,
            zero_point=offset if along else integers.dtype.type(offset),
            scale=flat,
            axis=axis,
        )
    if any(n % s for n, s in zip(integers.shape, scale.shape, strict=True)):
        raise ValueError(f"scales {list(scale.shape)} do not divide weights {list(integers.shape)}")
    name = ("int" if integers.dtype == np.int8 else "uint") + str(bits)
    kind = types.nptype_from_builtin(types.string_to_builtin(name))
    given: dict[str, Any] = {"scale": scale}
    if zero is not None:
        given["offset"] = zero.astype(kind)
    empty = integers == (0 if zero is None else _spread(zero, integers.shape))
    if _is_sparse(empty) and not empty.all() and bits == 8:
        mask, kept = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=_unsigned(~empty, 1), nonzero_data=integers[~empty].astype(kind), **given
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=kept, mask=mask)
    return mb.constexpr_blockwise_shift_scale(data=integers.astype(kind), **given)


def _spread(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One entry a block, repeated over its block."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis)
    return values


def _split_by_group(indices: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Local indices, tables ``[groups, entries]`` and the axis, where runs of channels read a part of the table each."""
    for axis in range(indices.ndim):
        others = tuple(i for i in range(indices.ndim) if i != axis)
        low, high = indices.min(axis=others), indices.max(axis=others)
        for bits in (1, 2, 3, 4, 6, 8):
            size = 1 << bits
            groups = table.size // size
            if table.size % size or groups < 2 or indices.shape[axis] % groups:
                continue
            group = np.repeat(np.arange(groups), indices.shape[axis] // groups)
            if (low // size == group).all() and (high // size == group).all():
                shape = [1] * indices.ndim
                shape[axis] = -1
                return indices - (group * size).reshape(shape), table.reshape(groups, size), axis
    return None


def palettized(version: int, indices: np.ndarray, table: np.ndarray) -> Any:
    """``table[indices]``; one table, or one for each run of channels where the indices keep to parts of it.

    What the version has no form for is stored as it is.
    """
    allowed = _INDEX_BITS[18 if version >= 18 else 16]
    bits = next((b for b in allowed if table.size <= 1 << b), None)
    grouped = _split_by_group(indices, table) if version >= 18 else None
    if grouped is not None and int(grouped[1].shape[1]).bit_length() - 1 in allowed:
        local, tables, axis = grouped
        bits = int(tables.shape[1]).bit_length() - 1
        shape = [1] * indices.ndim
        shape[axis] = len(tables)
        lut = tables.reshape(*shape, tables.shape[1], 1)
        return mb.constexpr_lut_to_dense(indices=_unsigned(local, bits), lut=lut)
    if bits is None or indices.size < _SMALL:
        return uncompressed(np.ascontiguousarray(table[indices]))
    full = np.zeros(1 << bits, table.dtype)
    full[: table.size] = table
    if version < 18:
        return mb.constexpr_lut_to_dense(
            indices=_packed(indices, bits), lut=full, shape=np.asarray(indices.shape, np.uint32)
        )
    lut = full.reshape(*[1] * indices.ndim, full.size, 1)
    zero = table[indices] == 0
    if _is_sparse(zero) and not zero.all():
        mask, kept = mb.constexpr_lut_to_sparse(
            indices_mask=_unsigned(~zero, 1), indices_nonzero_data=_unsigned(indices[~zero], bits), lut=lut
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=kept, mask=mask)
    return mb.constexpr_lut_to_dense(indices=_unsigned(indices, bits), lut=lut)


def scaled(version: int, entries: Any, scale: np.ndarray) -> Any:
    """``entries * scale``, a factor for each index of one axis; before iOS 18, that has no form for it, a plain constant."""
    if version >= 18 and entries.op.op_type != "const":
        return mb.constexpr_blockwise_shift_scale(data=entries, scale=scale)
    op = entries.op
    dense = entries.val if op.op_type == "const" else op.materialized_val_inference()
    return uncompressed(np.ascontiguousarray(dense * scale))
