"""Reshapes: which axis carries the channels where axes are merged and split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.passes.pruning.labels import Axis, Product
from optkit.passes.pruning.vectors import editable

if TYPE_CHECKING:
    from optkit.passes.pruning.labelling import Axes, Labelling


def _flatten(work: Labelling, node: ir.Node) -> None:
    _reshape(work, node, ok=True)


def _by_reshape(work: Labelling, node: ir.Node) -> None:
    _reshape(work, node, ok=editable(node.inputs[1]))


def _reshape(work: Labelling, node: ir.Node, *, ok: bool) -> None:
    x, out = work.of(node.inputs[0]), work.fresh(node.outputs[0])
    before, after = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    left = 0
    while left < min(len(before), len(after)) and before[left] == after[left]:
        out[left] = x[left]
        left += 1
    right = 0
    while right < min(len(before), len(after)) - left and before[-1 - right] == after[-1 - right]:
        out[-1 - right] = x[-1 - right]
        right += 1
    a, b = list(range(left, len(before) - right)), list(range(left, len(after) - right))
    merged = x[a[0]] if len(a) == 1 else None
    old, new = ([n for i in at if isinstance(n := of[i], int)] for at, of in ((a, before), (b, after)))
    if any(isinstance(x[i], Product) for i in a) or len(old) < len(a) or len(new) < len(b):
        if len(a) > 1 and len(b) == 1 and not any(isinstance(x[i], Product) for i in a):
            out[b[0]] = Product(tuple(x[i] for i in a), tuple(before[i] for i in a))
        elif isinstance(merged, Product) and _fits(merged.sizes, [after[i] for i in b]):
            for i, axis in zip(b, merged.axes, strict=True):
                out[i] = axis
        else:
            _lose(work, (*(x[i] for i in a), *(out[i] for i in b)))
    else:
        for part_a, part_b in [] if 0 in old or 0 in new else _segments(old, new):
            made = _regroup(work, node, [x[a[i]] for i in part_a], [new[i] for i in part_b])
            for i, axis in zip(part_b, made, strict=True):
                out[b[i]] = axis
    if not ok:
        for axis in out:
            work.labels.freeze(axis, "reshaped to a size that is computed where the model runs")
    work.axes[node.outputs[0]] = out


def _lose(work: Labelling, axes: Sequence[Axis]) -> None:
    for axis in axes:
        work.labels.freeze(axis, "reshaped together with an axis of unknown size")


def _regroup(work: Labelling, node: ir.Node, axes: Axes, sizes: list[int]) -> Axes:
    """Merge ``axes`` into one and split it into ``sizes``; one axis carries the channels, the others are frozen."""
    out = [work.labels.fresh(n) for n in sizes]
    known = [a for a in axes if isinstance(a, np.ndarray)]
    if len(known) < len(axes):
        _lose(work, (*axes, *out))
        return list(out)
    merged = known[0] if len(known) == 1 else _merge(work, node, known)
    if len(sizes) == 1:
        return [merged]
    candidates = [i for i, n in enumerate(sizes) if n > 1]
    work.candidates.setdefault(node, [out[i] for i in candidates])
    chosen = candidates[min(work.choices.get(node, 0), len(candidates) - 1)] if candidates else 0
    blocks = np.moveaxis(merged.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1)
    for k, block in enumerate(blocks):
        work.labels.join_all([out[chosen][k], *block])
    for i, axis in enumerate(out):
        if i != chosen:
            work.labels.freeze(axis, "inside of a head, or apart from channels")
    return list(out)


def _merge(work: Labelling, node: ir.Node, axes: Sequence[np.ndarray]) -> np.ndarray:
    sizes = [len(a) for a in axes]
    candidates = [i for i, a in enumerate(axes) if len(a) > 1 and not work.labels.is_frozen(a)]
    if len(candidates) > 1:
        work.candidates.setdefault(node, [axes[i] for i in candidates])
    chosen = candidates[min(work.choices.get(node, 0), len(candidates) - 1)] if candidates else 0
    for i, axis in enumerate(axes):
        if i != chosen:
            work.labels.freeze(axis, "merged with channels")
    view = axes[chosen].reshape([-1 if i == chosen else 1 for i in range(len(sizes))])
    return np.broadcast_to(view, sizes).reshape(-1)


def _sizes(value: ir.Value | None) -> list[int | str]:
    assert value is not None
    assert value.shape is not None
    return [d if isinstance(d, int) else f"?{d.value if d.value is not None else id(d)}" for d in value.shape]


def _fits(old: Sequence[int | str], new: Sequence[int | str]) -> bool:
    """Whether sizes are the same, but for the name of the one that is not known."""
    return (
        len(old) == len(new)
        and all(a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in zip(old, new, strict=True))
        and sum(isinstance(a, str) for a in old) <= 1
    )


def _segments(a: list[int], b: list[int]) -> list[tuple[list[int], list[int]]]:
    """The finest split of both lists into runs with equal products, as indices."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        part_a, part_b = ([i], [j]) if i < len(a) and j < len(b) else ([], [])
        if not part_a:
            # What is left are ones.
            if not found:
                return []
            found[-1][0].extend(range(i, len(a)))
            found[-1][1].extend(range(j, len(b)))
            break
        while (p := math.prod(a[k] for k in part_a)) != (q := math.prod(b[k] for k in part_b)):
            if p < q:
                part_a.append(part_a[-1] + 1)
            else:
                part_b.append(part_b[-1] + 1)
        i, j = part_a[-1] + 1, part_b[-1] + 1
        found.append((part_a, part_b))
    return found


RULES: dict[str, Callable[[Labelling, ir.Node], None]] = {"Flatten": _flatten, "Reshape": _by_reshape}
