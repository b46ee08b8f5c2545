"""Boxes of detectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, cast, emits, like, refused, unchecked
from optkit.backends.coreml.quiet import mb
from optkit.dims import shape_of
from optkit.graph import constant

# What coremltools' own reader of PyTorch allows where the number of boxes is not known: the largest integer ends the process.
_MOST = 10000
# Each batch and class has operations of its own.
_EACH = 256
# What a number goes through on its way from the Min that bounds it.
_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def _refuse(node: ir.Node) -> str | None:
    shape = shape_of(node.inputs[1])
    if shape is not None:
        each = shape[:2]
        if any(not isinstance(n, int) for n in each):
            return "how many batches and classes it has is not fixed"
        if int(np.prod(each)) > _EACH:  # type: ignore[arg-type]
            return (
                f"its {each[0]} batches of {each[1]} classes: each is an operation, and at most {_EACH} are"
            )
    wanted = node.inputs[2] if len(node.inputs) > 2 else None
    if wanted is None or ((most := constant(wanted)) is not None and int(most.max()) <= 0):
        return "it asks for no boxes, and Core ML has no tensors without elements"
    for index, what in ((3, "iou_threshold"), (4, "score_threshold")):
        if (
            index < len(node.inputs)
            and node.inputs[index] is not None
            and constant(node.inputs[index]) is None
        ):
            return f"its {what} is computed, and Core ML's is constant"
    return None


@emits("NonMaxSuppression", refuse=_refuse, oldest=17)
def _non_max_suppression(c: Context, node: ir.Node) -> Any:
    """Core ML's own, once for each batch and class; then the places that hold a box, of all of them together.

    A class may have no box, and Core ML has no tensors without elements: no more is asked for than that one of them has one. As
    coremltools reads PyTorch's, places behind the last box hold -1; its documentation does not say so. Scores come out in order, so
    that those below the threshold are the last.
    """
    boxes, scores = c.input(node, 0), c.input(node, 1)
    each = scores.shape[:2]
    if not all(isinstance(n, int | np.integer) for n in each):
        raise refused(node, "how many batches and classes it has is not fixed")
    wanted = _wanted(c, node)
    overlap = float(np.asarray(known).reshape(-1)[0]) if (known := c.known(node, 3)) is not None else 0.0
    least = float(np.asarray(known).reshape(-1)[0]) if (known := c.known(node, 4)) is not None else None
    places = cast(_centred(boxes, center=bool(node.attributes.get_int("center_point_box", 0))), "fp32")
    size = boxes.shape[1]
    bound = wanted if isinstance(wanted, int) else _at_most(node.inputs[2])
    most = min(bound, int(size) if isinstance(size, int | np.integer) else _MOST)
    chosen, kept, of = [], [], []
    for batch in range(int(each[0])):
        for kind in range(int(each[1])):
            where = mb.slice_by_index(
                x=places, begin=[batch, 0, 0], end=[batch + 1, 0, 0], end_mask=[False, True, True]
            )
            score = cast(
                mb.slice_by_index(
                    x=scores,
                    begin=[batch, kind, 0],
                    end=[batch + 1, kind + 1, 0],
                    end_mask=[False, False, True],
                ),
                "fp32",
            )
            at, held = _chosen(where, score, most, overlap, least)
            if not isinstance(wanted, int):
                few = mb.less(x=np.arange(most, dtype=np.int32), y=mb.reshape(x=wanted, shape=[1]))
                held = mb.logical_and(x=held, y=few)
            chosen.append(at)
            kept.append(cast(held, "int32"))
            of.append(np.tile(np.array([batch, kind], np.int32), (most, 1)))
    if len(chosen) > 1:
        chosen, kept = ([mb.concat(values=values, axis=0)] for values in (chosen, kept))
    rows = mb.concat(values=[np.concatenate(of), mb.expand_dims(x=chosen[0], axes=[1])], axis=1)
    filled = mb.squeeze(x=mb.non_zero(x=kept[0]), axes=[1])
    return mb.gather(x=rows, indices=filled, axis=0, **unchecked(c))


def _chosen(boxes: Any, scores: Any, most: int, overlap: float, least: float | None) -> tuple[Any, Any]:
    """``[most]`` places among the boxes ``[1, 4, boxes]``, and which of them hold a box that is left."""
    chosen = mb.squeeze(
        x=mb.non_maximum_suppression(
            boxes=boxes, scores=scores, max_boxes=np.int32(most), iou_threshold=np.float32(overlap)
        )[2],
        axes=[0],
    )
    kept = mb.greater(x=chosen, y=np.int32(-1))
    if least is not None:
        at = mb.maximum(x=chosen, y=np.int32(0))
        values = mb.gather(x=mb.squeeze(x=scores, axes=[0, 1]), indices=at, axis=0, validate_indices=False)
        kept = mb.logical_and(x=kept, y=mb.greater(x=values, y=np.float32(least)))
    return chosen, kept


def _wanted(c: Context, node: ir.Node) -> Any:
    """How many boxes each class may have: a number, or a variable."""
    known = c.known_ints(node, 2)
    return known[0] if known else c.input(node, 2)


def _at_most(value: ir.Value | None) -> int:
    """What a number is never above, as far as the graph says."""
    producer = None if value is None else value.producer()
    if producer is None:
        return _MOST
    if producer.op_type == "Min":
        bounds = [constant(v) for v in producer.inputs]
        return min([_at_most(v) for v in producer.inputs] + [int(b.max()) for b in bounds if b is not None])
    return _at_most(producer.inputs[0]) if producer.op_type in _MOVES else _MOST


def _centred(boxes: Any, *, center: bool) -> Any:
    """``[batch, boxes, 4]`` as ``[batch, 4, boxes]`` with centres and sizes; which axis comes first makes no difference."""
    boxes = mb.transpose(x=boxes, perm=[0, 2, 1])
    if center:
        return boxes
    halves = mb.split(x=boxes, num_splits=2, axis=1)
    low, high = mb.minimum(x=halves[0], y=halves[1]), mb.maximum(x=halves[0], y=halves[1])
    size = mb.sub(x=high, y=low)
    # Of large coordinates the sum would lose more than the difference does.
    return mb.concat(values=[mb.add(x=low, y=mb.mul(x=size, y=like(size, 0.5))), size], axis=1)
