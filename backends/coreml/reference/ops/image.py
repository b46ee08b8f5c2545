"""Resizing and sampling."""

from __future__ import annotations

import numpy as np

from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray


def _positions(size: int, target: int, mode: str) -> Array:
    """Where on the input each element of the output lies; the sampling modes of ``resize_bilinear``."""
    where = np.arange(target, dtype=np.float64)
    if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and target > 1):
        found = where * ((size - 1) / (target - 1)) if target > 1 else where * 0
    elif mode == "ALIGN_CORNERS":
        found = np.full(target, (size - 1) / 2)
    elif mode == "DEFAULT":
        found = where * ((size - size / target) / (target - 1)) if target > 1 else where * 0
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / target
        found = 0.5 * delta + where * delta
    elif mode == "UNALIGN_CORNERS":
        found = where * (size / target) + 0.5 * size / target - 0.5
    else:
        raise ValueError(f"sampling mode {mode!r}")
    return np.clip(found, 0, size - 1)


def _linear(x: Array, axis: int, positions: Array) -> Array:
    low = np.floor(positions).astype(np.intp)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (positions - low).astype(np.float32).reshape(shape)
    return np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight


def _bilinear(x: Array, height: int, width: int, mode: str) -> Array:
    x = _linear(x, x.ndim - 2, _positions(x.shape[-2], height, mode))
    return _linear(x, x.ndim - 1, _positions(x.shape[-1], width, mode))


def _under(size: int, target: int) -> Array:
    """For each place along an axis of ``target`` the one of ``size`` that it is taken from: ``floor(i * in / out)``."""
    return np.arange(target) * size // target


@operation("resize_bilinear")
def resize_bilinear(
    x: Array, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Array:
    """The last two axes to given sizes."""
    return _bilinear(x, target_size_height, target_size_width, sampling_mode)


@operation("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Array, target_size_height: int, target_size_width: int) -> Array:
    """The last two axes to given sizes, without computing."""
    rows, columns = _under(x.shape[-2], target_size_height), _under(x.shape[-1], target_size_width)
    out = np.empty((*x.shape[:-2], len(rows), len(columns)), x.dtype)
    for image in np.ndindex(x.shape[:-2]):
        # The mode spares a buffer of the result's size.
        np.take(np.take(x[image], columns, 1), rows, 0, out=out[image], mode="clip")
    return out


def _scaled(size: int, factor: float) -> int:
    return int(np.floor(size * factor + 1e-6))


@operation("upsample_nearest_neighbor")
def upsample_nearest_neighbor(
    x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Array:
    """By factors."""
    height, width = _scaled(x.shape[-2], scale_factor_height), _scaled(x.shape[-1], scale_factor_width)
    return resize_nearest_neighbor(x, height, width)


@operation("upsample_bilinear")
def upsample_bilinear(
    x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1, align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Array:  # fmt: skip
    """By factors. Half pixels are the default where corners are not aligned."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = _scaled(x.shape[-2], scale_factor_height), _scaled(x.shape[-1], scale_factor_width)
    return _bilinear(x, height, width, mode)


@operation("resize")
def resize(
    x: Array, shape: Array, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Array:  # fmt: skip
    """The last ``resized_dims`` axes to the last entries of ``shape``; 0 leaves an axis as it is."""
    axes = range(x.ndim - resized_dims, x.ndim)
    targets = [int(v) for v in np.reshape(shape, -1)[-resized_dims:]]
    for axis, target in zip(axes, targets, strict=True):
        size = x.shape[axis]
        positions = _positions(size, target or size, sampling_mode)
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, positions)
        else:
            x = np.take(x, np.minimum(np.floor(positions + 0.5), size - 1).astype(np.intp), axis)
    return x


@operation("resample")
def resample(
    x: Array, coordinates: Array, sampling_mode: str, padding_mode: str, padding_value: float, coordinates_mode: str,
    align_corners: bool,
) -> Array:  # fmt: skip
    """Values at given places ``[N, H, W, 2]`` (x, y)."""
    height, width = x.shape[-2:]
    places = []
    for axis, size in ((1, height), (0, width)):
        at = coordinates[..., axis].astype(np.float64)
        if coordinates_mode == "normalized_minus_one_to_one":
            at = (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
        elif coordinates_mode == "normalized_zero_to_one":
            at = at * (size - 1) if align_corners else at * size - 0.5
        places.append(_folded(at, size, padding_mode))
    if sampling_mode == "nearest":
        return _read(x, np.rint(places[0]), np.rint(places[1]), padding_mode, padding_value)
    top, left = np.floor(places[0]), np.floor(places[1])
    below, right = places[0] - top, places[1] - left
    total = np.zeros(())
    for dy, wy in ((0, 1 - below), (1, below)):
        for dx, wx in ((0, 1 - right), (1, right)):
            total = total + _read(x, top + dy, left + dx, padding_mode, padding_value) * (wy * wx)[:, None]
    return total


def _folded(at: Array, size: int, padding: str) -> Array:
    if padding == "border":
        return np.clip(at, 0, size - 1)
    if padding in ("reflection", "symmetric"):
        # At the centre of the outer pixels, or at their edge, which repeats them.
        low, span = (0.0, float(size - 1)) if padding == "reflection" else (-0.5, float(size))
        if span == 0:
            return np.zeros_like(at)
        at = np.abs(at - low) % (2 * span)
        return np.clip(np.where(at > span, 2 * span - at, at) + low, 0, size - 1)
    return at


def _read(x: Array, rows: Array, columns: Array, padding: str, value: float) -> Array:
    height, width = x.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    r, c = (np.clip(v, 0, n - 1).astype(np.intp) for v, n in ((rows, height), (columns, width)))
    found = np.stack([image[:, i, j] for image, i, j in zip(x, r, c, strict=True)])
    return np.where(inside[:, None], found, value) if padding == "constant" else found


@operation("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Array, scores: Array, max_boxes: int, iou_threshold: float, per_class_suppression: bool = False
) -> list[Array]:
    """The best boxes ``[n, 4, B]`` of one class, as long as they overlap no better one by more than the threshold; padded with -1."""
    if scores.shape[1] != 1:
        raise ValueError("several classes at once")
    chosen = np.full((len(boxes), max_boxes), -1, np.int32)
    for row, places, values in zip(chosen, boxes, scores[:, 0], strict=True):
        open_ = np.argsort(-values, kind="stable")
        low, high = places[:2] - places[2:] / 2, places[:2] + places[2:] / 2
        area = np.prod(places[2:], 0)
        for place in range(max_boxes):
            if not open_.size:
                break
            best, open_ = open_[0], open_[1:]
            row[place] = best
            shared = np.minimum(high[:, open_], high[:, best, None]) - np.maximum(
                low[:, open_], low[:, best, None]
            )
            both = np.prod(np.maximum(shared, 0), 0)
            # Without an area nothing is shared.
            union = np.maximum(area[open_] + area[best] - both, np.finfo(np.float32).tiny)
            open_ = open_[both <= iou_threshold * union]
    there = np.maximum(chosen, 0)[:, None]
    picked = [np.where(chosen[:, None] < 0, 0, np.take_along_axis(x, there, 2)) for x in (boxes, scores)]
    return [*picked, chosen]
