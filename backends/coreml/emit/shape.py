"""Operators that move values about without computing with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import (  # fmt: skip
    INT32,
    Context,
    cast,
    emits,
    is_float,
    like,
    name_of,
    narrow,
    refused,
    static,
    through_floats,
    through_ints,
    unchecked,
    wide,
)
from optkit.backends.coreml.quiet import mb, mil, types
from optkit.graph import attribute, ints


@emits("Shape")
def _shape(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    start, end = node.attributes.get_int("start", 0), attribute(node, "end")
    sizes = mb.shape(x=x)
    if start == 0 and end is None:
        return sizes
    chosen = list(range(x.rank))[start : None if end is None else int(end)]  # type: ignore[call-overload]
    if not chosen:
        raise refused(node, "an empty part of a shape")
    return mb.slice_by_index(x=sizes, begin=[chosen[0]], end=[chosen[-1] + 1])


@emits("Size")
def _size(c: Context, node: ir.Node) -> Any:
    return mb.reduce_prod(x=mb.shape(x=c.input(node, 0)), axes=[0], keep_dims=False)


@emits("Reshape")
def _reshape(c: Context, node: ir.Node) -> Any:
    x, known = c.input(node, 0), c.partly(node, 1)
    sizes: list[Any] = list(known)
    if node.attributes.get_int("allowzero", 0) and 0 in sizes:
        raise refused(node, "a tensor without elements")
    own = c.sizes(x) if 0 in sizes else []
    if None in sizes or not sizes:
        shape = c.input(node, 1)
        count = shape.shape[0]
        if not isinstance(count, int | np.integer):
            raise refused(node, "the rank depends on the inputs")
        sizes = sizes or [None] * int(count)
        sizes = [
            mb.slice_by_index(x=shape, begin=[i], end=[i + 1]) if s is None else s
            for i, s in enumerate(sizes)
        ]
    sizes = [own[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    if not sizes:
        return mb.squeeze(x=x, axes=list(range(x.rank)))
    free = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    if len(free) == 1 and -1 not in sizes:
        sizes[free[0]] = -1
    return c.reshape(x, sizes)


@emits("Flatten")
def _flatten(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    axis = node.attributes.get_int("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    sizes = c.sizes(x)
    rows, columns = c.product(sizes[:axis]), c.product(sizes[axis:])
    return c.reshape(
        x, [rows, -1] if isinstance(rows, int) or not isinstance(columns, int) else [-1, columns]
    )


@emits("Transpose")
def _transpose(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    perm = ints(node, "perm") or list(range(x.rank))[::-1]
    return through_ints(x, lambda v: mb.transpose(x=v, perm=perm))


@emits("Squeeze")
def _squeeze(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    axes = c.known_ints(node, 1) if c.has(node, 1) else ints(node, "axes") or None
    if c.has(node, 1) and axes is None:
        raise refused(node, "the axes are computed at run time")
    axes = [i for i, d in enumerate(x.shape) if d == 1] if axes is None else axes
    if not axes:
        return mb.identity(x=x)
    axes = [a % x.rank for a in axes]
    if any(x.shape[a] != 1 for a in axes):
        # A free size that has to be 1.
        return c.reshape(x, [s for a, s in enumerate(c.sizes(x)) if a not in axes])
    return through_ints(x, lambda v: mb.squeeze(x=v, axes=axes))


@emits("Unsqueeze")
def _unsqueeze(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    axes = c.known_ints(node, 1) if c.has(node, 1) else ints(node, "axes") or None
    if axes is None:
        raise refused(node, "the axes are computed at run time")
    return through_ints(x, lambda v: mb.expand_dims(x=v, axes=axes))


@emits("Concat")
def _concat(c: Context, node: ir.Node) -> Any:
    parts = [wide(v) for v in c.inputs(node)]
    axis = node.attributes.get_int("axis", 0)
    # Core ML has no tensors without elements; what is joined with one is what is left.
    parts = [p for p in parts if p.shape[axis] != 0] or parts[:1]
    if len(parts) == 1:
        return mb.identity(x=parts[0])
    if parts[0].dtype == types.bool:
        joined = mb.concat(values=[cast(p, "int32") for p in parts], axis=axis)
        return mb.cast(x=joined, dtype="bool")
    return mb.concat(values=parts, axis=axis)


@emits("Split")
def _split(c: Context, node: ir.Node) -> Any:
    x, axis, count = c.input(node, 0), node.attributes.get_int("axis", 0), len(node.outputs)
    sizes = c.known_ints(node, 1) if c.has(node, 1) else ints(node, "split") or None
    if sizes is None and c.has(node, 1):
        return _parts(c, node, x, axis % x.rank)
    if sizes is None:
        if not isinstance(x.shape[axis], int | np.integer):
            raise refused(node, "Core ML needs the sizes of the parts when it is compiled")
        whole = int(x.shape[axis])
        each = -(-whole // count)
        sizes = [each] * (count - 1) + [whole - each * (count - 1)]
    if count == 1:
        return mb.identity(x=x)
    if 0 in sizes:
        raise refused(node, "a part without elements")
    return mb.split(x=x, split_sizes=sizes, axis=axis)


def _parts(c: Context, node: ir.Node, x: Any, axis: int) -> list[Any]:
    """One slice after the other, of sizes that are computed at run time."""
    sizes, parts = c.input(node, 1), []
    end: Any = None
    for i in range(len(node.outputs)):
        begin, size = end, mb.slice_by_index(x=sizes, begin=[i], end=[i + 1])
        end = size if begin is None else mb.add(x=begin, y=size)
        begins: list[Any] = [0] * x.rank
        ends: list[Any] = [0] * x.rank
        begins[axis], ends[axis] = 0 if begin is None else begin, end
        parts.append(
            mb.slice_by_index(
                x=x, begin=c.shape(begins), end=c.shape(ends), end_mask=[a != axis for a in range(x.rank)]
            )
        )
    return parts


def _bounds(begin: int, end: int, step: int, size: int | None) -> tuple[int, int, bool, bool]:
    """Begin, end and whether each is the end of the axis, as slice_by_index takes them."""
    if size is not None:
        chosen = range(size)[begin:end:step]
        begin, end = chosen.start, chosen.stop
        return begin, max(end, 0), False, step < 0 and end < 0
    first = begin == 0 if step > 0 else begin >= INT32.max
    last = end >= INT32.max if step > 0 else end <= INT32.min + 1
    return (0 if first else begin), (0 if last else end), first, last


@emits("Slice")
def _slice(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    starts, ends = c.partly(node, 1), c.partly(node, 2)
    count = max(len(starts), len(ends)) or int(c.input(node, 1).shape[0])
    axes = c.known_ints(node, 3) if c.has(node, 3) else list(range(count))
    steps = c.known_ints(node, 4) if c.has(node, 4) else [1] * count
    if axes is None or steps is None:
        raise refused(node, "the axes or the steps of a slice are computed at run time")
    begins: list[Any] = [0] * x.rank
    stops: list[Any] = [0] * x.rank
    strides, first, last = [1] * x.rank, [True] * x.rank, [True] * x.rank
    for i, axis in enumerate(axes):
        at = axis % x.rank
        size = x.shape[at]
        strides[at] = steps[i]
        begin, end = starts[i] if starts else None, ends[i] if ends else None
        if begin is not None and end is not None:
            fixed = int(size) if isinstance(size, int | np.integer) else None
            begins[at], stops[at], first[at], last[at] = _bounds(begin, end, steps[i], fixed)
            if fixed is not None and not range(fixed)[begin : end : steps[i]]:
                raise refused(node, "a slice without elements")
            continue
        first[at] = last[at] = False
        begins[at] = _bound(c, node, i, 1, begin)
        if end is not None and end >= INT32.max and steps[i] > 0:
            last[at] = True
        else:
            stops[at] = _bound(c, node, i, 2, end)
    return through_ints(
        x,
        lambda v: mb.slice_by_index(
            x=v, begin=c.shape(begins), end=c.shape(stops), stride=strides, begin_mask=first, end_mask=last
        ),
    )


def _bound(c: Context, node: ir.Node, i: int, index: int, known: int | None) -> Any:
    """One bound of a slice, as a number or as a variable ``[1]``."""
    if known is not None:
        return int(np.clip(known, INT32.min, INT32.max))
    return mb.slice_by_index(x=c.input(node, index), begin=[i], end=[i + 1])


@emits("Expand")
def _expand(c: Context, node: ir.Node) -> Any:
    x, sizes = c.input(node, 0), c.known_ints(node, 1)
    own = static(x)
    if sizes is not None and own is not None:
        full = [1] * (len(sizes) - len(own)) + own
        wanted = [1] * (len(full) - len(sizes)) + sizes
        if len(full) > len(own):
            x = c.reshape(x, full)
        repeats = [w if have == 1 else 1 for have, w in zip(full, wanted, strict=True)]
        if all(r == 1 for r in repeats):
            return mb.identity(x=x)
        return through_ints(x, lambda v: mb.tile(x=v, reps=repeats))
    shape = np.asarray(sizes, np.int32) if sizes is not None else c.input(node, 1)

    def spread(v: Any) -> Any:
        return mb.mul(x=v, y=mb.fill(shape=shape, value=like(v, 1)))

    return through_ints(wide(x), spread)


@emits("Tile")
def _tile(c: Context, node: ir.Node) -> Any:
    x, repeats = c.input(node, 0), c.known(node, 1)
    reps = c.input(node, 1) if repeats is None else narrow(repeats, "repeats")
    return through_ints(x, lambda v: mb.tile(x=v, reps=reps))


@emits("ConstantOfShape")
def _filled(c: Context, node: ir.Node) -> Any:
    tensor = attribute(node, "value")
    value = np.float32(0) if tensor is None else narrow(tensor.numpy(), "the value").reshape(-1)[0]  # type: ignore[attr-defined]
    sizes = c.known_ints(node, 0)
    if sizes is not None:
        return mb.const(val=np.full(sizes, value))
    if isinstance(value, np.bool_):
        return mb.cast(x=mb.fill(shape=c.input(node, 0), value=np.int32(value)), dtype="bool")
    return mb.fill(shape=c.input(node, 0), value=value)


@emits("Range")
def _range(c: Context, node: ir.Node) -> Any:
    start, end, step = c.inputs(node)
    return mb.range_1d(start=start, end=end, step=step)


def _refuse_eye(node: ir.Node) -> str | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is not None and shape.is_static() else "EyeLike of free size"


@emits("EyeLike", refuse=_refuse_eye)
def _eye(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    eye = np.eye(int(x.shape[0]), int(x.shape[1]), node.attributes.get_int("k", 0), np.float32)
    return cast(mb.const(val=eye), name_of(wide(x)))


_PADS = frozenset({"constant", "reflect", "edge", "wrap"})
# Core ML's names of modes that repeat values.
_OWN = {"reflect": "reflect", "edge": "replicate"}


def _refuse_pad(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "constant")
    return None if mode in _PADS else f"Core ML has no mode {mode!r}"


@emits("Pad", refuse=_refuse_pad)
def _pad(c: Context, node: ir.Node) -> Any:
    return through_ints(wide(c.input(node, 0)), lambda x: _padded(c, node, x))


def _padded(c: Context, node: ir.Node, x: Any) -> Any:
    mode = node.attributes.get_string("mode", "constant")
    amounts = c.known_ints(node, 1)
    if amounts is None:
        if mode != "constant" or c.has(node, 3) or _computed(c, node):
            raise refused(node, "pads that are computed at run time")
        flat = mb.transpose(x=mb.reshape(x=c.input(node, 1), shape=[2, x.rank]), perm=[1, 0])
        return mb.pad(
            x=x, pad=mb.reshape(x=flat, shape=[-1]), mode="constant", constant_val=_fill(c, node, x)
        )
    axes = c.known_ints(node, 3) if c.has(node, 3) else list(range(x.rank))
    if axes is None:
        raise refused(node, "the axes are computed at run time")
    pairs = [(0, 0)] * x.rank
    for i, axis in enumerate(axes):
        pairs[axis % x.rank] = (amounts[i], amounts[i + len(axes)])
    if any(p < 0 for pair in pairs for p in pair):
        cut = [(max(0, -low), max(0, -high)) for low, high in pairs]
        x = mb.slice_by_index(
            x=x, begin=[low for low, _ in cut], end=[-high for _, high in cut],
            begin_mask=[low == 0 for low, _ in cut], end_mask=[high == 0 for _, high in cut],
        )  # fmt: skip
        pairs = [(max(0, low), max(0, high)) for low, high in pairs]
    if not any(p for pair in pairs for p in pair):
        return mb.identity(x=x)
    if mode == "constant" and _computed(c, node):
        return _framed(c, x, pairs, cast(wide(c.input(node, 2)), name_of(x)))
    if mode == "constant" and not is_float(x):
        return _framed(c, x, pairs, _fill(c, node, x))
    if mode == "constant":
        flat = [p for pair in pairs for p in pair]
        return mb.pad(x=x, pad=flat, mode="constant", constant_val=_fill(c, node, x))
    return _mirrored(c, node, x, pairs, mode)


def _framed(c: Context, x: Any, pairs: list[tuple[int, int]], value: Any) -> Any:
    """One value around ``x``, where Core ML's own operation does not pad: integers, or with what is computed."""
    computed = isinstance(value, mil.Var)
    for axis, amounts in enumerate(pairs):
        sides = []
        for amount in amounts:
            shape = c.shape([amount if a == axis else size for a, size in enumerate(c.sizes(x))])
            side = mb.fill(shape=shape, value=like(x, 1) if computed else value) if amount else None
            sides.append(mb.mul(x=side, y=value) if computed and amount else side)
        parts = [part for part in (sides[0], x, sides[1]) if part is not None]
        x = mb.concat(values=parts, axis=axis) if len(parts) > 1 else x
    return x


def _mirrored(c: Context, node: ir.Node, x: Any, pairs: list[tuple[int, int]], mode: str) -> Any:
    """Pads that repeat values, which Core ML has for the last two axes of floats alone; else by the places of these."""
    own = _OWN.get(mode) if is_float(x) else None
    if own is not None and x.rank < 2:
        out = mb.pad(x=mb.expand_dims(x=x, axes=[0]), pad=[0, 0, *pairs[0]], mode=own)
        return mb.squeeze(x=out, axes=[0])
    for axis, pair in enumerate(pairs if own is None else pairs[:-2]):
        if not any(pair):
            continue
        if not isinstance(x.shape[axis], int | np.integer):
            raise refused(node, f"mode {mode!r} on an axis of free size, but of the last two of floats")
        places = np.pad(np.arange(int(x.shape[axis])), pair, mode)  # type: ignore[call-overload]
        x = mb.gather(x=x, indices=places.astype(np.int32), axis=axis, **unchecked(c))
    inner = [p for pair in pairs[-2:] for p in pair]
    return mb.pad(x=x, pad=inner, mode=own) if own is not None and any(inner) else x


def _computed(c: Context, node: ir.Node) -> bool:
    """Whether the value of the pads is known at run time alone."""
    return c.has(node, 2) and c.known(node, 2) is None


def _fill(c: Context, node: ir.Node, x: Any) -> Any:
    value = c.known(node, 2)
    number = 0 if value is None else value.reshape(-1)[0]
    return like(x, number) if is_float(x) or x.dtype == types.int32 else number


@emits("DepthToSpace")
def _depth_to_space(c: Context, node: ir.Node) -> Any:
    block = node.attributes.get_int("blocksize", 1)
    if node.attributes.get_string("mode", "DCR") == "DCR":
        return through_floats(c.input(node, 0), lambda x: mb.depth_to_space(x=x, block_size=block))
    return through_floats(c.input(node, 0), lambda x: mb.pixel_shuffle(x=x, upscale_factor=block))


@emits("SpaceToDepth")
def _space_to_depth(c: Context, node: ir.Node) -> Any:
    block = node.attributes.get_int("blocksize", 1)
    return through_floats(c.input(node, 0), lambda x: mb.space_to_depth(x=x, block_size=block))


@emits("NonZero")
def _non_zero(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    return mb.transpose(x=mb.non_zero(x=cast(x, "int32") if x.dtype == types.bool else x), perm=[1, 0])


@emits("ReverseSequence")
def _reverse_sequence(c: Context, node: ir.Node) -> Any:
    x, lengths = c.inputs(node)
    batch, along = node.attributes.get_int("batch_axis", 1), node.attributes.get_int("time_axis", 0)
    return mb.reverse_sequence(x=x, lengths=lengths, seq_axis=along, batch_axis=batch)
