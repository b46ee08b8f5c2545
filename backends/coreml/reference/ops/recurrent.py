"""Recurrent cells; one step after the other, as they are defined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from optkit.backends.coreml.reference.halves import wide
from optkit.backends.coreml.reference.ops.elementwise import sigmoid_of
from optkit.backends.coreml.reference.ops.linear import AMPLE, linear
from optkit.backends.coreml.reference.ops.table import operation

Array = np.ndarray

_ACTIVATIONS: dict[str, Callable[[Array], Any]] = {
    "tanh": np.tanh, "sigmoid": sigmoid_of, "relu": lambda x: np.maximum(x, np.float32(0)), "linear": lambda x: x,
    "hard_sigmoid": lambda x: np.clip(x * np.float32(0.2) + np.float32(0.5), 0, 1),
    "sigmoid_hard": lambda x: np.clip(x * np.float32(0.2) + np.float32(0.5), 0, 1),
}  # fmt: skip

# Elements of gates, and of weights in float32, that are held where there is room for none.
_LEAST = 1 << 13


def _steps(length: int, backwards: bool) -> range:
    return range(length - 1, -1, -1) if backwards else range(length)


def _from_inputs(
    x: Array, weight: Array, bias: Array | None, order: range, room: int
) -> Iterator[tuple[int, Array]]:
    """Of each step, in their order, its place and what its input adds to the gates: of as many steps at a time as there is room for."""
    each = math.prod(x.shape[1:-1]) * len(weight)
    several = max(1, max(_LEAST, room) // each)
    for start in range(0, len(order), several):
        some = order[start : start + several]
        first = min(some[0], some[-1])
        gates = linear(x[first : first + len(some)], weight, bias, room=room)
        for t in some:
            yield t, gates[t - first].copy()
        del gates  # before the next are made


def _from_state(weight: Array, room: int) -> Callable[[Array], Array]:
    """What a state adds to the gates: of weights in float16 that there is no room to keep in float32, some rows at a time in each step."""
    if weight.size <= max(room, _LEAST):
        weight = wide(weight)
    return lambda h: linear(h, weight, room=room)


def _lstm_way(
    x: Array, h: Array, c: Array, w: Array, r: Array, bias: Array | None, functions: list[Any], clip: float | None,
    backwards: bool, states: Array | None, room: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Gates in the order i f o z; where ``states`` are asked for, they are written there."""
    gate, cell, out = functions
    own, units = _from_state(r, room // 2), h.shape[-1]
    for t, gates in _from_inputs(x, w, bias, _steps(len(x), backwards), room // 2):
        gates = gates + own(h)
        i, f, o = (gate(gates[:, k * units : (k + 1) * units]) for k in range(3))
        c = f * c + i * cell(gates[:, 3 * units :])
        c = c if clip is None else np.clip(c, -clip, clip)
        h = o * out(c)
        if states is not None:
            states[t] = h
    return h, c


def _all_states(x: Array, h: Array, wanted: bool) -> tuple[Array | None, int]:
    """Where those of all steps go, and how many elements they are."""
    return (np.empty((len(x), *h.shape), np.float32), len(x) * h.size) if wanted else (None, 0)


@operation("lstm", room=True)
def lstm(
    x: Array, initial_h: Array, initial_c: Array, weight_ih: Array, weight_hh: Array, bias: Array | None = None,
    weight_ih_back: Array | None = None, weight_hh_back: Array | None = None, bias_back: Array | None = None,
    direction: str = "forward", output_sequence: bool = False, recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh", activation: str = "tanh", clip: float | None = None, room: int = AMPLE,
) -> list[Array]:  # fmt: skip
    """Long short-term memory."""
    functions = [_ACTIVATIONS[a] for a in (recurrent_activation, cell_activation, activation)]
    y, taken = _all_states(x, initial_h, output_sequence)
    ways = [(weight_ih, weight_hh, bias, direction == "reverse")]
    if direction == "bidirectional":
        assert weight_ih_back is not None and weight_hh_back is not None
        ways.append((weight_ih_back, weight_hh_back, bias_back, True))
    units = initial_h.shape[-1] // len(ways)
    last = []
    for index, (w, r, b, backwards) in enumerate(ways):
        some = (..., slice(index * units, (index + 1) * units))
        last.append(
            _lstm_way(
                x, initial_h[some], initial_c[some], w, r, b, functions, clip, backwards, None if y is None else y[some],
                room - taken,
            )
        )  # fmt: skip
    h, c = (np.concatenate(both, -1) for both in zip(*last, strict=True))
    return [h[None] if y is None else y, h, c]


@operation("gru", room=True)
def gru(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Array | None = None, direction: str = "forward",
    output_sequence: bool = False, recurrent_activation: str = "sigmoid", activation: str = "tanh", room: int = AMPLE,
) -> list[Array]:  # fmt: skip
    """Gated recurrent unit, gates in the order r o z, by the formulas of iOS 15."""
    gate, out = _ACTIVATIONS[recurrent_activation], _ACTIVATIONS[activation]
    y, taken = _all_states(x, initial_h, output_sequence)
    room = (room - taken) // 2
    from_state, h, units = _from_state(weight_hh, room), initial_h, initial_h.shape[-1]
    for t, given in _from_inputs(x, weight_ih, bias, _steps(len(x), direction == "reverse"), room):
        own = from_state(h)
        r = gate(given[:, :units] + own[:, :units])
        z = gate(given[:, 2 * units :] + own[:, 2 * units :])
        o = out(given[:, units : 2 * units] + r * own[:, units : 2 * units])
        h = (1 - z) * o + z * h
        if y is not None:
            y[t] = h
    return [h[None] if y is None else y, h]


@operation("rnn", room=True)
def rnn(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Array | None = None, direction: str = "forward",
    output_sequence: bool = False, activation: str = "tanh", room: int = AMPLE,
) -> list[Array]:  # fmt: skip
    """The plain recurrent cell."""
    out, h = _ACTIVATIONS[activation], initial_h
    y, taken = _all_states(x, initial_h, output_sequence)
    room = (room - taken) // 2
    from_state = _from_state(weight_hh, room)
    for t, given in _from_inputs(x, weight_ih, bias, _steps(len(x), direction == "reverse"), room):
        h = out(given + from_state(h))
        if y is not None:
            y[t] = h
    return [h[None] if y is None else y, h]
