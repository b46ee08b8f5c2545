"""What a mask of attention lets each query see, read from how it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import attribute, constant, scalar

_MOVES = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape"})
_ROW, _COLUMN = -2, -1
HIDDEN = -1e4
"""What is not above it hides keys: exporters write this and lower numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What queries see of the keys.

    Attributes:
        causal: No query sees keys behind its own place; the first query stands at the first key.
        last: The same, but the last query stands at the last key.
        window: How many keys a query sees, that at its own place included; 0 for all.
        keys: Condition of ``[batch or 1, 1, 1, keys]`` for whether a key is seen at all; None where all are.
    """

    causal: bool = False
    last: bool = False
    window: int = 0
    keys: ir.Value | None = None


class _Unknown(Exception):
    """Why a mask cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """``column <= row + offset`` (``upper``) or ``column >= row + offset``; ``past``: rows start behind the keys of a cache."""

    upper: bool
    offset: int
    past: bool

    def turned(self) -> _Bound:
        return replace(self, upper=not self.upper, offset=self.offset + (1 if self.upper else -1))


def sight(mask: ir.Value, keys: ir.Value | None) -> Sight | str:
    """What ``mask``, which is added to the scores, lets queries see; or why that is not known.

    Args:
        mask: ``[queries, keys]``, perhaps with axes before.
        keys: ``[batch, heads, keys, depth]``, for whether a cache stands before them; None where nobody asks.
    """
    try:
        shown = _shown(mask)
        parts = list(_conditions(*_hidden(mask), keys) if shown is None else _band(shown, mask))
    except _Unknown as why:
        return str(why)
    bounds = [p for p in parts if isinstance(p, _Bound)]
    seen = [p for p in parts if isinstance(p, ir.Value)]
    upper = {(b.offset, b.past) for b in bounds if b.upper}
    lower = {(b.offset, b.past) for b in bounds if not b.upper}
    if len(upper) > 1 or len(lower) > 1 or len(seen) > 1:
        return f"more than one condition of a kind makes {mask.name}"
    if not upper:
        return f"{mask.name} is not causal"
    ((most, past),) = upper
    if most != 0:
        return f"{mask.name} ends {most} keys from the query's own place"
    if past and not _stand_last(mask, keys):
        return f"{mask.name} is not for queries that stand at the end of the keys"
    window = 0
    if lower:
        ((least, other),) = lower
        if other != past or least > 0:
            return f"{mask.name} hides the query's own place"
        window = 1 - least
    return Sight(causal=not past, last=past, window=window, keys=seen[0] if seen else None)


def is_zero(value: ir.Value | None) -> bool:
    """Whether ``value`` is 0 everywhere, by what makes it."""
    array = constant(value)
    if array is not None:
        return not np.any(array)
    node = _producer(value)
    if node is None:
        return False
    if node.op_type == "ConstantOfShape":
        filled = attribute(node, "value")
        return filled is None or not np.any(filled.numpy())  # type: ignore[attr-defined]
    if node.op_type == "Where":
        chosen = _condition(node.inputs[0])
        return chosen is not None and bool(np.all(chosen)) and scalar(node.inputs[1]) == 0
    return node.op_type in (*_MOVES, "Expand", "Cast", "Transpose") and is_zero(node.inputs[0])


def _condition(value: ir.Value | None) -> np.ndarray | None:
    """The constant that a condition is a copy of."""
    while value is not None and constant(value) is None:
        node = _producer(value)
        if node is None or node.op_type not in (*_MOVES, "Expand", "Transpose"):
            return None
        value = node.inputs[0]
    return constant(value)


def _producer(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" else None


def _shown(mask: ir.Value) -> np.ndarray | None:
    """Where a constant mask is 0, if else it is very low."""
    array = constant(mask)
    if array is None:
        return None
    shown: np.ndarray = array == 0
    if not np.all(shown | (array <= HIDDEN)):
        raise _Unknown(f"{mask.name} is not of 0 and very low numbers alone")
    return shown


def _start(value: ir.Value | None) -> np.ndarray | None:
    """The constant that ``value`` is the start of along each axis, also where it is compared with a number."""
    node = _producer(value)
    if node is None:
        return constant(value)
    if node.op_type == "Slice":
        starts, steps = (
            constant(node.inputs[1]),
            constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1),
        )
        plain = starts is not None and steps is not None and not starts.any() and (steps == 1).all()
        return _start(node.inputs[0]) if plain else None
    if node.op_type == "Equal":
        for compared, other in (node.inputs, node.inputs[::-1]):
            array, single = _start(compared), number(other)
            if array is not None and single is not None:
                return np.asarray(array == single)
    if node.op_type in ("Identity", "Not", "Cast"):
        array = _start(node.inputs[0])
        if array is None or value is None or value.dtype is None or node.op_type == "Identity":
            return array
        return ~array if node.op_type == "Not" else array.astype(value.dtype.numpy())
    return constant(value)


def _band(shown: np.ndarray, value: ir.Value) -> Iterator[_Bound]:
    """The bounds that ``shown``, ``[..., queries, keys]``, is made of; all before are 1."""
    rows, columns = shown.shape[-2:] if shown.ndim > 1 else (1, 1)
    if shown.size != rows * columns or not shown.any():
        raise _Unknown(f"{value.name} is not the same for all samples and heads")
    shown = shown.reshape(rows, columns)
    row, counts = np.arange(rows), shown.sum(1)
    first, last = shown.argmax(1), columns - 1 - shown[:, ::-1].argmax(1)
    some = counts > 0
    least, most = int((first - row)[some].min()), int((last - row)[some].max())
    start, end = np.maximum(row + least, 0), np.minimum(row + most, columns - 1)
    if (counts != np.maximum(end - start + 1, 0)).any() or ((first < start) | (last > end))[some].any():
        raise _Unknown(f"{value.name} is no band of keys around the query's own place")
    if most < columns - 1:
        yield _Bound(upper=True, offset=most, past=False)
    if least > 1 - rows:
        yield _Bound(upper=False, offset=least, past=False)


def _hidden(mask: ir.Value | None) -> tuple[ir.Value, bool]:
    """The condition behind a mask of 0 and something very low; and whether it holds where keys are seen."""
    node = _producer(mask)
    if mask is None or node is None:
        raise _Unknown("the mask comes from outside")
    if node.op_type in ("Cast", "Identity"):
        return _hidden(node.inputs[0])
    if node.op_type == "Add":
        rest = [v for v in node.inputs if not is_zero(v)]
        if len(rest) == 1:
            return _hidden(rest[0])
    if node.op_type == "Where":
        condition, *chosen = node.inputs
        values = [number(v) for v in chosen]
        for at in (0, 1):
            shown, hidden = values[at], values[1 - at]
            if condition is not None and shown == 0 and hidden is not None and hidden <= HIDDEN:
                return condition, at == 0
    if node.op_type == "Mul":
        for numbers, factor in (node.inputs, node.inputs[::-1]):
            low = number(factor)
            found = _zero_or_one(numbers) if low is not None and low <= HIDDEN else None
            if found is not None:
                return found[0], not found[1]
    raise _Unknown(f"{mask.name} is not a choice between 0 and a very low number")


def _zero_or_one(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The condition behind numbers that are 1 where it holds, or where it does not, and else 0."""
    node = _producer(value)
    if node is None:
        return None
    if node.op_type == "Sub" and number(node.inputs[0]) == 1:
        inner = _zero_or_one(node.inputs[1])
        return None if inner is None else (inner[0], not inner[1])
    if node.op_type == "Cast" and (condition := node.inputs[0]) is not None:
        if condition.dtype == ir.DataType.BOOL:
            return condition, True
        return _zero_or_one(condition)
    return None


def _conditions(value: ir.Value | None, holds: bool, keys: ir.Value | None) -> Iterator[_Bound | ir.Value]:
    """What has to be true together for a key to be seen; ``holds``: whether where ``value`` is."""
    node = _producer(value)
    assert value is not None
    if (array := _start(value)) is not None and array.dtype == np.bool_:
        yield from _band(array if holds else ~array, value)
    elif node is not None and node.op_type == "And" and holds:
        for operand in node.inputs:
            yield from _conditions(operand, holds, keys)
    elif node is not None and node.op_type == "Not":
        try:
            yield from list(_conditions(node.inputs[0], not holds, keys))
        except _Unknown:
            if not holds or not _along_keys(shape_of(value)):
                raise
            yield value
    elif node is not None and node.op_type in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
        bound = _bound(node, keys)
        yield bound if holds else bound.turned()
    elif node is not None and (triangle := _empty(node)) is not None:
        bound = _triangle(triangle)
        yield bound.turned() if holds else bound
    elif holds and node is not None and node.op_type == "Expand":
        yield from _conditions(node.inputs[0], holds, keys)
    elif holds and _along_keys(shape_of(value)):
        yield value
    else:
        raise _Unknown(f"{value.name} compares no places")


def _empty(node: ir.Node) -> ir.Node | None:
    """The Trilu that makes ``node`` hold where it keeps nothing."""
    left, right = node.inputs if node.op_type == "Equal" else (None, None)
    kept = _producer(left if number(right) == 0 else right if number(left) == 0 else None)
    return kept if kept is not None and kept.op_type == "Trilu" and _filled(kept.inputs[0]) else None


def _filled(value: ir.Value | None) -> bool:
    """Whether no element of ``value`` is 0, by what makes it."""
    array, node = constant(value), _producer(value)
    if array is not None:
        return bool(np.all(array))
    if node is not None and node.op_type == "ConstantOfShape":
        filled = attribute(node, "value")
        return filled is not None and bool(np.all(filled.numpy()))  # type: ignore[attr-defined]
    return node is not None and node.op_type in (*_MOVES, "Expand", "Cast") and _filled(node.inputs[0])


def _triangle(node: ir.Node) -> _Bound:
    """Where Trilu keeps what it is given."""
    moved = number(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else 0
    if moved is None:
        raise _Unknown(f"{node.outputs[0].name} is a triangle at a place that is not known")
    return _Bound(upper=not attribute(node, "upper", 1), offset=int(moved), past=False)


def _along_keys(shape: tuple[Dim | None, ...] | None) -> bool:
    return shape is not None and len(shape) == 4 and shape[1:3] == (1, 1) and shape[3] != 1


def _bound(node: ir.Node, keys: ir.Value | None) -> _Bound:
    left, right = (_place(v, keys) for v in node.inputs)
    turned, strict = node.op_type.startswith("Greater"), "Equal" not in node.op_type
    if turned:
        left, right = right, left
    # left + strict <= right
    apart = right[1] - left[1] - strict
    past = left[2] or right[2]
    if (left[0], right[0]) == (_COLUMN, _ROW) and not left[2]:
        return _Bound(upper=True, offset=apart, past=past)
    if (left[0], right[0]) == (_ROW, _COLUMN) and not right[2]:
        return _Bound(upper=False, offset=-apart, past=past)
    raise _Unknown(f"{node.outputs[0].name} does not compare places of queries with those of keys")


def _place(value: ir.Value | None, keys: ir.Value | None) -> tuple[int, int, bool]:
    """A range along an axis: the axis, what it starts with, and whether the length of a cache is added to that."""
    shape = shape_of(value)
    long = [i for i, d in enumerate(shape or ()) if d != 1]
    if shape is None or len(long) != 1:
        raise _Unknown(f"{value.name if value is not None else 'nothing'} does not run along one axis")
    start, past = _range(value, keys)
    return long[0] - len(shape), start, past


def _range(value: ir.Value | None, keys: ir.Value | None) -> tuple[int, bool]:
    node = _producer(value)
    if value is None or node is None:
        raise _Unknown("a place is no range")
    if node.op_type in (*_MOVES, "Cast"):
        return _range(node.inputs[0], keys)
    if node.op_type == "Range":
        start, step = node.inputs[0], number(node.inputs[2])
        first = number(start)
        if step == 1 and first is not None and first.is_integer():
            return int(first), False
        if step == 1 and _is_past(start, keys):
            return 0, True
    if node.op_type in ("Add", "Sub"):
        for inner, added in (node.inputs, node.inputs[::-1]) if node.op_type == "Add" else (node.inputs,):
            more = number(added)
            if more is not None and more.is_integer():
                first, past = _range(inner, keys)
                return first + int(more if node.op_type == "Add" else -more), past
            if node.op_type == "Add" and _is_past(added, keys):
                first, past = _range(inner, keys)
                if not past:
                    return first, True
    raise _Unknown(f"{value.name} is no range")


def number(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, also behind a cast; else None."""
    node = _producer(value)
    return number(node.inputs[0]) if node is not None and node.op_type == "Cast" else scalar(value)


def _is_past(value: ir.Value | None, keys: ir.Value | None) -> bool:
    """Whether ``value`` is the length of a cache that ``keys`` start with."""
    node = _producer(value)
    while node is not None and node.op_type in (*_MOVES, "Cast"):
        value = node.inputs[0]
        node = _producer(value)
    joined = _joined(keys)
    picked = number(node.inputs[1]) if node is not None and node.op_type == "Gather" else None
    if node is not None and picked is not None and picked.is_integer():
        node = _producer(node.inputs[0])
    if node is None or node.op_type != "Shape" or joined is None:
        return False
    measured, cache = shape_of(node.inputs[0]), shape_of(joined.inputs[0])
    if measured is None or cache is None:
        return False
    found = measured[
        slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(measured)))
    ]
    if picked is not None:
        found = found[int(picked) :][:1] if picked >= 0 else found[: len(found) + int(picked) + 1][-1:]
    # The first layer's cache is what is measured for all.
    return len(found) == 1 and found[0] is not None and found[0] == cache[2]


def _joined(keys: ir.Value | None) -> ir.Node | None:
    """What joins a cache and new keys, also behind copies for the heads that share them; None where nothing does."""
    node, shape = _producer(keys), shape_of(keys)
    while node is not None and node.op_type in (*_MOVES, "Expand", "Cast"):
        node = _producer(node.inputs[0])
    if (
        node is None
        or node.op_type != "Concat"
        or len(node.inputs) != 2
        or attribute(node, "axis") not in (2, -2)
    ):
        return None
    whole = shape_of(node.outputs[0])
    if (
        shape is None
        or whole is None
        or len(whole) != 4
        or len(shape) != 4
        or whole[2] is None
        or whole[2] != shape[2]
    ):
        return None
    return node


def _stand_last(mask: ir.Value, keys: ir.Value | None) -> bool:
    """Whether what is joined to the cache is as long as there are queries."""
    joined, shape = _joined(keys), shape_of(mask)
    assert joined is not None
    new = shape_of(joined.inputs[1])
    return (
        new is not None
        and shape is not None
        and len(shape) > 1
        and new[2] is not None
        and new[2] == shape[-2]
    )
