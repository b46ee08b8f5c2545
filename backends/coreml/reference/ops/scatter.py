"""Reading and writing at places that are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray

_WRITE: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _places(indices: Any, size: int, validate: bool | None) -> Array:
    """Indices at or above 0; from iOS 17 on, whose operations have ``validate_indices``, negative ones are out of bounds."""
    found = np.asarray(indices).astype(np.intp)
    if validate is not None and found.size and found.min() < 0:
        raise IndexError(f"index {found.min()} is negative, and Core ML counts from the front alone")
    return np.where(found < 0, found + size, found)


@operation("gather")
def gather(
    x: Array, indices: Any, axis: int = 0, batch_dims: int = 0, validate_indices: bool | None = None
) -> Array:
    """Slices along an axis."""
    axis = axis % x.ndim
    places = _places(indices, x.shape[axis], validate_indices)
    if not batch_dims:
        return np.take(x, places, axis)
    batch = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    rows = places.reshape(-1, *places.shape[batch_dims:])
    found = np.stack([np.take(a, i, axis - batch_dims) for a, i in zip(flat, rows, strict=True)])
    return found.reshape(*batch, *found.shape[1:])


@operation("gather_along_axis")
def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool | None = None) -> Array:
    """One element for each index."""
    return np.take_along_axis(x, _places(indices, x.shape[axis], validate_indices), axis)


@operation("gather_nd")
def gather_nd(x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool | None = None) -> Array:
    """Slices at places given by all leading axes."""
    lead = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    rows = np.asarray(indices).reshape(-1, *indices.shape[batch_dims:])
    found = [a[_tuple(i, a.shape, validate_indices)] for a, i in zip(flat, rows, strict=True)]
    return np.stack(found).reshape(*lead, *found[0].shape)


def _tuple(indices: Array, shape: tuple[int, ...], validate: bool | None) -> tuple[Array, ...]:
    return tuple(_places(indices[..., i], shape[i], validate) for i in range(indices.shape[-1]))


def _write(out: Array, where: Any, updates: Array, mode: str) -> Array:
    if mode == "update":
        out[where] = updates
    else:
        _WRITE[mode].at(out, where, updates)
    return out


@operation("scatter")
def scatter(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", validate_indices: bool | None = None
) -> Array:  # fmt: skip
    """Slices along an axis are written."""
    out = np.array(data)
    axis = axis % data.ndim
    moved = np.moveaxis(out, axis, 0)
    places = _places(indices, data.shape[axis], validate_indices)
    lead = np.moveaxis(np.asarray(updates), tuple(range(axis, axis + places.ndim)), tuple(range(places.ndim)))
    _write(moved, places, lead, mode)
    return out


@operation("scatter_along_axis")
def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", validate_indices: bool | None = None
) -> Array:  # fmt: skip
    """One element for each index is written."""
    out = np.array(data)
    axis = axis % data.ndim
    grid: list[Any] = list(np.indices(indices.shape, sparse=True))
    grid[axis] = _places(indices, data.shape[axis], validate_indices)
    return _write(out, tuple(grid), updates, mode)


@operation("scatter_nd")
def scatter_nd(
    data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: bool | None = None
) -> Array:
    """Slices at places given by all leading axes are written."""
    out = np.array(data)
    return _write(out, _tuple(np.asarray(indices), data.shape, validate_indices), updates, mode)
