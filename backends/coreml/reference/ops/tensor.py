"""Operations that move values about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray


def _ints(values: Any) -> list[int]:
    return [int(v) for v in np.reshape(values, -1)]


@operation("shape")
def shape(x: Array) -> Array:
    """The sizes."""
    return np.asarray(x.shape, np.int32)


@operation("reshape")
def reshape(x: Array, shape: Array) -> Array:
    """To other sizes; 0 stands for the size that is there, -1 for what is left."""
    sizes = [x.shape[i] if n == 0 and x.size else n for i, n in enumerate(_ints(shape))]
    return np.reshape(x, sizes)


@operation("reshape_like")
def reshape_like(x: Array, ref_tensors: Any, begins: Any, ends: Any, end_masks: Any) -> Array:
    """To the sizes of parts of the shapes of other tensors."""
    sizes: list[int] = []
    for other, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += other.shape[int(begin) : None if mask else int(end)]
    return np.reshape(x, sizes)


@operation("transpose")
def transpose(x: Array, perm: Array) -> Array:
    """Axes in another order."""
    return np.transpose(x, [p % x.ndim for p in _ints(perm)])


@operation("expand_dims")
def expand_dims(x: Array, axes: Array) -> Array:
    """New axes of size 1, counted in the result."""
    return np.expand_dims(x, tuple(_ints(axes)))


@operation("squeeze")
def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without axes of size 1."""
    return np.squeeze(x, None if axes is None else tuple(_ints(axes)))


@operation("flatten2d")
def flatten2d(x: Array, axis: int = 1) -> Array:
    """Two axes: those before ``axis``, and the others."""
    axis = axis + x.ndim if axis < 0 else axis
    return np.reshape(x, (math.prod(x.shape[:axis]), -1))


@operation("concat")
def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    """One after the other, or taking turns."""
    if not interleave:
        return np.concatenate(values, axis)
    return np.stack(values, axis % values[0].ndim + 1).reshape(
        [n * len(values) if i == axis % values[0].ndim else n for i, n in enumerate(values[0].shape)]
    )


@operation("stack")
def stack(values: Sequence[Array], axis: int) -> Array:
    """Along a new axis."""
    return np.stack(values, axis)


@operation("split")
def split(
    x: Array, axis: int, num_splits: int | None = None, split_sizes: Array | None = None
) -> list[Array]:
    """Parts of given sizes, or of one size."""
    if split_sizes is None:
        assert num_splits is not None
        return np.split(x, num_splits, axis)
    return np.split(x, np.cumsum(_ints(split_sizes))[:-1], axis)


@operation("slice_by_index")
def slice_by_index(
    x: Array, begin: Array, end: Array, stride: Array | None = None, begin_mask: Array | None = None,
    end_mask: Array | None = None, squeeze_mask: Array | None = None,
) -> Array:  # fmt: skip
    """From ``begin`` to before ``end``; negative ones count from the end, masks stand for all there is."""
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def _slices(
    x: Array, begin: Array, end: Array, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[Any, ...]:
    begins, ends = _ints(begin), _ints(end)
    steps = [1] * len(begins) if stride is None else _ints(stride)
    none = [False] * len(begins)
    first, last, single = (
        none if m is None else [bool(v) for v in np.reshape(m, -1)]
        for m in (begin_mask, end_mask, squeeze_mask)
    )
    found: list[Any] = []
    for i, (b, e, s) in enumerate(zip(begins, ends, steps, strict=True)):
        found.append(b if single[i] else slice(None if first[i] else b, None if last[i] else e, s))
    return tuple(found)


@operation("slice_update")
def slice_update(
    x: Array, update: Array, begin: Array, end: Array, stride: Array | None = None, begin_mask: Array | None = None,
    end_mask: Array | None = None, squeeze_mask: Array | None = None,
) -> Array:  # fmt: skip
    """``x`` with a slice of it replaced."""
    out = np.array(x)
    out[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return out


@operation("slice_by_size")
def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """From ``begin`` on, ``size`` elements; -1 for all that follow."""
    return x[
        tuple(slice(b, None if n == -1 else b + n) for b, n in zip(_ints(begin), _ints(size), strict=True))
    ]


@operation("crop")
def crop(x: Array, crop_height: Array, crop_width: Array) -> Array:
    """Without so many rows and columns at the beginning and the end."""
    (top, bottom), (left, right) = _ints(crop_height), _ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@operation("pad")
def pad(x: Array, pad: Array, mode: str = "constant", constant_val: float = 0.0) -> Array:
    """Pads around the last axes, begin and end of each."""
    flat = _ints(pad)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    if mode == "constant":
        return np.pad(x, pairs, constant_values=x.dtype.type(constant_val))
    return np.pad(x, pairs, mode="reflect" if mode == "reflect" else "edge")


@operation("tile")
def tile(x: Array, reps: Array) -> Array:
    """Repeated along each axis."""
    return np.tile(x, _ints(reps))


@operation("fill")
def fill(shape: Array, value: Any = 0.0) -> Array:
    """One value everywhere."""
    return np.full(_ints(shape), value)


@operation("fill_like")
def fill_like(ref_tensor: Array, value: Any = 0.0) -> Array:
    """One value, in the sizes of another tensor."""
    return np.full(ref_tensor.shape, value)


@operation("range_1d")
def range_1d(end: Any, start: Any, step: Any) -> Array:
    """From ``start`` to before ``end``."""
    whole = all(isinstance(v, int) for v in (start, end, step))
    return np.arange(start, end, step, dtype=np.int32 if whole else np.float32)


@operation("one_hot")
def one_hot(
    indices: Array, one_hot_vector_size: int, axis: int = -1, on_value: Any = 1, off_value: Any = 0
) -> Array:
    """``on_value`` at the place along a new axis that the index names."""
    indices = np.asarray(indices)
    axis = axis % (indices.ndim + 1)
    hit = np.expand_dims(indices, axis) == np.arange(one_hot_vector_size).reshape(
        [-1 if i == axis else 1 for i in range(indices.ndim + 1)]
    )
    return np.where(hit, on_value, off_value)


@operation("non_zero")
def non_zero(x: Array) -> Array:
    """Places that are not 0, ``[n, rank]``."""
    return np.argwhere(x)


@operation("band_part")
def band_part(x: Array, lower: int = -1, upper: int = -1) -> Array:
    """The band around the diagonal of the last two axes; -1 keeps all."""
    rows, columns = np.indices(x.shape[-2:])
    keep = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    return np.where(keep, x, x.dtype.type(0))


@operation("reverse")
def reverse(x: Array, axes: Array | None = None) -> Array:
    """Backwards."""
    return np.flip(x, None if axes is None else tuple(_ints(axes)))


@operation("reverse_sequence")
def reverse_sequence(x: Array, lengths: Array, seq_axis: int = 0, batch_axis: int = 0) -> Array:
    """The first ``lengths[b]`` elements of each sequence backwards."""
    out = np.array(x)
    for index, length in enumerate(_ints(lengths)):
        where: list[Any] = [slice(None)] * x.ndim
        where[batch_axis], where[seq_axis] = index, slice(0, length)
        axis = seq_axis - (batch_axis < seq_axis)
        out[tuple(where)] = np.flip(x[tuple(where)], axis)
    return out


@operation("depth_to_space")
def depth_to_space(x: Array, block_size: int) -> Array:
    """Channels ``[block, block, c]`` become rows and columns."""
    n, c, h, w = x.shape
    x = x.reshape(n, block_size, block_size, c // block_size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block_size**2, h * block_size, w * block_size)


@operation("space_to_depth")
def space_to_depth(x: Array, block_size: int) -> Array:
    """Rows and columns become channels ``[block, block, c]``."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block_size**2, h // block_size, w // block_size)


@operation("pixel_shuffle")
def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    """Channels ``[c, up, up]`` become rows and columns."""
    n, c, h, w = x.shape
    up = upscale_factor
    return (
        x.reshape(n, c // up**2, up, up, h, w)
        .transpose(0, 1, 4, 2, 5, 3)
        .reshape(n, c // up**2, h * up, w * up)
    )


@operation("pixel_unshuffle")
def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    """Rows and columns become channels ``[c, down, down]``."""
    n, c, h, w = x.shape
    down = downscale_factor
    x = x.reshape(n, c, h // down, down, w // down, down).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * down**2, h // down, w // down)


@operation("space_to_batch")
def space_to_batch(x: Array, block_shape: Array, paddings: Array) -> Array:
    """Blocks of rows and columns become batches."""
    (bh, bw), pads = _ints(block_shape), np.reshape(paddings, (2, 2)).tolist()
    x = np.pad(x, [(0, 0), (0, 0), *map(tuple, pads)])
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // bh, bh, w // bw, bw).transpose(3, 5, 0, 1, 2, 4)
    return x.reshape(n * bh * bw, c, h // bh, w // bw)


@operation("batch_to_space")
def batch_to_space(x: Array, block_shape: Array, crops: Array) -> Array:
    """Batches become blocks of rows and columns."""
    (bh, bw), ((top, bottom), (left, right)) = _ints(block_shape), np.reshape(crops, (2, 2)).tolist()
    n, c, h, w = x.shape
    x = x.reshape(bh, bw, n // (bh * bw), c, h, w).transpose(2, 3, 4, 0, 5, 1)
    x = x.reshape(n // (bh * bw), c, h * bh, w * bw)
    return x[..., top : h * bh - bottom, left : w * bw - right]
