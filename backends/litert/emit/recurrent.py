"""Recurrent cells, step after step.

LiteRT's own operator for sequences gives neither states nor a start from any; written out, everything that ONNX says is there,
and sizes are fixed anyway.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, emits
from optkit.backends.litert.flat import NOTHING, Tensor
from optkit.graph import attribute, constant

# Beyond, the file holds more operators than weights.
_LONGEST = 1024


# Operators of the functions that gates may be.
_FUNCTIONS = {"Sigmoid": "LOGISTIC", "Tanh": "TANH", "Relu": "RELU"}
_USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _functions(node: ir.Node) -> list[str]:
    """Names of the functions of one direction after the other."""
    names = attribute(node, "activations")
    if names is None:
        return _USUAL[node.op_type] * (
            1 + (node.attributes.get_string("direction", "forward") == "bidirectional")
        )
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]  # type: ignore[attr-defined]


def _refuse(node: ir.Node) -> str | None:
    given = [*node.inputs, *[None] * (8 - len(node.inputs))]
    if given[4] is not None:
        return "LiteRT: sequences of different lengths"
    if given[7] is not None:
        return "LiteRT: peepholes"
    if any(constant(v) is None for v in (given[1], given[2], given[3]) if v is not None):
        return "LiteRT: weights that are computed"
    if "clip" in node.attributes or any(node.attributes.get_int(k, 0) for k in ("input_forget", "layout")):
        return "LiteRT: clip, input_forget or layout"
    if unknown := [n for n in _functions(node) if n not in _FUNCTIONS]:
        return f"LiteRT: activations other than {', '.join(_FUNCTIONS)}: {', '.join(unknown)}"
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    steps = shape[0] if shape is not None and len(shape) else None
    if isinstance(steps, int) and steps > _LONGEST:
        return f"LiteRT: {steps} steps, each an operator of its own, and at most {_LONGEST} are written"
    return None


@emits("LSTM", "GRU", "RNN", refuse=_refuse)
def _recurrent(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x = c.get(source)
    weights, again = (np.asarray(constant(v)) for v in node.inputs[1:3])
    held = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    offsets = np.zeros((len(weights), 2 * weights.shape[1]), np.float32) if held is None else held
    steps, batch, _ = x.shape
    hidden = again.shape[2]
    count, states = weights.shape[1], 2 if node.op_type == "LSTM" else 1
    names = _functions(node)
    each = len(names) // len(weights)
    direction = node.attributes.get_string("direction", "forward")
    outs: list[list[Tensor]] = []
    lasts: list[list[Tensor]] = []
    for d in range(len(weights)):
        backward = direction == "reverse" or d == 1
        own, other = offsets[d, :count], offsets[d, count:].copy()
        functions = [_FUNCTIONS[n] for n in names[d * each : (d + 1) * each]]
        apart = node.op_type == "GRU" and bool(node.attributes.get_int("linear_before_reset", 0))
        if apart:
            # Added to the state's product before the gate that resets it.
            own = own + np.concatenate([other[: 2 * hidden], np.zeros(hidden, np.float32)])
            other[: 2 * hidden] = 0
        else:
            own = own + other
        gates = _product(c, c.reshaped(x, (steps * batch, x.shape[2])), weights[d], own)
        state = [_start(c, node, 5 + i, d, batch, hidden) for i in range(states)]
        found: dict[int, Tensor] = {}
        for step in range(steps)[:: -1 if backward else 1]:
            part = _rows(c, gates, step * batch, batch)
            if node.op_type == "LSTM":
                state = _lstm_step(c, part, state[0], state[1], again[d], functions)
            elif node.op_type == "GRU":
                state = [_gru_step(c, part, state[0], again[d], other if apart else None, functions)]
            else:
                state = [_function(c, functions[0], _add(c, part, _product(c, state[0], again[d], None)))]
            found[step] = state[0]
        outs.append([found[step] for step in range(steps)])
        lasts.append(state)
    shape = (steps, len(outs), batch, hidden)
    rows = [c.reshaped(outs[d][step], (1, batch, hidden)) for step in range(steps) for d in range(len(outs))]
    results = [c.reshaped(_joined(c, rows), shape)]
    for i in range(states):
        results.append(_joined(c, [c.reshaped(last[i], (1, batch, hidden)) for last in lasts]))
    for value, made in zip(node.outputs, results, strict=False):
        c.put(value, made)


def _product(c: Context, x: Tensor, matrix: np.ndarray, bias: np.ndarray | None) -> Tensor:
    """``x matrix^T + bias``."""
    more = NOTHING if bias is None else c.graph.constant(np.ascontiguousarray(bias, np.float32))
    return c.op(
        "FULLY_CONNECTED", [x, c.weights(matrix), more], (x.shape[0], len(matrix)),
        settings=("FullyConnectedOptions", {}),
    )  # fmt: skip


def _start(c: Context, node: ir.Node, index: int, direction: int, batch: int, hidden: int) -> Tensor:
    """The state before the first step."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return c.graph.constant(np.zeros((batch, hidden), np.float32))
    whole = c.get(value)
    return _rows(c, c.reshaped(whole, (whole.shape[0] * batch, hidden)), direction * batch, batch)


def _rows(c: Context, x: Tensor, first: int, count: int) -> Tensor:
    if count == x.shape[0]:
        return x
    return _slice(c, x, (first, 0), (count, x.shape[1]))


def _slice(c: Context, x: Tensor, begin: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return c.op("SLICE", [x, c.vector(begin), c.vector(size)], size, settings=("SliceOptions", {}))


def _function(c: Context, code: str, x: Tensor) -> Tensor:
    return c.op(code, [x], x.shape)


def _parts(c: Context, x: Tensor, hidden: int, count: int) -> list[Tensor]:
    return [_slice(c, x, (0, i * hidden), (x.shape[0], hidden)) for i in range(count)]


def _lstm_step(
    c: Context, gates: Tensor, h: Tensor, cell: Tensor, again: np.ndarray, functions: list[str]
) -> list[Tensor]:
    """Gates in ONNX's order: input, output, forget, cell."""
    total = _add(c, gates, _product(c, h, again, None))
    parts = _parts(c, total, h.shape[1], 4)
    take, give, keep = (_function(c, functions[0], p) for p in parts[:3])
    new = _function(c, functions[1], parts[3])
    cell = _add(c, _times(c, keep, cell), _times(c, take, new))
    return [_times(c, give, _function(c, functions[2], cell)), cell]


def _gru_step(
    c: Context, gates: Tensor, h: Tensor, again: np.ndarray, bias: np.ndarray | None, functions: list[str]
) -> Tensor:
    """Gates in ONNX's order: update, reset, hidden.

    Args:
        bias: Of the state's product, which is reset as a whole; None where the state is reset before the product.
    """
    hidden = h.shape[1]
    update, reset, new = _parts(c, gates, hidden, 3)
    if bias is None:
        before = _parts(c, _product(c, h, again[: 2 * hidden], None), hidden, 2)
    else:
        before = _parts(c, _product(c, h, again, bias), hidden, 3)
    z, r = (
        _function(c, functions[0], _add(c, a, b)) for a, b in zip((update, reset), before[:2], strict=True)
    )
    more = (
        _product(c, _times(c, r, h), again[2 * hidden :], None) if bias is None else _times(c, r, before[2])
    )
    n = _function(c, functions[1], _add(c, new, more))
    # (1 - z) n + z h
    difference = c.op("SUB", [h, n], h.shape, settings=("SubOptions", {}))
    return _add(c, n, _times(c, z, difference))


def _add(c: Context, a: Tensor, b: Tensor) -> Tensor:
    return c.op("ADD", [a, b], a.shape, settings=("AddOptions", {}))


def _times(c: Context, a: Tensor, b: Tensor) -> Tensor:
    return c.op("MUL", [a, b], a.shape, settings=("MulOptions", {}))


def _joined(c: Context, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return c.op("CONCATENATION", parts, shape, settings=("ConcatenationOptions", {"axis": 0}))
