"""What operators do to shapes, and to the short vectors of integers that shapes are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, divide, minus, plus, quotient, remainder, shape_of, times
from optkit.graph import attribute, constant

Known = np.ndarray
"""A vector or scalar of integers; an element is a ``Dim``, a truth value, or None where nothing is known."""

Of = Callable[[ir.Value | None], Known | None]
"""Tells what is known about the elements of a value."""

Dims = Sequence[Dim | None]

_LONGEST = 64
# Exporters write one of these two for "to the end".
_TO_THE_END = np.iinfo(np.int32).max


def _equal(a: Dim | None, b: Dim | None) -> bool | None:
    if a is None or b is None:
        return None
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    # A size is never negative, so comparing one with -1 is decided.
    return False if any(isinstance(d, int) and d < 0 for d in (a, b)) else None


def _on_numbers(
    function: Callable[[int, int], int | bool],
) -> Callable[[Dim | None, Dim | None], int | bool | None]:
    return lambda a, b: function(a, b) if isinstance(a, int) and isinstance(b, int) else None


_BINARY: dict[str, Callable[[Dim | None, Dim | None], Dim | None]] = {
    "Add": plus,
    "Sub": minus,
    "Mul": times,
    "Div": divide,
    "Mod": remainder,
    "Equal": _equal,
    "Min": lambda a, b: a if a == b else _on_numbers(min)(a, b),
    "Max": lambda a, b: a if a == b else _on_numbers(max)(a, b),
    "Less": _on_numbers(lambda a, b: a < b),
    "Greater": _on_numbers(lambda a, b: a > b),
    "LessOrEqual": _on_numbers(lambda a, b: a <= b),
    "GreaterOrEqual": _on_numbers(lambda a, b: a >= b),
    "And": lambda a, b: False if a is False or b is False else (None if a is None or b is None else a and b),
    "Or": lambda a, b: True if a is True or b is True else (None if a is None or b is None else a or b),
}


def _objects(elements: Sequence[Dim | None] | Dim | None) -> Known:
    if isinstance(elements, Sequence) and not isinstance(elements, str):
        array = np.empty(len(elements), object)
        array[:] = elements
        return array
    scalar = np.empty((), object)
    scalar[()] = elements
    return scalar


def _shape(node: ir.Node, of: Of) -> Known | None:
    dims = shape_of(node.inputs[0])
    if dims is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
    return _objects(dims[slice(start, end)])


def _size(node: ir.Node, of: Of) -> Known | None:
    dims = shape_of(node.inputs[0])
    if dims is None:
        return None
    total: Dim | None = 1
    for dim in dims:
        total = times(total, dim)
    return _objects(total)


def _same(node: ir.Node, of: Of) -> Known | None:
    return of(node.inputs[0])


def _cast(node: ir.Node, of: Of) -> Known | None:
    like = node.inputs[1] if node.op_type == "CastLike" else None
    x, to = of(node.inputs[0]), node.attributes.get_int("to", 0) if like is None else like.dtype
    if x is None:
        # Ranges of integers come with bounds that are floats before.
        x = _whole(constant(node.inputs[0]))
    if x is None or to not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        return None
    if to == ir.DataType.BOOL:
        return _objects([bool(e) if isinstance(e, int) else None for e in x.flat]).reshape(x.shape)
    return _objects([int(e) if isinstance(e, bool) else e for e in x.flat]).reshape(x.shape)


def _whole(array: np.ndarray | None) -> Known | None:
    """A float that is a whole number."""
    if array is None or array.size != 1 or array.ndim > 1 or array.dtype.kind != "f":
        return None
    number = float(array.reshape(-1)[0])
    return _objects(int(number)).reshape(array.shape) if number.is_integer() else None


def _gather(node: ir.Node, of: Of) -> Known | None:
    x, indices = of(node.inputs[0]), of(node.inputs[1])
    if x is None or indices is None or x.ndim != 1 or node.attributes.get_int("axis", 0) not in (0, -1):
        return None
    if not all(isinstance(i, int) and -len(x) <= i < len(x) for i in indices.flat):
        return None
    return _objects([x[i] for i in indices.flat]).reshape(indices.shape)


def _slice(node: ir.Node, of: Of) -> Known | None:
    x = of(node.inputs[0])
    bounds = [of(v) for v in node.inputs[1:]]
    if (
        x is None
        or x.ndim != 1
        or any(b is None or b.size != 1 or not isinstance(b.flat[0], int) for b in bounds)
    ):
        return None
    numbers = [int(b.flat[0]) for b in bounds if b is not None]
    step = numbers[3] if len(numbers) > 3 else 1
    return x[slice(numbers[0], numbers[1], step)] if step > 0 else None


def _concat(node: ir.Node, of: Of) -> Known | None:
    parts = [of(v) for v in node.inputs]
    if any(p is None or p.ndim != 1 for p in parts):
        parts = [
            p if p is not None and p.ndim == 1 else _unknown(v)
            for p, v in zip(parts, node.inputs, strict=True)
        ]
    if any(p is None for p in parts) or not any(of(v) is not None for v in node.inputs):
        return None
    return np.concatenate([p for p in parts if p is not None])


def _unknown(value: ir.Value | None) -> Known | None:
    """A vector of known length and unknown elements."""
    dims = shape_of(value)
    if dims is None or len(dims) != 1 or not isinstance(dims[0], int) or dims[0] > _LONGEST:
        return None
    return np.full(dims[0], None, object)


def _flat(node: ir.Node, of: Of) -> Known | None:
    """Unsqueeze and Squeeze between scalars and vectors."""
    x = of(node.inputs[0])
    if x is None or x.size != 1:
        return x if x is not None and node.op_type == "Squeeze" and x.ndim == 1 and x.size != 1 else None
    if node.op_type == "Unsqueeze":
        return x.reshape(1) if x.ndim == 0 else None
    return x.reshape(())


def _reshape(node: ir.Node, of: Of) -> Known | None:
    x, target = of(node.inputs[0]), of(node.inputs[1])
    if x is None or target is None or target.size > 1:
        return None
    if target.size == 0:
        return x.reshape(()) if x.size == 1 else None
    return x.reshape(-1) if target[0] in (-1, x.size) else None


def _constant_of_shape(node: ir.Node, of: Of) -> Known | None:
    target, held = of(node.inputs[0]), attribute(node, "value")
    if target is None or target.size > 1 or (target.size and not isinstance(target[0], int)):
        return None
    if target.size and not 0 <= target[0] <= _LONGEST:
        return None
    fill = 0 if held is None else held.numpy().item()  # type: ignore[attr-defined]
    if held is None or not isinstance(fill, int):
        return None
    return np.full(tuple(target), fill, object)


def _expand(node: ir.Node, of: Of) -> Known | None:
    x, target = of(node.inputs[0]), of(node.inputs[1])
    if x is None or target is None or target.size != 1 or not isinstance(target[0], int):
        return None
    if not 0 < target[0] <= _LONGEST or (x.size not in (1, target[0]) and target[0] != 1):
        return None
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, (target[0],)))


def _where(node: ir.Node, of: Of) -> Known | None:
    condition, a, b = (of(v) for v in node.inputs)
    if condition is None or a is None or b is None:
        return None
    condition, a, b = np.broadcast_arrays(condition, a, b)
    picked = [
        (x if c else y) if isinstance(c, bool) else (x if x == y else None)
        for c, x, y in zip(condition.flat, a.flat, b.flat, strict=True)
    ]
    return _objects(picked).reshape(condition.shape)


def _range(node: ir.Node, of: Of) -> Known | None:
    bounds = [of(v) for v in node.inputs]
    if any(b is None or b.size != 1 or not isinstance(b.flat[0], int) for b in bounds):
        return None
    found = range(*(int(b.flat[0]) for b in bounds if b is not None))
    return _objects(list(found)) if len(found) <= _LONGEST else None


def _reduce_prod(node: ir.Node, of: Of) -> Known | None:
    x = of(node.inputs[0])
    if x is None or x.ndim != 1:
        return None
    axes = of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else _objects([0])
    if axes is None or axes.size != 1:
        return None
    total: Dim | None = 1
    for element in x:
        total = times(total, element)
    return _objects([total] if node.attributes.get_int("keepdims", 1) else total)


def _neg(node: ir.Node, of: Of) -> Known | None:
    x = of(node.inputs[0])
    return (
        None if x is None else _objects([-e if isinstance(e, int) else None for e in x.flat]).reshape(x.shape)
    )


def _not(node: ir.Node, of: Of) -> Known | None:
    x = of(node.inputs[0])
    return (
        None
        if x is None
        else _objects([not e if isinstance(e, bool) else None for e in x.flat]).reshape(x.shape)
    )


_EVALUATE: dict[str, Callable[[ir.Node, Of], Known | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "CastLike": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _flat,
    "Squeeze": _flat,
    "Reshape": _reshape,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Where": _where,
    "Range": _range,
    "ReduceProd": _reduce_prod,
    "Neg": _neg,
    "Not": _not,
}


def evaluate(node: ir.Node, of: Of) -> Known | None:
    """What is known about the output of ``node``, a short vector or scalar of integers or truth values.

    Args:
        node: Of the standard domain.
        of: Tells what is known about an input.
    """
    if (rule := _EVALUATE.get(node.op_type)) is not None:
        found = rule(node, of)
        return found if found is not None and found.size <= _LONGEST else None
    binary = _BINARY.get(node.op_type)
    if binary is None or len(node.inputs) != 2:
        return None
    a, b = of(node.inputs[0]), of(node.inputs[1])
    if a is None or b is None or (a.ndim and b.ndim and len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    a, b = np.broadcast_arrays(a, b)
    return _objects([binary(x, y) for x, y in zip(a.flat, b.flat, strict=True)]).reshape(a.shape)


def _product(dims: Dims) -> Dim | None:
    total: Dim | None = 1
    for dim in dims:
        total = times(total, dim)
    return total


def _reshaped(node: ir.Node, of: Of) -> Dims | None:
    x, target = shape_of(node.inputs[0]), of(node.inputs[1])
    if target is None:
        target = _unknown(node.inputs[1])
    if target is None or target.ndim != 1:
        return None
    keep_zero = attribute(node, "allowzero", 0)
    dims: list[Dim | None] = []
    for index, dim in enumerate(target):
        if dim == 0 and not keep_zero:
            dims.append(x[index] if x is not None and index < len(x) else None)
        else:
            dims.append(None if dim == -1 else dim)
    # One axis that is not known is what the others leave over.
    missing = [i for i, d in enumerate(dims) if d is None]
    if len(missing) == 1 and x is not None:
        others = [d for d in dims if d is not None]
        dims[missing[0]] = quotient(_product(x), _product(others))
    return dims


def _expanded(node: ir.Node, of: Of) -> Dims | None:
    x, target = shape_of(node.inputs[0]), of(node.inputs[1])
    if target is None:
        target = _unknown(node.inputs[1])
    if x is None or target is None or target.ndim != 1:
        return None
    return broadcast(x, tuple(target))


def broadcast(a: Dims, b: Dims) -> Dims:
    """The shape that two shapes broadcast to."""
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b), strict=True)
    dims: list[Dim | None] = []
    for x, y in pairs:
        if x == 1 or x == y:
            dims.append(y)
        elif y == 1 or (isinstance(x, int) and not isinstance(y, int)):
            dims.append(x)
        else:
            dims.append(y if isinstance(y, int) and not isinstance(x, int) else None)
    return dims


def _elementwise(node: ir.Node, of: Of) -> Dims | None:
    dims: Dims | None = ()
    for value in node.inputs:
        shape = shape_of(value)
        if shape is None or dims is None:
            return None
        dims = broadcast(dims, shape)
    return dims


def _filled(node: ir.Node, of: Of) -> Dims | None:
    target = of(node.inputs[0])
    if target is None:
        target = _unknown(node.inputs[0])
    return None if target is None or target.ndim != 1 else list(target)


def _ranged(node: ir.Node, of: Of) -> Dims | None:
    bounds = [of(v) for v in node.inputs]
    start, limit, step = (None if b is None or b.size != 1 else b.flat[0] for b in bounds)
    if start == 0 and step == 1 and limit is not None:
        return [limit if not isinstance(limit, int) else max(limit, 0)]
    if isinstance(start, int) and isinstance(limit, int) and isinstance(step, int) and step:
        return [len(range(start, limit, step))]
    return [None]


def _tiled(node: ir.Node, of: Of) -> Dims | None:
    x, repeats = shape_of(node.inputs[0]), of(node.inputs[1])
    if x is None:
        return None
    if repeats is None or len(repeats) != len(x):
        return [None] * len(x)
    return [times(d, r) for d, r in zip(x, repeats, strict=True)]


def _sliced(node: ir.Node, of: Of) -> Dims | None:
    x = shape_of(node.inputs[0])
    if x is None:
        return None
    starts, ends = of(node.inputs[1]), of(node.inputs[2])
    axes = of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = of(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if axes is None:
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return [None] * len(x)
        length = next((len(v) for v in (starts, ends) if v is not None), None)
        if length is None:
            return [None] * len(x)
        axes = _objects(list(range(length)))
    dims = list(x)
    for index, axis in enumerate(axes):
        if not isinstance(axis, int) or not -len(x) <= axis < len(x):
            return [None] * len(x)
        step = (
            1 if len(node.inputs) < 5 or node.inputs[4] is None else (None if steps is None else steps[index])
        )
        start, end = (None if v is None else v[index] for v in (starts, ends))
        dims[axis] = _cut(x[axis], start, end, step)
    return dims


def _cut(size: Dim | None, start: Dim | None, end: Dim | None, step: Dim | None) -> Dim | None:
    """How much a slice leaves of an axis."""
    if (
        isinstance(size, int)
        and isinstance(start, int)
        and isinstance(end, int)
        and isinstance(step, int)
        and step
    ):
        last = end if step > 0 or end >= -size else None
        return len(range(size)[slice(start, last, step)])
    if step != 1 or size is None:
        return None
    if end == size or (isinstance(end, int) and end >= _TO_THE_END):
        return size if start == 0 else None
    return None


def _resized(node: ir.Node, of: Of) -> Dims | None:
    x = shape_of(node.inputs[0])
    sizes = of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if (
        x is None
        or attribute(node, "axes") is not None
        or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        return None
    if sizes is not None and len(sizes) == len(x):
        return list(sizes)
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if scales is None or len(scales) != len(x):
        return [None] * len(x)
    dims: list[Dim | None] = []
    for dim, scale in zip(x, scales, strict=True):
        if isinstance(dim, int):
            dims.append(int(np.floor(dim * scale)))
        else:
            dims.append(times(dim, int(scale)) if scale == int(scale) else None)
    return dims


def _joined(node: ir.Node, of: Of) -> Dims | None:
    shapes = [shape_of(v) for v in node.inputs]
    if any(s is None or len(s) != len(shapes[0] or ()) for s in shapes):
        return None
    known = [s for s in shapes if s is not None]
    axis = node.attributes.get_int("axis", 0) % max(len(known[0]), 1)
    dims: list[Dim | None] = []
    for index, column in enumerate(zip(*known, strict=True)):
        if index == axis:
            total: Dim | None = 0
            for dim in column:
                total = plus(total, dim)
            dims.append(total)
        else:
            # The axes are equal, whatever they are called.
            dims.append(min(column, key=lambda d: (not isinstance(d, int), d is None)))
    return dims


_SHAPE: dict[str, Callable[[ir.Node, Of], Dims | None]] = {
    "Reshape": _reshaped,
    "Expand": _expanded,
    "ConstantOfShape": _filled,
    "Range": _ranged,
    "Tile": _tiled,
    "Slice": _sliced,
    "Resize": _resized,
    "Concat": _joined,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Where", "Equal", "And", "Or", "Min", "Max"), _elementwise),
}


def shape(node: ir.Node, of: Of) -> Dims | None:
    """The shape of the output, for operators that ONNX infers only with numbers for every axis."""
    rule = _SHAPE.get(node.op_type)
    return None if rule is None else rule(node, of)
