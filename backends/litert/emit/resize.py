"""Resizing, by LiteRT's own kernels where they compute the same, else by indices or matrices of weights, an axis at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import TO_LAST, Context, emits, size
from optkit.backends.litert.flat import NOTHING, Tensor
from optkit.backends.resampling import matrix, nearest, positions
from optkit.graph import constant, ints, is_float

# What LiteRT's bilinear kernel can be asked for: it takes the ratio of the sizes for the scale.
_NATIVE = {
    "half_pixel": {"alignCorners": False, "halfPixelCenters": True},
    "align_corners": {"alignCorners": True, "halfPixelCenters": False},
    "asymmetric": {"alignCorners": False, "halfPixelCenters": False},
}
# The last two axes of a picture, and where they are with channels last.
_PLANE = {2: 1, 3: 2}


def _refuse_resize(node: ir.Node) -> str | None:
    if _where(node) == "tf_crop_and_resize":
        return "optkit has no translation of coordinate_transformation_mode tf_crop_and_resize into LiteRT"
    scales, sizes = (node.inputs[i] if len(node.inputs) > i else None for i in (2, 3))
    if (scales is not None and constant(scales) is None) or (
        _policy(node) != "stretch" and constant(sizes) is None
    ):
        return "LiteRT needs constant scales"
    if node.attributes.get_string("mode", "nearest") != "nearest" and not is_float(node.inputs[0]):
        return "LiteRT weighs floats alone"
    return None


def _where(node: ir.Node) -> str:
    return node.attributes.get_string("coordinate_transformation_mode", "half_pixel")


def _policy(node: ir.Node) -> str:
    return node.attributes.get_string("keep_aspect_ratio_policy", "stretch")


def _scales(node: ir.Node, before: Sequence[int]) -> dict[int, float | None]:
    """The scale of each axis that is named, None where the sizes say it."""
    axes = [a % len(before) for a in ints(node, "axes", range(len(before)))]
    scales, sizes = (constant(node.inputs[i]) if len(node.inputs) > i else None for i in (2, 3))
    if scales is not None and scales.size:
        return {a: float(s) for a, s in zip(axes, scales.reshape(-1), strict=True)}
    if _policy(node) == "stretch":
        return dict.fromkeys(axes)
    assert sizes is not None
    ratios = [int(n) / before[a] for a, n in zip(axes, sizes.reshape(-1), strict=True)]
    return dict.fromkeys(axes, (min if _policy(node) == "not_larger" else max)(ratios))


@emits("Resize", refuse=_refuse_resize)
def _resize(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    before, after = size(source), size(node.outputs[0])
    scales, where, mode = _scales(node, before), _where(node), node.attributes.get_string("mode", "nearest")
    # ONNX Runtime copies where all sizes stay, whatever the scales.
    moved = [
        a for a, s in scales.items() if before != after and (before[a] != after[a] or s not in (None, 1.0))
    ]
    picture = len(before) == 4 and set(moved) <= _PLANE.keys()
    if mode == "nearest":
        places = {a: _places(node, before[a], after[a], scales[a]) for a in moved}
        repeated = all(
            after[a] % before[a] == 0
            and np.array_equal(p, np.arange(after[a]) // (after[a] // before[a]))
            for a, p in places.items()
        )  # fmt: skip
        if picture and repeated:
            _native(c, node, "RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions", _NATIVE["asymmetric"])
            return
        x = c.get(source)
        for axis, found in places.items():
            shape = [after[axis] if i == axis else n for i, n in enumerate(x.shape)]
            settings = ("GatherOptions", {"axis": axis, "batchDims": 0})
            x = c.op("GATHER", [x, c.vector(found.tolist())], shape, settings=settings)
        c.put(node.outputs[0], x)
        return
    weights = {a: matrix(node, before[a], after[a], scales[a], mode, where) for a in moved}
    for name, fields in _NATIVE.items():
        if picture and all(np.allclose(w, _bilinear(before[a], after[a], name)) for a, w in weights.items()):
            _native(c, node, "RESIZE_BILINEAR", "ResizeBilinearOptions", fields)
            return
    x = c.get(source)
    for axis, array in weights.items():
        x = _weighted(c, x, axis, array, str(node.outputs[0].name))
    c.put(node.outputs[0], x)


def _places(node: ir.Node, before: int, after: int, scale: float | None) -> np.ndarray:
    """Which element of an axis each of the new ones repeats."""
    found = [nearest(p, node) for p in positions(before, after, scale, _where(node))]
    return np.clip(found, 0, before - 1)


def _bilinear(before: int, after: int, where: str) -> np.ndarray:
    """The weights ``[after, before]`` of LiteRT's kernel."""
    plain = ir.Node("", "Resize", [])
    return matrix(plain, before, after, None, "linear", where)


def _native(c: Context, node: ir.Node, code: str, kind: str, fields: dict[str, bool]) -> None:
    source = node.inputs[0]
    assert source is not None
    shape = tuple(size(node.outputs[0])[i] for i in TO_LAST)
    inputs = [c.get(source, "last"), c.vector(shape[1:3])]
    c.put(node.outputs[0], c.op(code, inputs, shape, settings=(kind, fields)), "last")


def _weighted(c: Context, x: Tensor, axis: int, array: np.ndarray, name: str) -> Tensor:
    """The product with a matrix ``[after, before]`` along an axis."""
    order = [i for i in range(len(x.shape)) if i != axis] + [axis]
    x = c.transposed(x, order)
    made = c.op(
        "FULLY_CONNECTED", [x, c.graph.constant(array.astype(np.float32)), NOTHING], (*x.shape[:-1], len(array)),
        settings=("FullyConnectedOptions", {"keepNumDims": True}), name=name,
    )  # fmt: skip
    return c.transposed(made, np.argsort(order).tolist())
