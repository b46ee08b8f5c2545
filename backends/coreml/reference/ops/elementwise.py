"""Operations on each element alone, activations among them."""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray

_UNARY = {
    "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh, "ceil": np.ceil, "cos": np.cos,
    "cosh": np.cosh, "exp": np.exp, "exp2": np.exp2, "floor": np.floor, "round": np.rint, "sign": np.sign, "sin": np.sin,
    "sinh": np.sinh, "sqrt": np.sqrt, "square": np.square, "tan": np.tan, "tanh": np.tanh, "logical_not": np.logical_not,
}  # fmt: skip
_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floor_div": np.floor_divide, "mod": np.mod, "pow": np.power,
    "maximum": np.maximum, "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip


# Elements at a time: what is between stays in cache, and takes no memory to speak of.
_PIECE = 1 << 14


def _unary(function: Any) -> Any:
    def apply(x: Array, out: Array | None = None) -> Any:
        return function(x, out=out)

    return apply


def by_pieces(function: Any) -> Any:
    """A function of the elements of float arrays in several steps, so that no step is as large as the array.

    What comes after ``x`` is single values.
    """

    @wraps(function)
    def apply(x: Array, out: Array | None = None, **more: Any) -> Any:
        array = np.asarray(x, np.float32)
        if array.size <= _PIECE:
            return function(array, **more)
        source = np.ascontiguousarray(array).reshape(-1)
        out = np.empty(array.shape, np.float32) if out is None or not out.flags.c_contiguous else out
        place = out.reshape(-1)
        for start in range(0, source.size, _PIECE):
            place[start : start + _PIECE] = function(source[start : start + _PIECE], **more)
        return out

    return apply


def _binary(function: Any) -> Any:
    def apply(x: Array, y: Array, out: Array | None = None) -> Any:
        return function(x, y, out=out)

    return apply


for _names, _kind in ((_UNARY, _unary), (_BINARY, _binary)):
    for _name, _function in _names.items():
        operation(_name, over=True)(_kind(_function))


@operation("identity")
def identity(x: Array) -> Array:
    """``x``."""
    return x


@operation("real_div", over=True)
def real_div(x: Array, y: Array, out: Array | None = None) -> Array:
    """True division; of integers cut off towards zero."""
    quotient = np.true_divide(x, y, out=out)
    return np.trunc(quotient) if np.result_type(x, y).kind in "iu" else quotient


@operation("cast")
def cast(x: Array, dtype: str) -> Array:
    """To another type: floats become integers by cutting off, and true where they are not 0; who calls rounds to float16."""
    kinds = {"fp16": np.float32, "fp32": np.float32, "bool": np.bool_}
    return np.asarray(x).astype(kinds.get(dtype, dtype), copy=False)


@operation("inverse")
def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    """``1 / (x + epsilon)``."""
    return np.float32(1) / (x + np.float32(epsilon))


@operation("log")
def log(x: Array, epsilon: float = 1e-45) -> Array:
    """``log(x + epsilon)``."""
    return np.log(x + np.float32(epsilon))


@operation("rsqrt")
def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    """``1 / sqrt(x + epsilon)``."""
    return np.float32(1) / np.sqrt(x + np.float32(epsilon))


@operation("clip", over=True)
def clip(x: Array, alpha: float, beta: float, out: Array | None = None) -> Array:
    """Between ``alpha`` and ``beta``."""
    return np.clip(x, np.float32(alpha), np.float32(beta), out=out)


@operation("threshold", over=True)
def threshold(x: Array, alpha: float, out: Array | None = None) -> Array:
    """At least ``alpha``."""
    return np.maximum(x, np.float32(alpha), out=out)


@operation("select")
def select(cond: Array, a: Array, b: Array) -> Array:
    """``a`` where the condition holds, else ``b``."""
    return np.where(cond, a, b)


# erf by cubic Hermite interpolation of a table, whose values and slopes are exact: error below 1e-12 before rounding.
_STEP, _END = 1 / 512, 4.25
_GRID = np.arange(0, _END + 2 * _STEP, _STEP)
_ERF = np.asarray([math.erf(g) for g in _GRID])
_SLOPE = 2 / math.sqrt(math.pi) * np.exp(-(_GRID**2)) * _STEP


def erf_of(x: Array) -> Array:
    """The error function, in float64."""
    position = np.minimum(np.abs(np.asarray(x, np.float64)), _END) / _STEP
    index = np.nan_to_num(position).astype(np.intp)
    t = position - index
    low, high, left, right = _ERF[index], _ERF[index + 1], _SLOPE[index], _SLOPE[index + 1]
    rise = high - low
    value = low + t * (left + t * (3 * rise - 2 * left - right + t * (left + right - 2 * rise)))
    return np.copysign(value, x)


@operation("erf", over=True)
@by_pieces
def erf(x: Array) -> Array:
    """The error function."""
    return erf_of(x)


def sigmoid_of(x: Array) -> Array:
    """``1 / (1 + exp(-x))``; where exp overflows that is 0, as it should be."""
    return np.float32(1) / (np.float32(1) + np.exp(-x))


operation("sigmoid", over=True)(by_pieces(sigmoid_of))
operation("silu", over=True)(by_pieces(lambda x: x * sigmoid_of(x)))
operation("relu", over=True)(_unary(lambda x, out: np.maximum(x, np.float32(0), out=out)))
operation("relu6", over=True)(_unary(lambda x, out: np.clip(x, np.float32(0), np.float32(6), out=out)))
operation("softsign", over=True)(by_pieces(lambda x: x / (np.float32(1) + np.abs(x))))


@operation("softplus", over=True)
@by_pieces
def softplus(x: Array) -> Array:
    """``log(1 + exp(x))``."""
    return np.logaddexp(x, np.float32(0))


@operation("softplus_parametric")
def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """``alpha * log(1 + exp(beta * x))``, with one of each for a channel."""
    return along(alpha, x) * np.logaddexp(x * along(beta, x), np.float32(0))


def along(values: Array, x: Array, axis: int = 1) -> Array:
    """One value for each channel of ``x``, or a scalar, so that it spreads over ``x``."""
    values = np.asarray(values)
    if values.ndim == 0:
        return values
    shape = [1] * np.ndim(x)
    shape[axis] = -1
    return values.reshape(shape)


@operation("leaky_relu", over=True)
@by_pieces
def leaky_relu(x: Array, alpha: float = 0.01) -> Array:
    """``alpha * x`` below 0."""
    return np.where(x >= 0, x, x * np.float32(alpha))


@operation("prelu")
def prelu(x: Array, alpha: Array) -> Array:
    """As leaky_relu, with a slope for each channel."""
    return np.where(x >= 0, x, x * along(alpha, x))


@operation("elu", over=True)
@by_pieces
def elu(x: Array, alpha: float = 1.0) -> Array:
    """``alpha * (exp(x) - 1)`` below 0."""
    return np.where(x > 0, x, np.float32(alpha) * np.expm1(np.minimum(x, np.float32(0))))


@operation("thresholded_relu")
def thresholded_relu(x: Array, alpha: float = 1.0) -> Array:
    """``x`` from ``alpha`` on, else 0."""
    return np.where(x >= np.float32(alpha), x, np.float32(0))


@operation("clamped_relu", over=True)
@by_pieces
def clamped_relu(x: Array, alpha: float, beta: float) -> Array:
    """As leaky_relu, at most ``beta``."""
    return np.minimum(leaky_relu(x, alpha), np.float32(beta))


@operation("linear_activation", over=True)
@by_pieces
def linear_activation(x: Array, alpha: float = 1.0, beta: float = 0.0) -> Array:
    """``alpha * x + beta``."""
    return x * np.float32(alpha) + np.float32(beta)


@operation("sigmoid_hard", over=True)
def sigmoid_hard(x: Array, alpha: float = 0.2, beta: float = 0.5, out: Array | None = None) -> Array:
    """``alpha * x + beta`` between 0 and 1."""
    out = np.asarray(np.multiply(x, np.float32(alpha), out=out))
    out += np.float32(beta)
    return np.clip(out, np.float32(0), np.float32(1), out=out)


@operation("scaled_tanh", over=True)
@by_pieces
def scaled_tanh(x: Array, alpha: float = 1.0, beta: float = 1.0) -> Array:
    """``alpha * tanh(beta * x)``."""
    return np.float32(alpha) * np.tanh(x * np.float32(beta))


# The normal distribution's share below each point, its first and half its second derivative, by steps of 1/256: to the
# nearest point it is at most half a step, and what the third derivative would add is below 1e-9, or 2e-6 of a small share.
_FINE, _FAR = 256, 10
_POINTS = np.arange(-_FAR * _FINE, _FAR * _FINE + 1) / _FINE
_DENSITY = np.exp(-(_POINTS**2) / 2) / math.sqrt(2 * math.pi)
_SHARES = tuple(
    np.asarray(t, np.float32)
    for t in (
        [0.5 * math.erfc(-p / math.sqrt(2)) for p in _POINTS], _DENSITY / _FINE, -_POINTS * _DENSITY / (2 * _FINE**2)
    )
)  # fmt: skip


def share_below(x: Array) -> Array:
    """``(1 + erf(x / sqrt(2))) / 2`` in float32; NaN stays NaN."""
    position = np.clip(x, np.float32(-_FAR), np.float32(_FAR)) * np.float32(_FINE)
    nearest = np.rint(position)
    position -= nearest
    with np.errstate(invalid="ignore"):
        # NaN becomes some place in the table, and what is multiplied with it there is NaN.
        index = nearest.astype(np.intp)
    index += _FAR * _FINE
    value, slope, bend = (t.take(index, mode="clip") for t in _SHARES)
    bend *= position
    bend += slope
    bend *= position
    bend += value
    return bend


@operation("gelu", over=True)
@by_pieces
def gelu(x: Array, mode: str = "EXACT") -> Array:
    """``x`` times the normal distribution's share below it, or one of its approximations."""
    if mode == "EXACT":
        return np.multiply(x, share_below(np.asarray(x, np.float32)), dtype=np.float32)
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))
    return x * sigmoid_of(np.float32(1.702) * x)
