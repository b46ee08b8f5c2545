"""How many products a run needs: scores of attention that no mask hides, whatever the inputs are, and not those of a convolution's pads.

Values between scores and Softmax are followed as intervals, ``[low, high]`` for each element: exact where they depend on shapes and
constants alone, open where they come from inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from optkit.graph import constant, elements, users, walk
from optkit.multiplies import multiplies

# What is lower is what exporters hide keys with; see ``optkit.masks``.
_HIDDEN = -1e4
# Elements of a mask that is looked at; of a larger one nothing is counted, which is no more than what is needed either.
_MOST = 1 << 24
# What may stand between a product and a Softmax so that scores of 0 stay 0 where no mask hides them, and behind it.
_AROUND = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Where", "Min", "Max", "Cast", "CastLike", "Tanh", "Clip", "QuantizeLinear", "DequantizeLinear",
        "Identity", "Reshape", "Unsqueeze", "Squeeze", "Dropout",
    }
)  # fmt: skip
# These move elements of their first operand, which may be anything.
_MOVES = frozenset(
    {
        "Identity",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Expand",
        "Transpose",
        "Slice",
        "Gather",
        "Trilu",
    }
)
_FAILED = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)

_Bounds = tuple[np.ndarray, np.ndarray]


class _TooLargeError(Exception):
    """A mask has more elements than are looked at."""


def seen(model: ir.Model) -> Mapping[ir.Node, Fraction]:
    """Which share of their multiply-accumulates is needed, for attention whose masks hide keys and convolutions with pads."""
    found: dict[ir.Node, Fraction] = {}
    known: dict[Hashable, Fraction] = {}
    for node in walk(model):
        if node.op_type == "Conv" and node.domain == "" and (inside := _inside(node)) < 1:
            found[node] = inside
        if node.op_type != "Softmax" or node.domain != "":
            continue
        scores, count = node.inputs[0], elements(node.outputs[0].shape)
        if not count or scores is None or (path := _scores(scores, count)) is None:
            continue
        product, *others = path
        # Layers that mask alike are looked at once.
        alike = (
            count,
            *((n.op_type, tuple(None if _within(v, path) else v for v in n.inputs)) for n in others),
        )
        if alike not in known:
            known[alike] = _share(scores, path)
        if known[alike] < 1:
            products = (product, *_values(node.outputs[0], count))
            found.update((one, known[alike]) for one in products)
    return found


def _inside(conv: ir.Node) -> Fraction:
    """The share of the places under a convolution's windows that are elements of its input, and not pads."""
    sizes = [None if v is None or v.shape is None else v.shape for v in (*conv.inputs[:2], conv.outputs[0])]
    if any(s is None or not s.is_static() for s in sizes):
        return Fraction(1)
    given, window, made = (s.numpy()[2:] for s in sizes if s is not None)
    axes, share = len(given), Fraction(1)
    pads = conv.attributes.get_ints("pads", ())
    if conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or not any(pads):
        return share
    strides, dilations = (conv.attributes.get_ints(name, [1] * axes) for name in ("strides", "dilations"))
    for size, width, count, start, stride, apart in zip(
        given, window, made, pads, strides, dilations, strict=False
    ):
        places = np.arange(count)[:, None] * stride - start + np.arange(width) * apart
        share *= Fraction(int(np.count_nonzero((places >= 0) & (places < size))), max(1, places.size))
    return share


def _scores(value: ir.Value, count: int) -> list[ir.Node] | None:
    """From the product on, whose results nothing else reads, up to ``value``."""
    node = value.producer()
    if node is None or value.is_graph_output() or len(value.uses()) != 1 or elements(value.shape) != count:
        return None
    if multiplies(node):
        return [node]
    if node.domain != "" or node.op_type not in _AROUND:
        return None
    paths = (_scores(v, count) for v in node.inputs if v is not None)
    return next(([*path, node] for path in paths if path), None)


def _within(value: ir.Value | None, path: Sequence[ir.Node]) -> bool:
    return value is not None and value.producer() in path


def _values(value: ir.Value, count: int) -> Iterator[ir.Node]:
    """The products that read the shares."""
    if elements(value.shape) != count:
        return
    for node in users(value):
        if multiplies(node):
            yield node
        elif node.domain == "" and node.op_type in _AROUND:
            yield from _values(node.outputs[0], count)


def _share(masked: ir.Value, path: Sequence[ir.Node]) -> Fraction:
    scores = path[0].outputs[0]
    known = {scores: _exactly(np.zeros((1,) * len(scores.shape or ()), np.float32))}
    try:
        _, high = _bounds(masked, known)
    except _TooLargeError:
        return Fraction(0)
    return Fraction(high.size - int(np.count_nonzero(high <= _HIDDEN)), high.size)


def _everywhere(value: ir.Value, low: np.generic, high: np.generic) -> _Bounds:
    shape = (1,) * len(value.shape or ())
    return np.full(shape, low), np.full(shape, high)


def _unknown(value: ir.Value) -> _Bounds:
    if value.dtype == ir.DataType.BOOL:
        return _everywhere(value, np.False_, np.True_)
    return _everywhere(value, np.float32(-np.inf), np.float32(np.inf))


def _bounds(value: ir.Value, known: dict[ir.Value, _Bounds]) -> _Bounds:
    """The least and the greatest of each element, axes along which all are alike perhaps 1; the same array where it is known."""
    if value not in known:
        known[value] = _computed(value, known)
    return known[value]


def _computed(value: ir.Value, known: dict[ir.Value, _Bounds]) -> _Bounds:
    node, array = value.producer(), constant(value)
    if array is not None:
        return _exactly(array)
    if node is None or node.domain != "" or multiplies(node) or value is not node.outputs[0]:
        return _unknown(value)
    if node.op_type == "Shape":
        sizes = node.inputs[0].shape if node.inputs[0] is not None else None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 30)
        if sizes is None or not all(isinstance(d, int) for d in sizes[start:end]):
            return _unknown(value)
        return _exactly(np.array(sizes[start:end], np.int64))
    given = [None if v is None else _bounds(v, known) for v in node.inputs]
    sides = [g for g in given if g is not None]
    size = elements(value.shape) or 0
    moves = node.op_type in _MOVES
    if moves and node.op_type != "Trilu" and sides[0][0].size == 1:
        shape = (1,) * len(value.shape or ())
        low, high = sides[0]
        first = low.reshape(shape)
        return first, first if low is high else high.reshape(shape)
    if not moves and (node.op_type in _RULES or node.op_type in _AROUND):
        size = math.prod(np.broadcast_shapes(*(low.shape for low, _ in sides)))
    else:
        given = [_spread(g, v) for g, v in zip(given, node.inputs, strict=True)]
    if size > _MOST:
        raise _TooLargeError
    try:
        if all(g is None or g[0] is g[1] for g in given):
            return _exactly(_run(node, [None if g is None else g[0] for g in given]))
        if node.op_type in _MOVES and all(g is None or g[0] is g[1] for g in given[1:]):
            low, high = (_run(node, [None if g is None else g[end] for g in given]) for end in (0, 1))
            return low, high
    except _FAILED:
        return _unknown(value)
    rule = _RULES.get(node.op_type)
    if rule is None or len(sides) != len(given):
        return _unknown(value)
    with np.errstate(invalid="ignore", over="ignore"):
        return rule(value, sides)


def _spread(bounds: _Bounds | None, value: ir.Value | None) -> _Bounds | None:
    """With all elements of ``value``, of which axes along which they are the same may have been left out."""
    if bounds is None or value is None or value.shape is None or not value.shape.is_static():
        return bounds
    low, high = bounds
    first = np.broadcast_to(low, value.shape.numpy())
    return first, first if low is high else np.broadcast_to(high, value.shape.numpy())


def _exactly(array: np.ndarray) -> _Bounds:
    # All floats are of one type here: scores are, and NumPy has none of its own for some.
    if array.dtype.kind not in "biu":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return array, array


def _run(node: ir.Node, arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """What ONNX says that ``node`` computes."""
    copy = ir.Node(
        "", node.op_type,
        [None if a is None else ir.Value(name=f"i{i}") for i, a in enumerate(arrays)],
        node.attributes.values(), outputs=[ir.Value(name="o")],
    )  # fmt: skip
    feeds = {f"i{i}": np.asarray(a) for i, a in enumerate(arrays) if a is not None}
    evaluator = ReferenceEvaluator(ir.serde.serialize_node(copy))
    (result,) = evaluator.run(None, feeds)
    return np.asarray(result)


def _add(_: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    (a, b), (c, d) = sides
    # What is open is finite: minus infinity stays that whatever is added.
    return tuple(np.nan_to_num(s, nan=-np.inf, posinf=np.inf, neginf=-np.inf) for s in (a + c, b + d))


def _subtract(value: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    first, (c, d) = sides
    return _add(value, (first, (-d, -c)))


def _multiply(_: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    first, second = sides
    corners = [np.nan_to_num(a * b, nan=0.0, posinf=np.inf, neginf=-np.inf) for a in first for b in second]
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def _choose(_: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    (surely, perhaps), (a, b), (c, d) = sides
    low = np.where(surely, a, np.where(perhaps, np.minimum(a, c), c))
    return low, np.where(surely, b, np.where(perhaps, np.maximum(b, d), d))


def _cast(value: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    ((low, high),) = sides
    if value.dtype == ir.DataType.BOOL:
        return (low > 0) | (high < 0), (low != 0) | (high != 0)
    return low.astype(np.float32), high.astype(np.float32)


def _less(_: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    (a, b), (c, d) = sides
    return b < c, a < d


def _less_or_equal(_: ir.Value, sides: Sequence[_Bounds]) -> _Bounds:
    (a, b), (c, d) = sides
    return b <= c, a <= d


_RULES: dict[str, Callable[[ir.Value, Sequence[_Bounds]], _Bounds]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Where": _choose,
    "Cast": _cast,
    "And": lambda _, s: (s[0][0] & s[1][0], s[0][1] & s[1][1]),
    "Or": lambda _, s: (s[0][0] | s[1][0], s[0][1] | s[1][1]),
    "Not": lambda _, s: (~s[0][1], ~s[0][0]),
    "Min": lambda _, s: (np.minimum.reduce([a for a, _ in s]), np.minimum.reduce([b for _, b in s])),
    "Max": lambda _, s: (np.maximum.reduce([a for a, _ in s]), np.maximum.reduce([b for _, b in s])),
    "Less": _less,
    "LessOrEqual": _less_or_equal,
    "Greater": lambda v, s: _less(v, s[::-1]),
    "GreaterOrEqual": lambda v, s: _less_or_equal(v, s[::-1]),
}  # fmt: skip
