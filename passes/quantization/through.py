"""What the function behind a value lets through: rounding is only felt behind it, and where it is flat not at all.

Integer convolutions store their sums before a float kernel applies the activation. HardSwish makes 0 of all that lies
below -3, so a grid from -20 to 13 spends half of its steps on numbers that are alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from optkit.graph import scalar, users
from optkit.passes.quantization.plan import swish

Function = Callable[[np.ndarray], np.ndarray]

# Points at which a function is looked at, and the share of its range that counts as none: a quarter of one of 256 steps.
_POINTS = 4096
_FLAT = 1 / 1024


def through(value: ir.Value) -> Function | None:
    """The function that everything which reads ``value`` applies to it, element by element; None where there is no such."""
    readers = users(value)
    if value.is_graph_output():
        return None
    if len(readers) == 2:
        return _swish if swish(value) is not None else None
    if len(readers) != 1 or readers[0].domain != "" or readers[0].inputs[0] is not value:
        return None
    node = readers[0]
    if node.op_type == "Clip":
        low, high = (scalar(v) for v in (*node.inputs[1:], None, None)[:2])
        if any(v is not None and scalar(v) is None for v in node.inputs[1:]) or low is high is None:
            return None
        return lambda x: np.clip(x, low, high)
    if node.op_type == "HardSigmoid":
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        return lambda x: np.clip(alpha * x + beta, 0.0, 1.0)
    return _FUNCTIONS.get(node.op_type)


def felt(low: float, high: float, function: Function) -> tuple[float, float]:
    """The part of ``[low, high]`` outside of which ``function`` is flat: it then stays within 1/1024 of its range."""
    if not low < high:
        return low, high
    x = np.linspace(low, high, _POINTS)
    y = function(x)
    near = _FLAT * float(y.max() - y.min())
    left = int(np.flatnonzero(_alike(y, near))[-1])
    right = _POINTS - 1 - int(np.flatnonzero(_alike(y[::-1], near))[-1])
    return (float(x[left]), float(x[right])) if left < right else (low, high)


def _alike(y: np.ndarray, near: float) -> np.ndarray:
    """Up to which index everything before is within ``near`` of what is there."""
    spread = np.maximum(np.maximum.accumulate(y) - y, y - np.minimum.accumulate(y))
    return np.asarray(np.logical_and.accumulate(spread <= near))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))


def _swish(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * _sigmoid(x))


def _gelu(x: np.ndarray) -> np.ndarray:
    # Of both spellings: they differ by less than 0.0005.
    return np.asarray(0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.logaddexp(0.0, x))


_FUNCTIONS: dict[str, Function] = {
    "Gelu": _gelu,
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Relu": lambda x: np.maximum(x, 0.0),
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Tanh": np.tanh,
}
