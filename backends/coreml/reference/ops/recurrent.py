"""Recurrent cells; one step after the other, as they are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.halves import wide
from optkit.backends.coreml.reference.ops.elementwise import sigmoid_of
from optkit.backends.coreml.reference.ops.linear import linear
from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray

_ACTIVATIONS: dict[str, Callable[[Array], Any]] = {
    "tanh": np.tanh, "sigmoid": sigmoid_of, "relu": lambda x: np.maximum(x, np.float32(0)), "linear": lambda x: x,
    "hard_sigmoid": lambda x: np.clip(x * np.float32(0.2) + np.float32(0.5), 0, 1),
    "sigmoid_hard": lambda x: np.clip(x * np.float32(0.2) + np.float32(0.5), 0, 1),
}  # fmt: skip


def _steps(length: int, backwards: bool) -> range:
    return range(length - 1, -1, -1) if backwards else range(length)


def _lstm_way(
    x: Array, h: Array, c: Array, w: Array, r: Array, bias: Any, functions: list[Any], clip: float | None, backwards: bool
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gates in the order i f o z."""
    gate, cell, out = functions
    inputs, r = linear(x, w, bias), wide(r)
    units = h.shape[-1]
    states = np.empty((len(x), *h.shape), np.float32)
    for t in _steps(len(x), backwards):
        gates = inputs[t] + h @ r.T
        i, f, o = (gate(gates[:, k * units : (k + 1) * units]) for k in range(3))
        c = f * c + i * cell(gates[:, 3 * units :])
        c = c if clip is None else np.clip(c, -clip, clip)
        h = o * out(c)
        states[t] = h
    return states, h, c


@operation("lstm")
def lstm(
    x: Array, initial_h: Array, initial_c: Array, weight_ih: Array, weight_hh: Array, bias: Array | None = None,
    weight_ih_back: Array | None = None, weight_hh_back: Array | None = None, bias_back: Array | None = None,
    direction: str = "forward", output_sequence: bool = False, recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh", activation: str = "tanh", clip: float | None = None,
) -> list[Array]:  # fmt: skip
    """Long short-term memory."""
    functions = [_ACTIVATIONS[a] for a in (recurrent_activation, cell_activation, activation)]
    if direction != "bidirectional":
        y, h, c = _lstm_way(
            x, initial_h, initial_c, weight_ih, weight_hh, bias, functions, clip, direction == "reverse"
        )
    else:
        units = initial_h.shape[-1] // 2
        one = _lstm_way(
            x, initial_h[:, :units], initial_c[:, :units], weight_ih, weight_hh, bias, functions, clip, False
        )
        assert weight_ih_back is not None and weight_hh_back is not None
        two = _lstm_way(
            x, initial_h[:, units:], initial_c[:, units:], weight_ih_back, weight_hh_back, bias_back, functions, clip, True
        )  # fmt: skip
        y, h, c = (np.concatenate(pair, -1) for pair in zip(one, two, strict=True))
    return [y if output_sequence else h[None], h, c]


@operation("gru")
def gru(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Array | None = None, direction: str = "forward",
    output_sequence: bool = False, recurrent_activation: str = "sigmoid", activation: str = "tanh",
) -> list[Array]:  # fmt: skip
    """Gated recurrent unit, gates in the order r o z, by the formulas of iOS 15."""
    gate, out = _ACTIVATIONS[recurrent_activation], _ACTIVATIONS[activation]
    inputs, weight_hh = linear(x, weight_ih, bias), wide(weight_hh)
    h, units = initial_h, initial_h.shape[-1]
    states = np.empty((len(x), *h.shape), np.float32)
    for t in _steps(len(x), direction == "reverse"):
        own = h @ weight_hh.T
        r = gate(inputs[t][:, :units] + own[:, :units])
        z = gate(inputs[t][:, 2 * units :] + own[:, 2 * units :])
        o = out(inputs[t][:, units : 2 * units] + r * own[:, units : 2 * units])
        h = (1 - z) * o + z * h
        states[t] = h
    return [states if output_sequence else h[None], h]


@operation("rnn")
def rnn(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Array | None = None, direction: str = "forward",
    output_sequence: bool = False, activation: str = "tanh",
) -> list[Array]:  # fmt: skip
    """The plain recurrent cell."""
    out, h = _ACTIVATIONS[activation], initial_h
    inputs, weight_hh = linear(x, weight_ih, bias), wide(weight_hh)
    states = np.empty((len(x), *h.shape), np.float32)
    for t in _steps(len(x), direction == "reverse"):
        h = out(inputs[t] + h @ weight_hh.T)
        states[t] = h
    return [states if output_sequence else h[None], h]
