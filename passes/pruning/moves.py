"""What operators that move, choose and sum up values say of the labels of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant
from optkit.passes.pruning.vectors import editable

if TYPE_CHECKING:
    from optkit.passes.pruning.labelling import Axes, Labelling

_REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"


def _concat(work: Labelling, node: ir.Node) -> None:
    operands = [work.of(v) for v in node.inputs if v is not None]
    axis = node.attributes["axis"].as_int()
    out: Axes = []
    for position in range(len(operands[0])):
        found = [o[position] for o in operands]
        if position == axis % len(operands[0]):
            known = [a for a in found if isinstance(a, np.ndarray)]
            if len(known) == len(found):
                out.append(np.concatenate(known))
            else:
                for a in found:
                    work.labels.freeze(a, "concatenated with an axis of unknown size")
                out.append(None)
            continue
        for other in found[1:]:
            work.labels.join(found[0], other)
        out.append(found[0])
    work.axes[node.outputs[0]] = out


def _split(work: Labelling, node: ir.Node) -> None:
    x = work.of(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(x)
    labels, start = x[axis], 0
    sizes = [None if o.shape is None else o.shape[axis] for o in node.outputs]
    fixed = len(node.inputs) > 1 and node.inputs[1] is not None and not editable(node.inputs[1])
    if not isinstance(labels, np.ndarray) or fixed or not all(isinstance(n, int) for n in sizes):
        work.unknown(node)
        return
    if work.even and len(set(sizes)) == 1:
        for column in labels.reshape(len(sizes), -1).T:
            work.labels.join_all(column)
    for output, n in zip(node.outputs, sizes, strict=True):
        assert isinstance(n, int)
        work.axes[output] = [*x[:axis], labels[start : start + n], *x[axis + 1 :]]
        start += n


def _crop(work: Labelling, node: ir.Node) -> None:
    x = list(work.of(node.inputs[0]))
    given = [constant(v) if v is not None else None for v in node.inputs[1:]]
    starts, ends = given[0], given[1]
    if starts is None or ends is None:
        _touch_all(work, node, x)
        return
    axes = given[2] if len(given) > 2 and given[2] is not None else np.arange(len(starts))
    steps = given[3] if len(given) > 3 and given[3] is not None else np.ones(len(starts), np.int64)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        labels = x[int(axis)]
        if not isinstance(labels, np.ndarray):
            work.labels.freeze(labels, "cut by a Slice")
            continue
        if step != 1 or not all(editable(v) for v in node.inputs[1:3]):
            work.labels.freeze(labels, "cut by a Slice with steps")
        x[int(axis)] = labels[slice(int(start), int(end) if end < 2**62 else None, int(step))]
    work.axes[node.outputs[0]] = x


def _touch_all(work: Labelling, node: ir.Node, x: Axes) -> None:
    """The bounds depend on the inputs: axes that keep their size pass, others are frozen."""
    out = work.fresh(node.outputs[0])
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and len(a) == len(b) > 1:
            out[i] = a
        else:
            work.labels.freeze(a, f"cut by {node.op_type}")
            work.labels.freeze(b, f"cut by {node.op_type}")
    work.axes[node.outputs[0]] = out


def _transpose(work: Labelling, node: ir.Node) -> None:
    x = work.of(node.inputs[0])
    order = attribute(node, "perm", tuple(range(len(x)))[::-1])
    work.axes[node.outputs[0]] = [x[i] for i in order]  # type: ignore[attr-defined]


def _unsqueeze(work: Labelling, node: ir.Node) -> None:
    x, new = list(work.of(node.inputs[0])), constant(node.inputs[1])
    if new is None:
        work.unknown(node)
        return
    rank = len(x) + new.size
    made = {int(i) % rank for i in new.ravel()}
    rest = iter(x)
    out: Axes = []
    for position in range(rank):
        if position in made:
            out.append(work.one())
        else:
            out.append(next(rest))
    work.axes[node.outputs[0]] = out


def _squeeze(work: Labelling, node: ir.Node) -> None:
    x = work.of(node.inputs[0])
    gone = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if gone is None:
        work.unknown(node)
        return
    dropped = {int(i) % len(x) for i in gone.ravel()}
    for i in dropped:
        work.labels.freeze(x[i], "must be a single position")
    work.axes[node.outputs[0]] = [a for i, a in enumerate(x) if i not in dropped]


def _expand(work: Labelling, node: ir.Node) -> None:
    x, out = work.of(node.inputs[0]), work.fresh(node.outputs[0])
    ok = editable(node.inputs[1])
    for position in range(-len(out), 0):
        axis, fresh = x[position] if len(x) >= -position else work.one(), out[position]
        if isinstance(axis, np.ndarray) and isinstance(fresh, np.ndarray):
            if len(axis) == len(fresh) > 1:
                if not ok:
                    work.labels.freeze(axis, "its size is computed where the model runs")
                out[position] = axis
            else:
                work.labels.freeze(fresh, "copies")
        elif axis is not None and not isinstance(axis, np.ndarray):
            work.labels.freeze(axis, "copies")
    work.axes[node.outputs[0]] = out


def _reduce(work: Labelling, node: ir.Node) -> None:
    x = work.of(node.inputs[0])
    given = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    old = attribute(node, "axes")
    if given is None and old is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        work.unknown(node)
        return
    raw = given.ravel().tolist() if given is not None else list(old or range(len(x)))  # type: ignore[call-overload]
    gone = {int(i) % len(x) for i in raw}
    keep = attribute(node, "keepdims", 1)
    out: Axes = []
    for position, axis in enumerate(x):
        if position not in gone:
            out.append(axis)
            continue
        work.labels.freeze(axis, f"{node.op_type} runs over it")
        if keep:
            out.append(work.one())
    work.axes[node.outputs[0]] = out


def _gather(work: Labelling, node: ir.Node) -> None:
    x, index = work.of(node.inputs[0]), work.of(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(x)
    work.labels.freeze(x[axis], "chosen by index")
    work.axes[node.outputs[0]] = [*x[:axis], *index, *x[axis + 1 :]]


def _gather_parts(work: Labelling, node: ir.Node) -> None:
    x, index = work.of(node.inputs[0]), work.of(node.inputs[1])
    assert node.inputs[1] is not None and node.inputs[1].shape is not None
    depth = node.inputs[1].shape[-1]
    if attribute(node, "batch_dims", 0) or not isinstance(depth, int):
        work.unknown(node)
        return
    for axis in x[:depth]:
        work.labels.freeze(axis, "chosen by index")
    work.axes[node.outputs[0]] = [*index[:-1], *x[depth:]]


def _pad(work: Labelling, node: ir.Node) -> None:
    _touch_all(work, node, work.of(node.inputs[0]))


def _resize(work: Labelling, node: ir.Node) -> None:
    x, out = list(work.of(node.inputs[0])), work.fresh(node.outputs[0])
    # Sizes name channels too: only scales leave them open.
    by_scales = len(node.inputs) < 4 or node.inputs[3] is None or editable(node.inputs[3])
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        if (
            i == 1
            and by_scales
            and isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and len(a) == len(b)
        ):
            out[i] = a
        else:
            work.labels.freeze(a, "resized")
            work.labels.freeze(b, "resized")
    work.axes[node.outputs[0]] = out


RULES: dict[str, Callable[[Labelling, ir.Node], None]] = {
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    "Concat": _concat,
    "Split": _split,
    "Slice": _crop,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_parts,
    "Pad": _pad,
    "Resize": _resize,
}
