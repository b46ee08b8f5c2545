"""Pooling windows."""

from __future__ import annotations

import math

import numpy as np

from optkit.backends.coreml.reference.ops.linear import numbers, padded, pads_of, slabs, taps, within
from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray

# Elements of padded input that are in memory at a time where there is room for more.
_PADDED = 1 << 17


def _grid(
    x: Array, kernel: list[int], strides: list[int], pads: list[tuple[int, int]], ceil_mode: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Sizes of the output, and the pads with what the last windows reach over the end."""
    sizes, found = [], []
    for n, k, s, (a, b) in zip(x.shape[2:], kernel, strides, pads, strict=True):
        left = n + a + b - k
        steps = -(-left // s) if ceil_mode else left // s
        # A window has to begin inside the input or the pads before it.
        if ceil_mode and steps * s >= n + a:
            steps -= 1
        sizes.append(steps + 1)
        found.append((a, b + max(0, steps * s - left)))
    return sizes, found


@operation("max_pool", room=True)
def max_pool(
    x: Array, kernel_sizes: Array, strides: Array | None = None, pad_type: str = "valid", pad: Array | None = None,
    ceil_mode: bool = False, room: int = _PADDED,
) -> Array:  # fmt: skip
    """The largest of each window; pads count as nothing."""
    kernel = numbers(kernel_sizes, 0)
    steps, ones = numbers(strides, len(kernel)), [1] * len(kernel)
    pads = pads_of(pad_type, pad, x.shape[2:], kernel, steps, ones)
    sizes, pads = _grid(x, kernel, steps, pads, ceil_mode)
    out = np.full((*x.shape[:2], *sizes), -np.inf, np.float32)
    wide = x.shape[1] * steps[0] * math.prod(n + sum(p) for n, p in zip(x.shape[3:], pads[1:], strict=True))
    rows = max(1, within(room - out.size, _PADDED) // wide)
    for image, place, first, last, ends in slabs(x, kernel, steps, ones, pads, sizes, rows):
        some, found = (
            padded(x[image : image + 1, :, first:last], ends, -np.inf),
            out[image : image + 1, :, place],
        )
        for _, values in taps(some, kernel, steps, ones, found.shape[2:]):
            np.maximum(found, values, out=found)
        del some, values  # before the next are made
    return out


@operation("avg_pool")
def avg_pool(
    x: Array, kernel_sizes: Array, strides: Array | None = None, pad_type: str = "valid", pad: Array | None = None,
    exclude_padding_from_average: bool = False, ceil_mode: bool = False,
) -> Array:  # fmt: skip
    """The mean of each window, with pads as zeros or left out."""
    kernel = numbers(kernel_sizes, 0)
    steps, ones = numbers(strides, len(kernel)), [1] * len(kernel)
    pads = pads_of(pad_type, pad, x.shape[2:], kernel, steps, ones)
    sizes, reach = _grid(x, kernel, steps, pads, ceil_mode)
    total = np.zeros((*x.shape[:2], *sizes), np.float32)
    for _, values in taps(padded(x, reach), kernel, steps, ones, sizes):
        np.add(total, values, out=total)
    if not exclude_padding_from_average:
        return total / np.float32(np.prod(kernel))
    inside = padded(np.ones((1, 1, *x.shape[2:]), np.float32), reach)
    count = np.zeros((1, 1, *sizes), np.float32)
    for _, values in taps(inside, kernel, steps, ones, sizes):
        count += values
    return total / count


@operation("sliding_windows")
def sliding_windows(x: Array, axis: int, size: int, stride: int = 1) -> Array:
    """Windows of ``size`` along an axis, as a new axis behind it."""
    axis = axis % x.ndim
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=axis)
    windows = windows[(*[slice(None)] * axis, slice(None, None, stride))]
    return np.moveaxis(windows, -1, axis + 1)
