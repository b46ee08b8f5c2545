"""Reductions, orders and running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.ops.table import OPERATIONS, operation

Array = np.ndarray


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    largest = x.max(axis, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, np.float32(0))
    total = np.log(np.exp(x - largest).sum(axis, keepdims=True)) + largest
    return total if keepdims else np.squeeze(total, axis)


def _exact(x: Array) -> Any:
    """In float64: NumPy adds up one after the other along all axes but the last."""
    return np.float64 if x.dtype.kind == "f" else x.dtype


_REDUCE: dict[str, Callable[..., Any]] = {
    "reduce_sum": lambda x, axis, keepdims: x.sum(axis, keepdims=keepdims, dtype=_exact(x)),
    "reduce_mean": lambda x, axis, keepdims: x.mean(axis, keepdims=keepdims, dtype=np.float64),
    "reduce_max": lambda x, axis, keepdims: x.max(axis, keepdims=keepdims),
    "reduce_min": lambda x, axis, keepdims: x.min(axis, keepdims=keepdims),
    "reduce_prod": lambda x, axis, keepdims: x.prod(axis, keepdims=keepdims, dtype=x.dtype),
    "reduce_l1_norm": lambda x, axis, keepdims: np.abs(x).sum(axis, keepdims=keepdims, dtype=_exact(x)),
    "reduce_l2_norm": lambda x, axis, keepdims: np.sqrt(
        np.square(x).sum(axis, keepdims=keepdims, dtype=_exact(x))
    ),
    "reduce_sum_square": lambda x, axis, keepdims: np.square(x).sum(axis, keepdims=keepdims, dtype=_exact(x)),
    "reduce_log_sum": lambda x, axis, keepdims: np.log(x.sum(axis, keepdims=keepdims)),
    "reduce_log_sum_exp": _log_sum_exp,
}


def _reduction(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Any:
        axis = None if axes is None else tuple(int(a) % x.ndim for a in np.reshape(axes, -1))
        if axis is None:
            axis = tuple(range(x.ndim))
        return function(x, axis, bool(keep_dims))

    return reduce


OPERATIONS.update({name: _reduction(function) for name, function in _REDUCE.items()})


@operation("reduce_argmax")
def reduce_argmax(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
    """Place of the first of the largest."""
    return np.argmax(x, axis, keepdims=keep_dims)


@operation("reduce_argmin")
def reduce_argmin(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
    """Place of the first of the smallest."""
    return np.argmin(x, axis, keepdims=keep_dims)


def _order(x: Array, axis: int, ascending: bool) -> Array:
    if ascending:
        return np.argsort(x, axis, kind="stable")
    # Stable from above: of the reversed, from behind.
    turned = np.argsort(np.flip(x, axis), axis, kind="stable")
    return np.flip(x.shape[axis] - 1 - turned, axis)


@operation("topk")
def topk(
    x: Array, k: int = 1, axis: int = -1, ascending: bool = False, sort: bool = True, return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:  # fmt: skip
    """The ``k`` largest, or smallest, and where they are; by place where they need not be sorted, which promises no order."""
    places = np.take(_order(x, axis, ascending), range(k), axis)
    if not sort:
        places = np.sort(places, axis)
    values = np.take_along_axis(x, places, axis)
    return [values, places] if return_indices else [values]


@operation("argsort")
def argsort(x: Array, axis: int = -1, ascending: bool = False) -> Array:
    """Places in order of their values."""
    return _order(x, axis, ascending)


@operation("cumsum")
def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Running sums."""
    x = np.flip(x, axis) if reverse else x
    out = np.cumsum(x, axis, dtype=x.dtype)
    out = out - x if exclusive else out
    return np.flip(out, axis) if reverse else out
