"""Operators on one element at a time, in whatever layout their inputs are at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import TO_LAST, Context, bound, emits, operand, size, together
from optkit.backends.litert.emit.grids import grid_of
from optkit.backends.litert.emit.quant import store
from optkit.backends.litert.flat import Settings, Tensor
from optkit.graph import constant, is_float

_UNARY: dict[str, tuple[str, Settings | None]] = {
    "Abs": ("ABS", ("AbsOptions", {})), "Ceil": ("CEIL", None), "Cos": ("COS", ("CosOptions", {})),
    "Exp": ("EXP", ("ExpOptions", {})), "Floor": ("FLOOR", None), "HardSwish": ("HARD_SWISH", ("HardSwishOptions", {})),
    "Log": ("LOG", None), "Neg": ("NEG", ("NegOptions", {})), "Not": ("LOGICAL_NOT", ("LogicalNotOptions", {})),
    "Relu": ("RELU", None), "Round": ("ROUND", None), "Sigmoid": ("LOGISTIC", None),
    "Sign": ("SIGN", ("SignOptions", {})), "Sin": ("SIN", None), "Sqrt": ("SQRT", None), "Tanh": ("TANH", None),
}  # fmt: skip


def _unary(c: Context, node: ir.Node, compute: Callable[[Tensor], Tensor]) -> None:
    x = node.inputs[0]
    assert x is not None
    layout = c.layout(x, rows=True)
    c.put(node.outputs[0], compute(c.get(x, layout)), layout)


def _refuse_unary(node: ir.Node) -> str | None:
    # The newest standard has integers for some, the kernels have floats.
    number = node.op_type not in ("Abs", "Neg", "Not", "Sign")
    return f"LiteRT has {node.op_type} of floats alone" if number and not is_float(node.inputs[0]) else None


@emits(*_UNARY, refuse=_refuse_unary)
def _table(c: Context, node: ir.Node) -> None:
    code, settings = _UNARY[node.op_type]
    _unary(c, node, lambda x: c.op(code, [x], x.shape, settings=settings, name=str(node.outputs[0].name)))


@emits("Identity")
def _identity(c: Context, node: ir.Node) -> None:
    _unary(c, node, lambda x: x)


def _refuse_dropout(node: ir.Node) -> str | None:
    ratio, training = (node.inputs[i] if len(node.inputs) > i else None for i in (1, 2))
    if training is None or any((v := constant(k)) is not None and not v.any() for k in (ratio, training)):
        return None
    return "LiteRT draws no elements to drop: training_mode must be false"


@emits("Dropout", refuse=_refuse_dropout)
def _dropout(c: Context, node: ir.Node) -> None:
    _unary(c, node, lambda x: x)
    for mask in node.outputs[1:]:
        c.put(mask, c.graph.constant(np.ones(size(mask), bool)))


@emits("Reciprocal")
def _reciprocal(c: Context, node: ir.Node) -> None:
    _unary(c, node, lambda x: c.op("DIV", [c.number(1.0), x], x.shape, settings=("DivOptions", {})))


@emits("Gelu")
def _gelu(c: Context, node: ir.Node) -> None:
    approximate = node.attributes.get_string("approximate", "none") == "tanh"
    _unary(
        c, node, lambda x: c.op("GELU", [x], x.shape, settings=("GeluOptions", {"approximate": approximate}))
    )


@emits("Swish")
def _swish(c: Context, node: ir.Node) -> None:
    alpha = node.attributes.get_float("alpha", 1.0)

    def compute(x: Tensor) -> Tensor:
        scaled = x if alpha == 1 else c.op("MUL", [x, c.number(alpha)], x.shape, settings=("MulOptions", {}))
        return c.op("MUL", [x, c.op("LOGISTIC", [scaled], x.shape)], x.shape, settings=("MulOptions", {}))

    _unary(c, node, compute)


@emits("HardSigmoid")
def _hard_sigmoid(c: Context, node: ir.Node) -> None:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)

    def compute(x: Tensor) -> Tensor:
        y = c.op("MUL", [x, c.number(alpha)], x.shape, settings=("MulOptions", {}))
        y = c.op("ADD", [y, c.number(beta)], x.shape, settings=("AddOptions", {}))
        y = c.op("MAXIMUM", [y, c.number(0.0)], x.shape, settings=("MaximumMinimumOptions", {}))
        return c.op("MINIMUM", [y, c.number(1.0)], x.shape, settings=("MaximumMinimumOptions", {}))

    _unary(c, node, compute)


@emits("LeakyRelu")
def _leaky(c: Context, node: ir.Node) -> None:
    alpha = node.attributes.get_float("alpha", 0.01)
    _unary(
        c, node, lambda x: c.op("LEAKY_RELU", [x], x.shape, settings=("LeakyReluOptions", {"alpha": alpha}))
    )


@emits(
    "Elu",
    refuse=lambda n: (
        None if n.attributes.get_float("alpha", 1.0) == 1 else "LiteRT has Elu with alpha 1 alone"
    ),
)
def _elu(c: Context, node: ir.Node) -> None:
    _unary(c, node, lambda x: c.op("ELU", [x], x.shape))


def _refuse_clip(node: ir.Node) -> str | None:
    given = [v for v in node.inputs[1:] if v is not None]
    return "LiteRT needs constant bounds" if any(constant(v) is None for v in given) else None


@emits("Clip", refuse=_refuse_clip)
def _clip(c: Context, node: ir.Node) -> None:
    low, high = bound(node, 1), bound(node, 2)

    def compute(x: Tensor) -> Tensor:
        if (low, high) == (0.0, 6.0) and x.dtype == np.float32:
            return c.op("RELU6", [x], x.shape)
        for code, limit in (("MAXIMUM", low), ("MINIMUM", high)):
            if limit is not None:
                x = c.op(code, [x, c.number(limit, x.dtype)], x.shape, settings=("MaximumMinimumOptions", {}))
        return x

    _unary(c, node, compute)


@emits("Cast", refuse=lambda n: _refuse_cast(n))
def _cast(c: Context, node: ir.Node) -> None:
    kind, x = ir.DataType(node.attributes.get_int("to", 0)).numpy(), node.inputs[0]
    if kind != np.float16:
        _unary(c, node, lambda x: c.cast(x, kind))
        return
    # At the border of the model, where channels have to be as it says.
    assert x is not None
    c.put(node.outputs[0], c.cast(c.get(x), kind))


_CASTS = frozenset({"FLOAT", "FLOAT16", "INT32", "INT64", "BOOL", "INT8", "UINT8"})


def _refuse_cast(node: ir.Node) -> str | None:
    kind = ir.DataType(node.attributes.get_int("to", 0)).name
    return None if kind in _CASTS else f"LiteRT has no elements of type {kind.lower()} here"


_BINARY: dict[str, tuple[str, Settings | None]] = {
    "Add": ("ADD", ("AddOptions", {})), "Sub": ("SUB", ("SubOptions", {})), "Mul": ("MUL", ("MulOptions", {})),
    "Div": ("DIV", ("DivOptions", {})), "Pow": ("POW", ("PowOptions", {})),
    "Equal": ("EQUAL", ("EqualOptions", {})), "Greater": ("GREATER", ("GreaterOptions", {})),
    "GreaterOrEqual": ("GREATER_EQUAL", ("GreaterEqualOptions", {})), "Less": ("LESS", ("LessOptions", {})),
    "LessOrEqual": ("LESS_EQUAL", ("LessEqualOptions", {})), "And": ("LOGICAL_AND", ("LogicalAndOptions", {})),
    "Or": ("LOGICAL_OR", ("LogicalOrOptions", {})), "Max": ("MAXIMUM", ("MaximumMinimumOptions", {})),
    "Min": ("MINIMUM", ("MaximumMinimumOptions", {})), "Mod": ("FLOOR_MOD", ("FloorModOptions", {})),
}  # fmt: skip
_COMPARED = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or"})
# Kernels with an int8 form on grids of their own.
_ON_GRIDS = frozenset({"Add", "Sub", "Mul"})
# Of integers, those whose quotients the kernel of 32 bits gives.
_DIVIDED = frozenset({ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8})
# Kernels broadcast up to so many axes.
_MOST = 5


def _groups(shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Axes of the result, neighbours together along which every operand has all elements, or every one but the same has one.

    Args:
        shapes: Of the operands.
    """
    n = len(np.broadcast_shapes(*shapes))
    full = [(1,) * (n - len(s)) + tuple(s) for s in shapes]
    found: list[list[int]] = []
    before: tuple[bool, ...] | None = None
    for axis in range(n):
        spread = tuple(s[axis] == 1 for s in full)
        if found and (all(spread) or spread == before):
            found[-1].append(axis)
            continue
        found.append([axis])
        before = spread
    return found


def _merged(c: Context, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Operands with no more axes than kernels broadcast; where these are more, all of one shape."""
    shapes = [t.shape for t in tensors]
    n = max(map(len, shapes))
    if n <= _MOST:
        return list(tensors)
    groups = _groups(shapes)
    if len(groups) > _MOST:
        reached = np.broadcast_shapes(*shapes)
        alike = [t if t.shape == reached else c.spread(t, reached) for t in tensors]
        return [c.reshaped(t, (math.prod(reached),)) for t in alike]
    full = [(1,) * (n - len(s)) + s for s in shapes]
    sizes = [[math.prod(s[i] for i in group) for group in groups] for s in full]
    return [c.reshaped(t, s) for t, s in zip(tensors, sizes, strict=True)]


def _refuse_binary(node: ir.Node) -> str | None:
    if node.op_type == "Pow" and not is_float(node.inputs[0]):
        base, power = node.inputs[0], node.inputs[1]
        known = constant(power)
        if base is None or power is None or base.dtype != power.dtype or known is None or (known < 0).any():
            return "LiteRT raises integers to constant powers of their own type that are not negative"
    if node.op_type == "Div" and not is_float(node.outputs[0]) and node.outputs[0].dtype not in _DIVIDED:
        return "LiteRT divides floats and integers of up to 32 bits"
    if node.op_type == "Mod" and node.attributes.get_int("fmod", 0) != 0:
        return "LiteRT has remainders with the sign of the divisor alone"
    return None


@emits(*_BINARY, refuse=_refuse_binary)
def _binary(c: Context, node: ir.Node) -> None:
    values = [v for v in node.inputs if v is not None]
    shape = size(node.outputs[0])
    layout = together(c, values, len(shape))
    order = TO_LAST if layout == "last" else range(len(shape))
    placed = tuple(shape[i] for i in order)
    code, settings = _BINARY[node.op_type]
    if node.op_type in _ON_GRIDS and len(values) == 2:
        end = c.end(node)
        suits = [len(size(v)) == len(shape) <= _MOST for v in values]
        grids = [c.integers(v, layout) if s else None for v, s in zip(values, suits, strict=True)]
        if end.quantizer is not None and all(g is not None for g in grids):
            assert settings is not None
            fields = {"fusedActivationFunction": end.activation}
            made = c.op(
                code, [g for g in grids if g is not None], placed, np.int8, (settings[0], fields),
                grid=grid_of(end.quantizer), name=str(end.value.name),
            )  # fmt: skip
            store(c, end, made, layout)
            return
        assert settings is not None
        settings = (settings[0], {"fusedActivationFunction": end.activation})
        outcome = end.value
    else:
        outcome = node.outputs[0]
    x = operand(c, values[0], len(shape), layout)
    for value in values[1:]:
        y = operand(c, value, len(shape), layout)
        if node.op_type == "Pow":
            y = c.cast(y, x.dtype)
        reached = placed if len(values) == 2 else tuple(np.broadcast_shapes(x.shape, y.shape))
        kind = np.bool_ if node.op_type in _COMPARED else x.dtype
        both = _merged(c, [x, y])
        made = c.op(
            code, both, np.broadcast_shapes(*(t.shape for t in both)), kind, settings, name=str(outcome.name)
        )
        x = c.reshaped(made, reached)
    c.put(outcome, x, layout)


@emits("Xor", refuse=_refuse_binary)
def _either(c: Context, node: ir.Node) -> None:
    x, y = (c.get(v) for v in node.inputs if v is not None)
    shape = size(node.outputs[0])
    both = _merged(c, [x, y])
    same = c.op("EQUAL", both, np.broadcast_shapes(*(t.shape for t in both)), np.bool_, ("EqualOptions", {}))
    other = c.op("LOGICAL_NOT", [same], same.shape, settings=("LogicalNotOptions", {}))
    c.put(node.outputs[0], c.reshaped(other, shape))


@emits("Where", refuse=_refuse_binary)
def _where(c: Context, node: ir.Node) -> None:
    values = [v for v in node.inputs if v is not None]
    shape = size(node.outputs[0])
    layout = together(c, values, len(shape))
    placed = tuple(shape[i] for i in TO_LAST) if layout == "last" else shape
    tensors = _merged(c, [operand(c, v, len(shape), layout) for v in values])
    reached = np.broadcast_shapes(*(t.shape for t in tensors))
    made = c.op("SELECT_V2", tensors, reached, tensors[1].dtype, ("SelectV2Options", {}))
    c.put(node.outputs[0], c.reshaped(made, placed), layout)


@emits("PRelu")
def _prelu(c: Context, node: ir.Node) -> None:
    x, slope = node.inputs[0], node.inputs[1]
    assert x is not None and slope is not None
    shape = size(x)
    layout = c.layout(x)
    tensor = c.get(x, layout)
    c.put(
        node.outputs[0], c.op("PRELU", [tensor, operand(c, slope, len(shape), layout)], tensor.shape), layout
    )


def _one(c: Context, code: str, x: Tensor) -> Tensor:
    return c.op(code, [x], x.shape)


def _two(c: Context, code: str, kind: str, x: Tensor, y: Tensor) -> Tensor:
    return c.op(code, [x, y], np.broadcast_shapes(x.shape, y.shape), settings=(kind, {}))


def _hyperbolic(c: Context, x: Tensor, *, sine: bool) -> Tensor:
    """Halves of powers; of small numbers the sine by ``e^x - 1``, where these would cancel out (ELU is that below 0)."""
    half = c.number(0.5)
    if not sine:
        down = _one(c, "EXP", c.op("NEG", [x], x.shape, settings=("NegOptions", {})))
        return _two(c, "MUL", "MulOptions", _two(c, "ADD", "AddOptions", _one(c, "EXP", x), down), half)
    size_ = c.op("ABS", [x], x.shape, settings=("AbsOptions", {}))
    # Of a = |x|: (t + t / (t + 1)) / 2 with t = e^a - 1, which is -(e^-a - 1) e^a.
    less = c.op("ELU", [c.op("NEG", [size_], x.shape, settings=("NegOptions", {}))], x.shape)
    t = c.op(
        "NEG",
        [_two(c, "MUL", "MulOptions", less, _one(c, "EXP", size_))],
        x.shape,
        settings=("NegOptions", {}),
    )
    both = _two(c, "SUB", "SubOptions", t, less)
    signed = _two(c, "MUL", "MulOptions", both, c.op("SIGN", [x], x.shape, settings=("SignOptions", {})))
    return _two(c, "MUL", "MulOptions", signed, half)


@emits("Sinh", "Cosh")
def _of_powers(c: Context, node: ir.Node) -> None:
    _unary(c, node, lambda x: _hyperbolic(c, x, sine=node.op_type == "Sinh"))


@emits("Tan")
def _tangent(c: Context, node: ir.Node) -> None:
    def compute(x: Tensor) -> Tensor:
        cosine = c.op("COS", [x], x.shape, settings=("CosOptions", {}))
        return _two(c, "DIV", "DivOptions", _one(c, "SIN", x), cosine)

    _unary(c, node, compute)


@emits("Asin", "Acos", "Atan")
def _angle(c: Context, node: ir.Node) -> None:
    """The angle of a point: on the circle of radius 1 with one of its places known, or beside the line at 1."""

    def compute(x: Tensor) -> Tensor:
        one = c.number(1.0)
        if node.op_type == "Atan":
            return c.op("ATAN2", [x, c.spread(one, x.shape)], x.shape)
        # By factors: near 1 nothing cancels out.
        product = _two(
            c, "MUL", "MulOptions", _two(c, "SUB", "SubOptions", one, x), _two(c, "ADD", "AddOptions", one, x)
        )
        other = _one(c, "SQRT", product)
        return c.op("ATAN2", [x, other] if node.op_type == "Asin" else [other, x], x.shape)

    _unary(c, node, compute)


@emits("IsNaN", "IsInf")
def _special(c: Context, node: ir.Node) -> None:
    def compute(x: Tensor) -> Tensor:
        if node.op_type == "IsNaN":
            same = c.op("EQUAL", [x, x], x.shape, np.bool_, ("EqualOptions", {}))
            return c.op("LOGICAL_NOT", [same], x.shape, settings=("LogicalNotOptions", {}))
        up, down = (node.attributes.get_int(f"detect_{which}", 1) for which in ("positive", "negative"))
        if up and down:
            x = c.op("ABS", [x], x.shape, settings=("AbsOptions", {}))
        end = np.inf if up else -np.inf if down else np.nan
        return c.op("EQUAL", [x, c.number(end)], x.shape, np.bool_, ("EqualOptions", {}))

    _unary(c, node, compute)
