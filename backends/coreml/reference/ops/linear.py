"""Products of matrices and convolutions, by BLAS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from optkit.backends.coreml.reference.halves import wide
from optkit.backends.coreml.reference.ops.elementwise import along
from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray

# Elements that steps of an operation hold at a time where there is room for more: of unfolded input, of channels side by side,
# and of bands with their products, so that these stay in cache.
_UNFOLDED, _BESIDE, _BANDED = 1 << 18, 1 << 18, 1 << 16
# Where there is less, as many as pay for a step of its own, of weights and of all else; of unfolded input fewer channels rather than
# fewer columns than these.
_LEAST_WIDENED, _LEAST, _LEAST_COLUMNS = 1 << 13, 1 << 14, 64
# Elements of weights in float16 that are in float32 at a time, where activations have fewer than eight times as many.
_WIDENED = 1 << 16
# Room enough for all of these.
AMPLE = 1 << 20
# Columns of the output that one banded matrix gives: more multiply more zeros, fewer make more products.
_COLUMNS = 14
# From so many channels on, and up to so many elements of each, their products are taken side by side.
_MANY, _FEW = 144, 28 * 28
# So many times wider than high, and bands along the height are the faster ones.
_WIDE = 2


def _by_rows(rows: Array, size: int, room: int) -> Iterator[tuple[slice, Array]]:
    """Rows of a matrix in float32, an eighth as many elements at a time as there are in activations, ``size``, beside them."""
    if rows.dtype != np.float16:
        yield slice(0, len(rows)), rows
        return
    step = max(1, min(max(_WIDENED, size // 8), max(_LEAST_WIDENED, room)) // max(1, rows[:1].size))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        yield some, wide(rows[some])


def within(room: int, most: int) -> int:
    """``most`` elements, or as many as there is room for."""
    return min(most, max(_LEAST, room))


@operation("linear", room=True)
def linear(x: Array, weight: Array, bias: Array | None = None, room: int = AMPLE) -> Array:
    """``x W^T + b``."""
    # One product of matrices, whatever comes before the last axis.
    flat = x.reshape(-1, x.shape[-1])
    out = np.empty((len(flat), len(weight)), np.float32)
    for some, rows in _by_rows(weight, max(x.size, out.size), room - out.size):
        np.matmul(flat, rows.T, out=out[:, some])
        del rows  # before the next are made
    out = out.reshape(*x.shape[:-1], len(weight))
    return out if bias is None else _add(out, bias)


@operation("matmul", room=True)
def matmul(
    x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False, room: int = AMPLE
) -> Array:
    """The product, of the last two axes."""
    x = np.swapaxes(x, -1, -2) if transpose_x and x.ndim > 1 else x
    if y.ndim == 2 and y.dtype == np.float16 and x.ndim > 1:
        return linear(x, y if transpose_y else y.T, room=room)
    x, y = wide(x), wide(y)
    y = np.swapaxes(y, -1, -2) if transpose_y and y.ndim > 1 else y
    return np.matmul(x, y)


@operation("einsum")
def einsum(values: Sequence[Array], equation: str) -> Array:
    """Einstein's summation."""
    return np.einsum(equation, *values, optimize=True)


@operation("scaled_dot_product_attention")
def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """``softmax(Q K^T / sqrt(d) + mask) V``; a mask of truth values leaves out what is false."""
    scores = np.matmul(query, np.swapaxes(key, -1, -2))
    scores /= np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return np.matmul(scores, value)


def pads_of(
    pad_type: str, pad: Array | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:  # fmt: skip
    """Begin and end of each spatial axis."""
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type == "custom":
        assert pad is not None
        flat = [int(p) for p in pad]
        return list(zip(flat[::2], flat[1::2], strict=True))
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        # The odd one goes to the end, or with same_lower to the beginning.
        small, large = total // 2, total - total // 2
        found.append((large, small) if pad_type == "same_lower" else (small, large))
    return found


def padded(x: Array, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Array:
    """``x`` with pads around its spatial axes."""
    if not any(p for pair in pads for p in pair):
        return x
    sizes = [n + a + b for n, (a, b) in zip(x.shape[2:], pads, strict=True)]
    out = np.empty((*x.shape[:2], *sizes), x.dtype)
    inside: list[Any] = [slice(None), slice(None)]
    for n, (a, b) in zip(x.shape[2:], pads, strict=True):
        # Of what lies inside along the axes before, the edges of this one.
        for edge in (slice(0, a), slice(a + n, a + n + b)):
            out[(*inside, edge)] = value
        inside.append(slice(a, a + n))
    out[tuple(inside)] = x
    return out


def numbers(values: Array | None, count: int) -> list[int]:
    """One number for each axis; 1 where none are given."""
    return [1] * count if values is None else [int(v) for v in np.asarray(values).reshape(-1)]


def taps(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """For each place in the kernel, what lies under it."""
    for place in itertools.product(*(range(k) for k in kernel)):
        under = zip(place, dilations, strides, out, strict=True)
        yield place, _spatial(x, [slice(p * d, p * d + (n - 1) * s + 1, s) for p, d, s, n in under])


def _tap(kernels: Array, place: tuple[int, ...]) -> Array:
    """What kernels hold at one place."""
    where: Any = (..., *place)
    return kernels[where]


def _spatial(x: Array, slices: Sequence[slice]) -> Array:
    """Slices of the last axes."""
    where: Any = (..., *slices)
    return x[where]


@operation("conv", room=True)
def conv(
    x: Array, weight: Array, bias: Array | None = None, strides: Array | None = None, pad_type: str = "valid",
    pad: Array | None = None, dilations: Array | None = None, groups: int = 1, room: int = AMPLE,
) -> Array:  # fmt: skip
    """A convolution over the axes after the second; weights ``[out, in / groups, *kernel]``."""
    axes = x.ndim - 2
    kernel = weight.shape[2:]
    steps, spread = numbers(strides, axes), numbers(dilations, axes)
    pads = pads_of(pad_type, pad, x.shape[2:], kernel, steps, spread)
    sizes = [
        (n + sum(p) - (k - 1) * d - 1) // s + 1
        for n, k, d, s, p in zip(x.shape[2:], kernel, spread, steps, pads, strict=True)
    ]
    batch, channels, total = x.shape[0], x.shape[1], weight.shape[0]
    room -= batch * total * math.prod(sizes)
    # One channel alone is read by all kernels: a product like any other.
    if groups == channels > 1 and weight.shape[1] == 1:
        out = _depthwise(x, wide(weight), steps, spread, pads, sizes, room)
    else:
        out = np.empty((batch, total, *sizes), np.float32)
        each, rows = channels // groups, total // groups
        for g in range(groups):
            part = x[:, g * each : (g + 1) * each]
            some = slice(g * rows, (g + 1) * rows)
            _dense(part, weight[some], steps, spread, pads, sizes, out[:, some], room)
    return out if bias is None else _add(out, along(bias, out))


def _add(out: Array, more: Array) -> Array:
    np.add(out, more, out=out)
    return out


def _dense(
    x: Array, weight: Array, strides: list[int], dilations: list[int], pads: Sequence[tuple[int, int]], sizes: list[int],
    out: Array, room: int,
) -> None:  # fmt: skip
    kernel = weight.shape[2:]
    matrix = weight.reshape(len(weight), -1)
    activations = max(x.size, out.size)
    if all(k == 1 for k in kernel) and all(s == 1 for s in strides) and not any(map(any, pads)):
        for some, rows in _by_rows(matrix, activations, room):
            for image, place in zip(x, out[:, some], strict=True):
                # All channels of an image are in one piece, so this is a view.
                np.matmul(rows, image.reshape(len(image), -1), out=place.reshape(len(place), -1))
            del rows
        return
    (each, *_), count = np.shape(weight)[1:], math.prod(kernel)
    held = within(room // 2, _UNFOLDED)
    # Channels at a time where columns of all of them would be too few for a product to run well.
    several = min(each, max(1, held // (count * min(_LEAST_COLUMNS, math.prod(sizes)))))
    for first in range(0, each, several):
        part = x[:, first : first + several]
        for some, rows in _by_rows(
            matrix[:, first * count : (first + several) * count], activations, room // 2
        ):
            for image, place, columns in _unfolded(part, kernel, strides, dilations, pads, sizes, held):
                # Whole rows of the output, and parts of one, lie so that this is a view.
                found = out[(image, some, *place)].reshape(len(rows), -1)
                if first:
                    found += np.matmul(rows, columns)
                else:
                    np.matmul(rows, columns, out=found)
                del columns
            del rows


def _unfolded(
    x: Array, kernel: Sequence[int], strides: list[int], dilations: list[int], pads: Sequence[tuple[int, int]], sizes: list[int],
    room: int,
) -> Iterator[tuple[int, tuple[Any, ...], Array]]:  # fmt: skip
    """For each image some rows of the output at a time, or a part of one: what its elements are computed from, in a column each."""
    high = x.shape[1] * math.prod(kernel)
    rows = max(1, room // max(1, high * math.prod(sizes[1:])))
    axes = len(sizes)
    # [in, *out, *kernel] becomes [in, *kernel, *out].
    order = (0, *range(1 + axes, 1 + 2 * axes), *range(1, 1 + axes))
    width = sizes[-1] if axes != 2 or rows > 1 else min(sizes[-1], max(1, room // high))
    step, span = strides[-1], (kernel[-1] - 1) * dilations[-1] + 1
    for image, place, first, last, ends in slabs(x, kernel, strides, dilations, pads, sizes, rows):
        some = padded(x[image : image + 1, :, first:last], ends)[0]
        for start in range(0, sizes[-1], width):
            end = min(start + width, sizes[-1])
            part = some if width == sizes[-1] else some[..., start * step : (end - 1) * step + span]
            windows = _windows(part, kernel, strides, dilations, range(1, 1 + axes)).transpose(order)
            where = (place,) if width == sizes[-1] else (place.start, slice(start, end))
            yield image, where, windows.reshape(high, -1)
        del some, part, windows  # before the next are made


def slabs(
    x: Array, kernel: Sequence[int], strides: list[int], dilations: list[int], pads: Sequence[tuple[int, int]], sizes: list[int],
    rows: int,
) -> Iterator[tuple[int, slice, int, int, list[tuple[int, int]]]]:  # fmt: skip
    """For each image ``rows`` rows of the output at a time: the rows of the input below them, from and to, and their pads."""
    (before, _), step, span = pads[0], strides[0], (kernel[0] - 1) * dilations[0] + 1
    for image, start in itertools.product(range(len(x)), range(0, sizes[0], rows)):
        count = min(rows, sizes[0] - start)
        size, low = (count - 1) * step + span, start * step - before
        first, last = (min(max(0, at), x.shape[2]) for at in (low, low + size))
        above = min(size, max(0, -low))
        ends = (above, size - above - (last - first))
        yield image, slice(start, start + count), first, last, [ends, *pads[1:]]


def _windows(
    x: Array, kernel: Sequence[int], strides: list[int], dilations: list[int], axes: Sequence[int]
) -> Array:
    """What lies under each place of the kernel for each element of the output; the kernel's axes come last."""
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    windows = sliding_window_view(x, spans, axis=tuple(axes))
    where: Any = [slice(None)] * windows.ndim
    for at, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
        where[axes[at]] = slice(None, None, stride)
        where[x.ndim + at] = slice(None, None, dilation)
    return np.asarray(windows[tuple(where)])


def _depthwise(
    x: Array, weight: Array, strides: list[int], dilations: list[int], pads: Sequence[tuple[int, int]], sizes: list[int],
    room: int,
) -> Array:  # fmt: skip
    """Each channel with its own kernels."""
    batch, channels = x.shape[:2]
    times = len(weight) // channels
    out = np.empty((batch, channels, times, *sizes), np.float32)
    kernels = weight.reshape(channels, times, *weight.shape[2:])
    many = channels >= _MANY and math.prod(sizes) <= _FEW and not _low_and_wide(sizes)
    if many or len(sizes) > 2 or any(d != 1 for d in dilations):
        for image, found in zip(x, out, strict=True):
            _side_by_side(image, kernels, strides, dilations, pads, found, room)
        return out.reshape(batch, channels * times, *sizes)
    for image, found in zip(x, out, strict=True):
        with np.errstate(invalid="ignore"):
            for t in range(times):
                _by_bands(image, kernels[:, t], strides, pads, found[:, t], within(room, _BANDED))
        # Zeros of a band turn infinities beside a window into NaN, which is the largest there is.
        if np.isnan(found.max()):
            _side_by_side(image, kernels, strides, dilations, pads, found, room)
    return out.reshape(batch, channels * times, *sizes)


def _side_by_side(
    x: Array, kernels: Array, strides: list[int], dilations: list[int], pads: Sequence[tuple[int, int]], out: Array, room: int
) -> None:  # fmt: skip
    """Sums of products over the places of the kernels, of all channels at once: they come last in memory.

    Args:
        x: ``[channels, *sizes]`` of one image.
        kernels: ``[channels, times, *kernel]``.
        out: ``[channels, times, *sizes]``.
    """
    channels, times, *kernel = kernels.shape
    axes = len(kernel)
    # [*kernel, channels], one for each time.
    factors = np.ascontiguousarray(np.moveaxis(kernels, 0, -1))
    inside = [n + sum(p) for n, p in zip(x.shape[2:], pads[1:], strict=True)]
    rows = max(1, within(room, _BESIDE) // max(1, channels * strides[0] * math.prod(inside)))
    places, under, last = list(range(axes)), list(range(axes, 2 * axes)), 2 * axes
    for _, place, first, end, ends in slabs(
        x[None], kernel, strides, dilations, pads, list(out.shape[2:]), rows
    ):
        some = np.moveaxis(x[:, first:end], 0, -1)
        some = np.ascontiguousarray(padded(some[None, None], [*ends, (0, 0)])[0, 0])
        windows = _windows(some, kernel, strides, dilations, range(axes))
        for t in range(times):
            found = np.einsum(windows, [*places, last, *under], factors[t], [*under, last], [*places, last])
            out[:, t, place] = np.moveaxis(found, -1, 0)
        del some, windows  # before the next are made


def _by_bands(
    x: Array, kernels: Array, strides: list[int], pads: Sequence[tuple[int, int]], out: Array, room: int
) -> None:
    """Products with banded matrices, for each channel one of its rows or of its columns."""
    if len(strides) == 1:
        x, kernels, out, strides, pads = (
            x[:, None],
            kernels[:, None],
            out[:, None],
            [1, *strides],
            [(0, 0), *pads],
        )
    # A matrix is as large as what it is multiplied with where a picture is low and wide.
    (_low if _low_and_wide(out.shape[1:]) else _high)(x, kernels, strides, pads, out, room)


def _low_and_wide(sizes: Sequence[int]) -> bool:
    """Whether bands along the height are the faster ones."""
    height, width = (1, *sizes)[-2:]
    return height <= _COLUMNS and _WIDE * height <= width


def _inside(place: int, step: int, before: int, size: int, count: int) -> tuple[slice, slice]:
    """For one place of the kernel along an axis: the outputs below which it lies inside the input, and what lies there.

    Args:
        before: Pads at the beginning.
        size: Of the input.
        count: Of the output.
    """
    first = max(0, -(-(before - place) // step))
    end = max(first, min(count, (size - 1 + before - place) // step + 1))
    start = first * step + place - before
    return slice(first, end), slice(start, start + max(0, (end - first - 1) * step + 1), step)


def _bands(kernels: Array, step: int, before: int, size: int, count: int) -> Array:
    """Matrices ``[..., size, count]`` whose columns are ``kernels [..., taps]``, each by ``step`` lower than the last.

    Args:
        before: By how many the first is higher than the matrix.
    """
    # Every matrix is one line with zeros around, read from place after place.
    first = (count - 1) * step
    line = np.zeros((*kernels.shape[:-1], first + max(before + size, kernels.shape[-1])), np.float32)
    line[..., first : first + kernels.shape[-1]] = kernels
    each = line.strides[-1]
    view = as_strided(
        line[..., first + before :],
        (*line.shape[:-1], size, count),
        (*line.strides, -step * each),
        writeable=False,
    )
    return np.ascontiguousarray(view)


def _low(
    x: Array, kernels: Array, strides: list[int], pads: Sequence[tuple[int, int]], out: Array, room: int
) -> None:
    """A matrix ``[height, rows of the input]`` for each channel and each column of the kernel."""
    (channels, _, taps), (height, width) = kernels.shape, out.shape[1:]
    (down, right), size = strides, x.shape[1]
    inside = [_inside(tap, right, pads[1][0], x.shape[2], width) for tap in range(taps)]
    each = height * (taps * size + width) + (0 if right == 1 else size * width)
    block = min(channels, max(1, room // each))
    product = np.empty((block, height, width), np.float32)
    for start in range(0, channels, block):
        some = slice(start, start + block)
        given, found = x[some], out[some]
        bands = _bands(np.moveaxis(kernels[some], -1, 0), down, pads[0][0], size, height).swapaxes(-1, -2)
        found[:] = 0
        for band, (there, under) in zip(bands, inside, strict=True):
            part, place = given[:, :, under], product[: len(given), :, there]
            # BLAS takes no steps along both axes.
            np.matmul(band, part if right == 1 else np.ascontiguousarray(part), out=place)
            total = found[:, :, there]
            np.add(total, place, out=total)
        del bands, band  # before the next are made


def _high(
    x: Array, kernels: Array, strides: list[int], pads: Sequence[tuple[int, int]], out: Array, room: int
) -> None:
    """Matrices ``[span, columns]``, one for each row of the kernel and each channel."""
    (channels, rows, taps), (height, width) = kernels.shape, out.shape[1:]
    (down, right), columns = strides, min(width, _COLUMNS)
    span = (columns - 1) * right + taps
    inside = [_inside(row, down, pads[0][0], x.shape[1], height) for row in range(rows)]
    block = min(channels, max(1, room // (columns * (rows * span + 2 * height))))
    sums, products = np.empty((2, block, height, columns), np.float32)
    for some in (slice(start, start + block) for start in range(0, channels, block)):
        given, found = x[some], out[some]
        total, product = sums[: len(given)], products[: len(given)]
        bands = _bands(kernels[some].swapaxes(0, 1), right, 0, span, columns)
        for first in range(0, width, columns):
            # The last columns are computed twice where they do not fill a band.
            start = min(first, width - columns)
            left = start * right - pads[1][0]
            low, high = max(0, left), max(0, min(x.shape[2], left + span))
            total[:] = 0
            # Where all of it lies in the pads there is nothing to add.
            for band, (there, under) in zip(bands, inside, strict=True) if low < high else ():
                place, part = product[:, there], total[:, there]
                np.matmul(given[:, under, low:high], band[:, low - left : high - left], out=place)
                np.add(part, place, out=part)
            found[:, :, start : start + columns] = total
        del bands  # before the next are made


@operation("conv_transpose")
def conv_transpose(
    x: Array, weight: Array, bias: Array | None = None, pad: Array | None = None, output_shape: Array | None = None,
    pad_type: str = "valid", strides: Array | None = None, dilations: Array | None = None, groups: int = 1,
) -> Array:  # fmt: skip
    """Each input element spreads the kernel over the output; weights ``[in, out / groups, *kernel]``."""
    axes = x.ndim - 2
    steps, spread = numbers(strides, axes), numbers(dilations, axes)
    kernel = weight.shape[2:]
    batch, channels, each = x.shape[0], x.shape[1], weight.shape[1]
    full = [
        (n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], steps, kernel, spread, strict=True)
    ]
    out = np.zeros((batch, each * groups, *full), np.float32)
    for g in range(groups):
        part = x[:, g * channels // groups : (g + 1) * channels // groups].reshape(
            batch, channels // groups, -1
        )
        rows = weight[g * channels // groups : (g + 1) * channels // groups]
        place = out[:, g * each : (g + 1) * each]
        for at, values in taps(place, kernel, steps, spread, x.shape[2:]):
            values += np.matmul(_tap(rows, at).T, part).reshape(batch, each, *x.shape[2:])
    if pad_type == "custom":
        assert pad is not None
        flat = [int(p) for p in pad]
        cuts = list(zip(flat[::2], flat[1::2], strict=True))
    elif pad_type == "valid":
        cuts = [(0, 0)] * axes
    else:
        cuts = []
        for n, s, f in zip(x.shape[2:], steps, full, strict=True):
            total = max(0, f - n * s)
            small, large = total // 2, total - total // 2
            cuts.append((large, small) if pad_type == "same_lower" else (small, large))
    if output_shape is not None:
        wanted = [int(v) for v in output_shape][-axes:]
        # What is asked for beyond the pads is cut off less at the end.
        cuts = [(a, f - a - w) for (a, _), f, w in zip(cuts, full, wanted, strict=True)]
    out = _spatial(out, [slice(a, f - b) for (a, b), f in zip(cuts, full, strict=True)])
    more = [(0, max(0, -b)) for _, b in cuts]
    out = padded(out, more)
    return out if bias is None else out + along(bias, out)
