"""Operators that work on each element alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import (
    Context,
    cast,
    emits,
    is_float,
    like,
    name_of,
    refused,
    select,
    static,
    wide,
)
from optkit.backends.coreml.quiet import mb, types
from optkit.graph import constant, scalar

# ONNX operator -> operation of the same meaning.
_UNARY = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Exp": "exp", "Sqrt": "sqrt", "Abs": "abs", "Ceil": "ceil",
    "Floor": "floor", "Round": "round", "Sin": "sin", "Cos": "cos", "Tan": "tan", "Asin": "asin", "Acos": "acos",
    "Atan": "atan", "Sinh": "sinh", "Cosh": "cosh", "Atanh": "atanh", "Erf": "erf", "Sign": "sign", "Not": "logical_not",
    "Softplus": "softplus", "Softsign": "softsign",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less",
    "LessOrEqual": "less_equal", "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor",
}  # fmt: skip
_VARIADIC = {"Max": "maximum", "Min": "minimum", "Sum": "add", "Mean": "add"}


def _for_reciprocals(root: ir.Value) -> bool:
    """Whether nothing else reads the root, whose reciprocal is an operation of its own."""
    readers = [u.node for u in root.uses()]
    alone = all(r.op_type == "Reciprocal" and r.domain == "" for r in readers)
    return bool(readers) and alone and not root.is_graph_output()


@emits(*_UNARY)
def _unary(c: Context, node: ir.Node) -> Any:
    if node.op_type == "Sqrt" and _for_reciprocals(node.outputs[0]):
        return None
    x = wide(c.input(node, 0))
    if node.op_type == "Relu" and not is_float(x):
        return mb.maximum(x=x, y=np.int32(0))
    return _wrapped(node, getattr(mb, _UNARY[node.op_type])(x=x))


_SIGNED = {ir.DataType.INT8: 128, ir.DataType.INT16: 1 << 15}
_UNSIGNED = {ir.DataType.UINT8: 256, ir.DataType.UINT16: 1 << 16}


def _wrapped(node: ir.Node, x: Any) -> Any:
    """Integers of 8 or 16 bits start again beyond the last, and are computed with in int32."""
    kind = node.outputs[0].dtype
    if kind in _UNSIGNED:
        return mb.mod(x=x, y=np.int32(_UNSIGNED[kind]))
    if kind in _SIGNED:
        half = np.int32(_SIGNED[kind])
        return mb.sub(x=mb.mod(x=mb.add(x=x, y=half), y=2 * half), y=half)
    return x


@emits(*_BINARY)
def _binary(c: Context, node: ir.Node) -> Any:
    x, y = (wide(v) for v in c.inputs(node))
    return _wrapped(node, getattr(mb, _BINARY[node.op_type])(x=x, y=y))


@emits("Equal")
def _equal(c: Context, node: ir.Node) -> Any:
    x, y = (cast(v, "int32") if v.dtype == types.bool else wide(v) for v in c.inputs(node))
    return mb.equal(x=x, y=y)


@emits(*_VARIADIC)
def _variadic(c: Context, node: ir.Node) -> Any:
    result, *others = (wide(v) for v in c.inputs(node))
    for other in others:
        result = getattr(mb, _VARIADIC[node.op_type])(x=result, y=other)
    if node.op_type == "Mean" and others:
        return mb.mul(x=result, y=like(result, 1 / (1 + len(others))))
    return mb.identity(x=result) if not others else result


def nonnegative(value: ir.Value | None) -> bool:
    """Whether an integer is known never to be negative: sizes, constants, and what is made of them."""
    if value is None:
        return False
    array = constant(value)
    if array is not None:
        return bool((array >= 0).all())
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "Abs"):
        return True
    if node.op_type in ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Reshape", "Identity", "Floor"):
        return nonnegative(node.inputs[0])
    if node.op_type in ("Concat", "Add", "Mul", "Div", "Max"):
        every = any if node.op_type == "Max" else all
        return every(nonnegative(v) for v in node.inputs)
    return False


@emits("Div")
def _divide(c: Context, node: ir.Node) -> Any:
    x, y = (wide(v) for v in c.inputs(node))
    if is_float(x):
        return mb.real_div(x=x, y=y)
    quotient = mb.floor_div(x=x, y=y)
    if nonnegative(node.inputs[0]) and nonnegative(node.inputs[1]):
        return quotient
    # ONNX rounds towards zero: one more where the quotient is negative and something is left over.
    rest = mb.sub(x=x, y=mb.mul(x=quotient, y=y))
    up = mb.logical_and(x=mb.less(x=quotient, y=np.int32(0)), y=mb.not_equal(x=rest, y=np.int32(0)))
    return mb.add(x=quotient, y=mb.cast(x=up, dtype="int32"))


@emits("Mod")
def _modulo(c: Context, node: ir.Node) -> Any:
    x, y = (wide(v) for v in c.inputs(node))
    if not node.attributes.get_int("fmod", 0):
        return mb.mod(x=x, y=y)
    # The sign of the dividend.
    return mb.mul(x=mb.sign(x=x), y=mb.mod(x=mb.abs(x=x), y=mb.abs(x=y)))


@emits("Pow")
def _power(c: Context, node: ir.Node) -> Any:
    x, y = (wide(v) for v in c.inputs(node))
    exponent = scalar(node.inputs[1])
    if exponent == 2.0:
        return mb.square(x=x) if is_float(x) else mb.mul(x=x, y=x)
    if not is_float(x) and is_float(y):
        return mb.cast(x=mb.pow(x=cast(x, name_of(y)), y=y), dtype="int32")
    return mb.pow(x=x, y=cast(y, name_of(x)))


@emits("Neg")
def _negate(c: Context, node: ir.Node) -> Any:
    x = wide(c.input(node, 0))
    return _wrapped(node, mb.mul(x=x, y=like(x, -1)))


@emits("Log")
def _log(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    # The default epsilon is 1e-45; ONNX has none.
    return mb.log(x=x, epsilon=like(x, 0))


@emits("Reciprocal")
def _reciprocal(c: Context, node: ir.Node) -> Any:
    value = node.inputs[0]
    root = value.producer() if value is not None and value not in c.variables else None
    if root is not None and root.op_type == "Sqrt":
        x = c.input(root, 0)
        return mb.rsqrt(x=x, epsilon=like(x, 0))
    x = c.input(node, 0)
    # Not `inverse`, whose epsilon is 1e-4 unless told otherwise.
    return mb.real_div(x=like(x, 1), y=x)


@emits("IsNaN")
def _is_nan(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    return mb.not_equal(x=x, y=x)


@emits("IsInf")
def _is_infinite(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    up, down = node.attributes.get_int("detect_positive", 1), node.attributes.get_int("detect_negative", 1)
    if up and down:
        return mb.equal(x=mb.abs(x=x), y=like(x, math.inf))
    return mb.equal(x=x, y=like(x, math.inf if up else -math.inf))


@emits("Clip")
def _clip(c: Context, node: ir.Node) -> Any:
    x = wide(c.input(node, 0))
    low, high = scalar(_operand(node, 1)), scalar(_operand(node, 2))
    bounded = [c.has(node, i) for i in (1, 2)]
    if is_float(x) and low == 0 and not bounded[1]:
        return mb.relu(x=x)
    if is_float(x) and (low, high) == (0, 6):
        return mb.relu6(x=x)
    if is_float(x) and low is not None and high is not None and low < high:
        return mb.clip(x=x, alpha=like(x, low), beta=like(x, high))
    if bounded[0]:
        x = mb.maximum(x=x, y=wide(c.input(node, 1)))
    if bounded[1]:
        x = mb.minimum(x=x, y=wide(c.input(node, 2)))
    return x if any(bounded) else mb.identity(x=x)


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


@emits("LeakyRelu")
def _leaky_relu(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    return mb.leaky_relu(x=x, alpha=like(x, node.attributes.get_float("alpha", 0.01)))


@emits("Elu")
def _elu(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    return mb.elu(x=x, alpha=like(x, node.attributes.get_float("alpha", 1.0)))


@emits("Selu")
def _selu(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    alpha, gamma = (
        node.attributes.get_float("alpha", 1.6732632),
        node.attributes.get_float("gamma", 1.0507010),
    )
    return mb.mul(x=mb.elu(x=x, alpha=like(x, alpha)), y=like(x, gamma))


@emits("Celu")
def _celu(c: Context, node: ir.Node) -> Any:
    x, alpha = c.input(node, 0), node.attributes.get_float("alpha", 1.0)
    scaled = mb.mul(x=x, y=like(x, 1 / alpha))
    return mb.mul(x=mb.elu(x=scaled, alpha=like(x, 1)), y=like(x, alpha))


@emits("PRelu")
def _prelu(c: Context, node: ir.Node) -> Any:
    x, slope = c.inputs(node)
    alpha = c.known(node, 1)
    if alpha is not None and x.rank >= 3 and isinstance(x.shape[1], int | np.integer):
        channels = int(x.shape[1])
        # One slope a channel, or one for all: of the shapes [C, 1, ...] and [1].
        along = alpha.ndim == x.rank - 1 and alpha.shape[0] == channels and alpha.size == channels
        if (along and x.rank == 4) or alpha.size == 1:
            slopes = np.broadcast_to(alpha.reshape(-1), (channels,))
            return mb.prelu(x=x, alpha=np.ascontiguousarray(slopes.astype(type(like(x, 0)))))
    below = mb.minimum(x=x, y=like(x, 0))
    return mb.add(x=mb.relu(x=x), y=mb.mul(x=slope, y=below))


@emits("ThresholdedRelu")
def _thresholded_relu(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    above = mb.greater(x=x, y=like(x, node.attributes.get_float("alpha", 1.0)))
    return mb.select(cond=above, a=x, b=like(x, 0))


@emits("Asinh")
def _asinh(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    size = mb.abs(x=x)
    root = mb.sqrt(x=mb.add(x=mb.mul(x=x, y=x), y=like(x, 1)))
    return mb.mul(x=mb.sign(x=x), y=mb.log(x=mb.add(x=size, y=root)))


@emits("HardSigmoid")
def _hard_sigmoid(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return mb.sigmoid_hard(x=x, alpha=like(x, alpha), beta=like(x, beta))


@emits("HardSwish")
def _hard_swish(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    return mb.mul(x=x, y=mb.sigmoid_hard(x=x, alpha=like(x, 1 / 6), beta=like(x, 0.5)))


@emits("Gelu")
def _gelu(c: Context, node: ir.Node) -> Any:
    exact = node.attributes.get_string("approximate", "none") == "none"
    return mb.gelu(x=c.input(node, 0), mode="EXACT" if exact else "TANH_APPROXIMATION")


@emits("Mish")
def _mish(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    return mb.mul(x=x, y=mb.tanh(x=mb.softplus(x=x)))


@emits("Swish")
def _swish(c: Context, node: ir.Node) -> Any:
    x, alpha = c.input(node, 0), node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        return mb.silu(x=x)
    return mb.mul(x=x, y=mb.sigmoid(x=mb.mul(x=x, y=like(x, alpha))))


@emits("Where")
def _where(c: Context, node: ir.Node) -> Any:
    condition, a, b = c.inputs(node)
    if a.dtype == types.bool:
        return mb.cast(x=select(condition, cast(a, "int32"), cast(b, "int32")), dtype="bool")
    return select(condition, wide(a), wide(b))


_CASTS = {
    ir.DataType.FLOAT: "fp32", ir.DataType.DOUBLE: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BOOL: "bool",
    ir.DataType.INT64: "int32", ir.DataType.INT32: "int32",
}  # fmt: skip
_UNSIGNED_WIDE = (ir.DataType.UINT32, ir.DataType.UINT64)


def _refuse_cast(node: ir.Node) -> str | None:
    to = ir.DataType(node.attributes.get_int("to", 1))
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    if to in _CASTS or to in _SIGNED or to in _UNSIGNED:
        return None
    if to in _UNSIGNED_WIDE and source in (ir.DataType.BOOL, *_UNSIGNED):
        return None
    return f"Core ML has no cast to {to.name.lower()} that wraps around as ONNX does"


@emits("Cast", refuse=_refuse_cast)
def _cast(c: Context, node: ir.Node) -> Any:
    x, kind = c.input(node, 0), ir.DataType(node.attributes.get_int("to", 1))
    to = _CASTS.get(kind, "int32")
    if to != "bool" and name_of(x) in ("int8", "uint8", "int16", "uint16") and c.version < 17:
        raise refused(node, f"{name_of(x)} needs iOS 17")
    if kind in _CASTS:
        if name_of(x) == to:
            return mb.identity(x=x)
        return mb.not_equal(x=wide(x), y=like(wide(x), 0)) if to == "bool" else mb.cast(x=x, dtype=to)
    given = node.inputs[0]
    assert given is not None
    whole = mb.identity(x=x) if name_of(x) == to else mb.cast(x=x, dtype=to)
    holds = given.dtype is not None and np.can_cast(given.dtype.numpy(), kind.numpy())
    return whole if holds else _wrapped(node, whole)


@emits("Identity")
def _identity(c: Context, node: ir.Node) -> Any:
    return mb.identity(x=c.input(node, 0))


def _refuse_dropout(node: ir.Node) -> str | None:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    training = constant(node.inputs[2])
    return (
        None
        if training is not None and not training.any()
        else "it drops at random: training_mode is not off"
    )


@emits("Dropout", refuse=_refuse_dropout)
def _dropout(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    if len(node.outputs) == 1:
        return mb.identity(x=x)
    kept = mb.fill(shape=c.shape(c.sizes(x)), value=np.int32(1)) if x.rank else mb.const(val=np.int32(1))
    return [mb.identity(x=x), mb.cast(x=kept, dtype="bool")]


@emits("Trilu")
def _triangle(c: Context, node: ir.Node) -> Any:
    x, upper = c.input(node, 0), node.attributes.get_int("upper", 1)
    offset = 0 if not c.has(node, 1) else c.known(node, 1)
    if offset is None:
        raise refused(node, "Core ML needs the diagonal of a triangle when it is compiled")
    k, sizes = int(np.asarray(offset).reshape(-1)[0]), static(x)
    if sizes is not None:
        ones = np.ones(sizes[-2:], np.bool_)
        mask = mb.const(val=np.triu(ones, k) if upper else np.tril(ones, k))
    else:
        rows, columns = (c.count(size) for size in c.sizes(x)[-2:])
        ahead = mb.sub(x=mb.expand_dims(x=columns, axes=[0]), y=mb.expand_dims(x=rows, axes=[1]))
        mask = (mb.greater_equal if upper else mb.less_equal)(x=ahead, y=np.int32(k))
    if x.dtype == types.bool:
        return mb.logical_and(x=x, y=mask)
    return select(mask, x, mb.const(val=like(x, 0)))
