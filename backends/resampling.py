"""What a Resize of ONNX does along one axis: where elements come from, and with what weights."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute


def positions(size: int, target: int, scale: float | None, coordinates: str) -> list[float]:
    """Where on the input each element of the output lies; ONNX Resize, coordinate_transformation_mode.

    In float32 and in the order of ONNX Runtime's ``upsamplebase.h``: where a place is a whole number or lies half way, rounding
    decides which element is the nearest.
    """
    half, one = np.float32(0.5), np.float32(1)
    factor = np.float32(target / size if scale is None else scale)
    before, after = np.float32(size), np.float32(target)
    where = np.arange(target, dtype=np.float32)
    if coordinates == "align_corners":
        found = where * (before - one) / (after - one) if target > 1 else where * 0
    elif coordinates == "asymmetric":
        found = where / factor
    elif coordinates == "tf_half_pixel_for_nn":
        found = (where + half) / factor
    elif coordinates == "pytorch_half_pixel" and target == 1:
        found = where * 0
    elif coordinates == "half_pixel_symmetric":
        # Here it is the offset alone that is rounded.
        offset = before / 2 * (one - after / (factor * before))
        found = (float(offset) + (where + 0.5).astype(np.float64) / float(factor) - 0.5).astype(np.float32)
    else:
        found = (where + half) / factor - half
    return [float(f) for f in found]


def nearest(position: float, node: ir.Node) -> int:
    """The element that stands for a place between two."""
    mode = attribute(node, "nearest_mode", "round_prefer_floor")
    if mode == "floor":
        return math.floor(position)
    if mode == "ceil":
        return math.ceil(position)
    # ONNX Runtime 1.32 takes what is less than 1e-6 from half way for half way.
    prefers_floor = mode == "round_prefer_floor"
    return math.ceil(position - 0.5 - 1e-6) if prefers_floor else math.floor(position + 0.5 + 1e-6)


def _kernel(distance: float, mode: str, cubic: float) -> float:
    d = abs(distance)
    if mode == "linear":
        return max(0.0, 1 - d)
    # Keys, "Cubic convolution interpolation", 1981, eq. 4, with the coefficient of the node.
    if d <= 1:
        return ((cubic + 2) * d - (cubic + 3)) * d * d + 1
    return (((d - 5) * d + 8) * d - 4) * cubic if d < 2 else 0.0


def matrix(
    node: ir.Node, size: int, target: int, scale: float | None, mode: str, coordinates: str
) -> np.ndarray:
    """Weights ``[target, size]`` of an axis."""
    cubic = node.attributes.get_float("cubic_coeff_a", -0.75)
    outside = bool(attribute(node, "exclude_outside", 0))
    factor = target / size if scale is None else scale
    # Downscaled with antialias, the kernel is as wide as what falls into one element.
    stretch = max(1.0, 1 / factor) if attribute(node, "antialias", 0) else 1.0
    reach = (1 if mode == "linear" else 2) * stretch
    found = np.zeros((target, size), np.float64)
    for row, position in enumerate(positions(size, target, scale, coordinates)):
        places = range(math.ceil(position - reach - 1e-9), math.floor(position + reach + 1e-9) + 1)
        weights = [_kernel((p - position) / stretch, mode, cubic) for p in places]
        if outside:
            weights = [w if 0 <= p < size else 0.0 for w, p in zip(weights, places, strict=True)]
        if outside or stretch > 1:
            total = sum(weights)
            weights = [w / total for w in weights]
        for place, weight in zip(places, weights, strict=True):
            found[row, min(max(place, 0), size - 1)] += weight
    return found
