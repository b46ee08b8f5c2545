"""Resizing, in Core ML's own spellings where they compute the same, else by indices or matrices of weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import (
    Context,
    cast,
    emits,
    is_float,
    like,
    refused,
    through_floats,
    unchecked,
)
from optkit.backends.coreml.quiet import mb
from optkit.backends.resampling import matrix, nearest, positions
from optkit.graph import ints

_COORDINATES = (
    "half_pixel",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "half_pixel_symmetric",
    "tf_half_pixel_for_nn",
)
_KEPT = ("stretch",)
# Floats hold all their numbers, and Core ML repeats floats alone.
_SMALL = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.BOOL)


def _refuse_resize(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode not in _COORDINATES:
        return f"coordinate_transformation_mode {mode!r}"
    x = node.inputs[0]
    kind = None if x is None else x.dtype
    if kind is not None and kind.is_integer() and node.attributes.get_string("mode", "nearest") != "nearest":
        return f"mode {node.attributes['mode'].as_string()!r} of {kind.name.lower()}: Core ML interpolates floats alone"
    policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
    return None if policy in _KEPT else f"keep_aspect_ratio_policy {policy!r}"


@emits("Resize", refuse=_refuse_resize)
def _resize(c: Context, node: ir.Node) -> Any:
    x, given = c.input(node, 0), node.inputs[0]
    assert given is not None
    return (
        through_floats(x, lambda v: _resized(c, node, v)) if given.dtype in _SMALL else _resized(c, node, x)
    )


def _resized(c: Context, node: ir.Node, x: Any) -> Any:
    axes = ints(node, "axes") or list(range(x.rank))
    axes = [a % x.rank for a in axes]
    mode = node.attributes.get_string("mode", "nearest")
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    sizes, scales = _targets(c, node, x, axes)
    moved = [a for a in range(x.rank) if scales.get(a, 1.0) != 1.0 or sizes.get(a, x.shape[a]) != x.shape[a]]
    # ONNX Runtime copies where all sizes stay, whatever the scales.
    if all(a in sizes and sizes[a] == x.shape[a] for a in moved):
        return mb.identity(x=x)
    fixed = all(isinstance(x.shape[a], int | np.integer) for a in moved)
    if fixed and any(sizes.get(a) is None for a in moved):
        wanted = node.inputs[3]
        assert wanted is not None
        raise refused(
            node,
            f"its sizes {wanted.name!r} depend on data or on free axes of other inputs, and Core ML needs them here",
        )
    whole = [float(s).is_integer() for s in (scales[a] for a in moved) if s is not None]
    plane = x.rank >= 3 and set(moved) <= {x.rank - 2, x.rank - 1}
    if (
        mode == "nearest"
        and is_float(x)
        and plane
        and x.rank >= 4
        and all(whole)
        and _repeats(node, coordinates, moved, scales)
    ):
        up = [int(scales.get(a) or 1) for a in (x.rank - 2, x.rank - 1)]
        return mb.upsample_nearest_neighbor(x=x, scale_factor_height=up[0], scale_factor_width=up[1])
    if not fixed:
        return _resize_free(c, node, x, moved, scales, mode, coordinates)
    lengths = {a: (int(x.shape[a]), int(sizes[a])) for a in moved}
    sampling = _sampling(coordinates, lengths, scales)
    if (
        mode == "linear"
        and plane
        and x.rank >= 4
        and sampling
        and not node.attributes.get_int("antialias", 0)
    ):
        height, width = (int(sizes.get(a, x.shape[a])) for a in (x.rank - 2, x.rank - 1))
        return mb.resize_bilinear(
            x=x, target_size_height=height, target_size_width=width, sampling_mode=sampling
        )
    for axis in moved:
        if mode == "nearest":
            places = np.asarray(
                [nearest(p, node) for p in positions(*lengths[axis], scales[axis], coordinates)]
            )
            places = np.clip(places, 0, lengths[axis][0] - 1).astype(np.int32)
            x = mb.gather(x=x, indices=places, axis=axis, **unchecked(c))
        else:
            x = _weighted(x, axis, matrix(node, *lengths[axis], scales[axis], mode, coordinates))
    return x


def _targets(
    c: Context, node: ir.Node, x: Any, axes: list[int]
) -> tuple[dict[int, Any], dict[int, float | None]]:
    """Size (or None) and scale of each resized axis, as far as they are known now."""
    scales = c.known(node, 2) if c.has(node, 2) else None
    if scales is not None and scales.size:
        factors = {a: float(s) for a, s in zip(axes, scales.reshape(-1), strict=True)}
        sizes = {
            a: math.floor(int(x.shape[a]) * s) if isinstance(x.shape[a], int | np.integer) else None
            for a, s in factors.items()
        }
        return {a: s for a, s in sizes.items() if s is not None}, dict(factors)
    if not c.has(node, 3):
        raise refused(node, "Core ML needs the scales of a Resize when it is compiled")
    known: list[int | None] = c.partly(node, 3) or [None] * len(axes)
    found: dict[int, Any] = {}
    ratios: dict[int, float | None] = {}
    for a, size in zip(axes, known, strict=True):
        same = x.shape[a] if a < x.rank - 2 else None
        if size is None and not isinstance(same, int | np.integer):
            ratios[a] = None
            found[a] = None if a >= x.rank - 2 else x.shape[a]
            continue
        target = int(same) if size is None and same is not None else size
        found[a] = target
        fixed = isinstance(x.shape[a], int | np.integer)
        ratios[a] = target / int(x.shape[a]) if fixed and target is not None else None
    return found, {a: (1.0 if found[a] is x.shape[a] else r) for a, r in ratios.items()}


def _repeats(node: ir.Node, coordinates: str, moved: list[int], scales: dict[int, float | None]) -> bool:
    """Whether nearest means that each element is repeated."""
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    if any((scales[a] or 0) < 1 for a in moved):
        return False
    if coordinates in ("half_pixel", "pytorch_half_pixel"):
        return rounding in ("round_prefer_floor", "round_prefer_ceil")
    return coordinates == "asymmetric" and rounding == "floor"


def _sampling(
    coordinates: str, lengths: dict[int, tuple[int, int]], scales: dict[int, float | None]
) -> str | None:
    """Core ML's name for the same grid, where it is the same: it takes the ratio of the sizes for the scale."""
    ratio = all(
        abs((scales[a] or n / m) - n / m) < 1e-9 * (n / m) or coordinates == "align_corners"
        for a, (m, n) in lengths.items()
    )
    if not ratio:
        return None
    if coordinates == "pytorch_half_pixel" and any(n == 1 for _, n in lengths.values()):
        return None
    return {
        "half_pixel": "UNALIGN_CORNERS", "pytorch_half_pixel": "UNALIGN_CORNERS", "align_corners": "STRICT_ALIGN_CORNERS",
        "asymmetric": "DEFAULT" if all(n > 1 for _, n in lengths.values()) else None, "half_pixel_symmetric": "UNALIGN_CORNERS",
    }.get(coordinates)  # fmt: skip


def _resize_free(
    c: Context,
    node: ir.Node,
    x: Any,
    moved: list[int],
    scales: dict[int, float | None],
    mode: str,
    coordinates: str,
) -> Any:
    """Axes of free size: by factors, or to a size computed at run time."""
    if x.rank < 4 or not set(moved) <= {x.rank - 2, x.rank - 1}:
        raise refused(node, "Core ML resizes only the last two axes where sizes are free")
    factors = [scales.get(a, 1.0) for a in (x.rank - 2, x.rank - 1)]
    if (
        mode == "linear"
        and None not in factors
        and coordinates in ("half_pixel", "asymmetric", "align_corners")
    ):
        settings: dict[str, Any] = {
            "scale_factor_height": np.float32(factors[0]), "scale_factor_width": np.float32(factors[1]),
            "align_corners": coordinates == "align_corners", "half_pixel_centers": coordinates == "half_pixel",
        }  # fmt: skip
        if all(float(f or 0).is_integer() for f in factors):
            return mb.upsample_bilinear(x=x, **settings)
        raise refused(node, "a scale that is not an integer, of an axis of free size")
    if not c.has(node, 3) or c.version < 17:
        raise refused(node, f"mode {mode!r} of an axis of free size")
    sizes = c.input(node, 3)
    target = mb.slice_by_index(x=sizes, begin=[x.rank - 2], end=[x.rank], end_mask=[True])
    if mode == "linear" and coordinates in ("half_pixel", "align_corners", "asymmetric"):
        names = {
            "half_pixel": "UNALIGN_CORNERS",
            "align_corners": "STRICT_ALIGN_CORNERS",
            "asymmetric": "DEFAULT",
        }
        return mb.resize(
            x=x,
            shape=target,
            resized_dims=np.uint32(2),
            interpolation_mode="LINEAR",
            sampling_mode=names[coordinates],
        )
    if (
        mode == "nearest"
        and coordinates == "asymmetric"
        and node.attributes.get_string("nearest_mode", "") == "floor"
    ):
        return _nearest_free(c, x, target)
    raise refused(node, f"mode {mode!r} with {coordinates!r} of an axis of free size")


def _nearest_free(c: Context, x: Any, target: Any) -> Any:
    """``y[i] = x[floor(i * in / out)]`` along the last two axes, with sizes known at run time."""
    for position, axis in enumerate((x.rank - 2, x.rank - 1)):
        size = mb.slice_by_index(x=target, begin=[position], end=[position + 1], squeeze_mask=[True])
        own = mb.slice_by_index(x=mb.shape(x=x), begin=[axis], end=[axis + 1], squeeze_mask=[True])
        steps = mb.range_1d(start=np.int32(0), end=size, step=np.int32(1))
        places = mb.floor_div(x=mb.mul(x=steps, y=own), y=size)
        x = mb.gather(x=x, indices=places, axis=axis, **unchecked(c))
    return x


def _weighted(x: Any, axis: int, matrix: np.ndarray) -> Any:
    """The product with a matrix along ``axis``."""
    kind = type(like(x, 0))
    if axis == x.rank - 1:
        return mb.matmul(x=x, y=np.ascontiguousarray(matrix.T.astype(kind)))
    if axis == x.rank - 2:
        weights = np.ascontiguousarray(matrix.astype(kind)).reshape(*[1] * (x.rank - 2), *matrix.shape)
        return mb.matmul(x=weights, y=x)
    perm = [i for i in range(x.rank) if i != axis] + [axis]
    out = mb.matmul(x=mb.transpose(x=x, perm=perm), y=np.ascontiguousarray(matrix.T.astype(kind)))
    return mb.transpose(x=out, perm=[perm.index(i) for i in range(x.rank)])


def _refuse_grid(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "linear")
    if mode not in ("linear", "bilinear", "nearest"):
        return f"mode {mode!r}: Core ML samples the nearest value or between two"
    x = node.inputs[0]
    return "Core ML samples planes" if x is not None and x.shape is not None and len(x.shape) != 4 else None


@emits("GridSample", refuse=_refuse_grid)
def _grid_sample(c: Context, node: ir.Node) -> Any:
    x, grid = c.inputs(node)
    padding, aligned = (
        node.attributes.get_string("padding_mode", "zeros"),
        bool(node.attributes.get_int("align_corners", 0)),
    )
    # What reflects at the edges of the outer pixels repeats them.
    mirror = "reflection" if aligned else "symmetric"
    return mb.resample(
        x=x, coordinates=cast(grid, "fp32"),
        sampling_mode="nearest" if node.attributes.get_string("mode", "linear") == "nearest" else "bilinear",
        padding_mode={"zeros": "constant", "border": "border", "reflection": mirror}[padding], padding_value=like(x, 0),
        coordinates_mode="normalized_minus_one_to_one", align_corners=aligned,
    )  # fmt: skip
