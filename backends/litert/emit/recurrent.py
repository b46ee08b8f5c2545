"""LSTMs, step after step.

LiteRT's own operator for sequences gives neither states nor a start from any; written out, everything that ONNX says is there,
and sizes are fixed anyway.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, emits, integer, text
from optkit.backends.litert.flat import NOTHING, Tensor
from optkit.graph import attribute, constant

# Beyond, the file holds more operators than weights.
_LONGEST = 1024


def _refuse_lstm(node: ir.Node) -> str | None:
    given = [*node.inputs, *[None] * (8 - len(node.inputs))]
    if given[4] is not None:
        return "LiteRT: sequences of different lengths"
    if given[7] is not None:
        return "LiteRT: peepholes"
    if any(constant(v) is None for v in (given[1], given[2], given[3]) if v is not None):
        return "LiteRT: weights that are computed"
    if attribute(node, "clip") is not None or integer(node, "input_forget") or integer(node, "layout"):
        return "LiteRT: clip, input_forget or layout"
    names = attribute(node, "activations")
    usual = ["Sigmoid", "Tanh", "Tanh"] * (1 + (text(node, "direction", "forward") == "bidirectional"))
    if names is not None and [n.decode() if isinstance(n, bytes) else str(n) for n in names] != usual:  # type: ignore[attr-defined]
        return "LiteRT: activations other than Sigmoid, Tanh, Tanh"
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    steps = shape[0] if shape is not None and len(shape) else None
    if isinstance(steps, int) and steps > _LONGEST:
        return f"LiteRT: {steps} steps, each an operator of its own, and at most {_LONGEST} are written"
    return None


@emits("LSTM", refuse=_refuse_lstm)
def _lstm(c: Context, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    x = c.get(source)
    weights, again = (np.asarray(constant(v)) for v in node.inputs[1:3])
    held = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    offsets = np.zeros((len(weights), 2 * weights.shape[1]), np.float32) if held is None else held
    steps, batch, _ = x.shape
    hidden = again.shape[2]
    direction = text(node, "direction", "forward")
    outs: list[list[Tensor]] = []
    lasts: list[tuple[Tensor, Tensor]] = []
    for d in range(len(weights)):
        backward = direction == "reverse" or d == 1
        bias = offsets[d, : 4 * hidden] + offsets[d, 4 * hidden :]
        gates = _product(c, c.reshaped(x, (steps * batch, x.shape[2])), weights[d], bias)
        h, cell = (_start(c, node, i, d, batch, hidden) for i in (5, 6))
        found: dict[int, Tensor] = {}
        for step in range(steps)[:: -1 if backward else 1]:
            part = _rows(c, gates, step * batch, batch)
            h, cell = _step(c, part, h, cell, again[d])
            found[step] = h
        outs.append([found[step] for step in range(steps)])
        lasts.append((h, cell))
    shape = (steps, len(outs), batch, hidden)
    rows = [c.reshaped(outs[d][step], (1, batch, hidden)) for step in range(steps) for d in range(len(outs))]
    results = [c.reshaped(_joined(c, rows), shape)]
    for i in range(2):
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


def _step(c: Context, gates: Tensor, h: Tensor, cell: Tensor, again: np.ndarray) -> tuple[Tensor, Tensor]:
    """Gates in ONNX's order: input, output, forget, cell."""
    batch, hidden = h.shape
    total = _add(c, gates, _product(c, h, again, None))
    parts = [_slice(c, total, (0, i * hidden), (batch, hidden)) for i in range(4)]
    take, give, keep = (c.op("LOGISTIC", [p], p.shape) for p in parts[:3])
    new = c.op("TANH", [parts[3]], parts[3].shape)
    cell = _add(c, _times(c, keep, cell), _times(c, take, new))
    return _times(c, give, c.op("TANH", [cell], cell.shape)), cell


def _add(c: Context, a: Tensor, b: Tensor) -> Tensor:
    return c.op("ADD", [a, b], a.shape, settings=("AddOptions", {}))


def _times(c: Context, a: Tensor, b: Tensor) -> Tensor:
    return c.op("MUL", [a, b], a.shape, settings=("MulOptions", {}))


def _joined(c: Context, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return c.op("CONCATENATION", parts, shape, settings=("ConcatenationOptions", {"axis": 0}))
