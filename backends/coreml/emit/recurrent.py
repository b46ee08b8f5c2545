"""Recurrent cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, cast, emits, like, name_of, refused, unchecked
from optkit.backends.coreml.emit.quant import rows, stored_constant
from optkit.backends.coreml.quiet import mb
from optkit.graph import attribute, constant

# Steps that are written out one after the other; more make programs that take minutes to compile, and run in a loop.
_STEPS = 1024
_DEFAULTS = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"],
}  # fmt: skip
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Relu": "relu"}


def _activations(node: ir.Node) -> list[str]:
    one = _DEFAULTS[node.op_type]
    found = attribute(node, "activations")
    if found is None:
        return one * _directions(node)
    return [a.decode() if isinstance(a, bytes) else str(a) for a in found]  # type: ignore[attr-defined]


def _directions(node: ir.Node) -> int:
    return 2 if node.attributes.get_string("direction", "forward") == "bidirectional" else 1


def _refuse(node: ir.Node) -> str | None:
    if node.attributes.get_int("layout", 0):
        return "layout 1, with the batch first"
    if attribute(node, "clip") is not None:
        return "clip"
    if node.attributes.get_int("input_forget", 0):
        return "input_forget"
    if len(node.inputs) > 7 and node.inputs[7] is not None:
        return "peepholes"
    if len(node.inputs) > 4 and node.inputs[4] is not None and constant(node.inputs[4]) is None:
        return "lengths of sequences that are computed at run time"
    if not all(_is_constant(node, v) for v in node.inputs[1:3]):
        return "Core ML needs the weights of a recurrent cell to be constant"
    x, lengths = node.inputs[0], constant(node.inputs[4]) if len(node.inputs) > 4 else None
    steps = None if x is None or x.shape is None else x.shape[0]
    if lengths is not None and isinstance(steps, int) and not (lengths == steps).all():
        return f"sequences that are shorter than the input, of {steps} steps: {lengths.tolist()}"
    names = _activations(node)
    if node.op_type == "LSTM" and names != _DEFAULTS["LSTM"] * _directions(node):
        return f"activations {', '.join(names)}"
    unknown = [a for a in names if a not in _ACTIVATIONS]
    return f"activations {', '.join(unknown)}" if unknown else None


def _is_constant(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether weights are known: those of an LSTM may be 8-bit integers that are dequantized."""
    made = value.producer() if value is not None and node.op_type == "LSTM" else None
    compressed = made is not None and made.op_type == "DequantizeLinear" and stored_constant(made)
    return compressed or constant(value) is not None


def _bias(c: Context, node: ir.Node, rows: int, kind: Any) -> np.ndarray:
    """Both biases by direction, ``[D, 2, G H]``."""
    bias = c.known(node, 3)
    if c.has(node, 3) and bias is None:
        raise refused(node, "Core ML needs the bias of a recurrent cell to be constant")
    return np.zeros((_directions(node), 2, rows), kind) if bias is None else bias.reshape(-1, 2, rows)


def _weights(c: Context, node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input weights, recurrent weights and both biases, by direction: ``[D, G H, I]``, ``[D, G H, H]``, ``[D, 2, G H]``."""
    w, r = c.known(node, 1), c.known(node, 2)
    assert w is not None and r is not None
    return w, r, _bias(c, node, w.shape[1], w.dtype)


def _lengths(c: Context, node: ir.Node, x: Any) -> None:
    lengths = c.known(node, 4)
    if lengths is not None and not (lengths == x.shape[0]).all():
        raise refused(node, "sequences that are shorter than the input")


def _initial(c: Context, node: ir.Node, index: int, x: Any, units: int) -> Any:
    """The state before the first step, ``[D, batch, H]``."""
    if c.has(node, index):
        return c.input(node, index)
    batch = c.sizes(x)[1]
    if isinstance(batch, int):
        return mb.const(val=np.zeros((_directions(node), batch, units), type(like(x, 0))))
    return mb.fill(shape=c.shape([_directions(node), batch, units]), value=like(x, 0))


@emits("LSTM", refuse=_refuse)
def _lstm(c: Context, node: ir.Node) -> Any:
    x, units, count = c.input(node, 0), node.attributes.get_int("hidden_size", 1), _directions(node)
    own = name_of(x)
    if c.version < 17:  # Whose operation is of float32 alone.
        x = cast(x, "fp32")
    _lengths(c, node, x)
    # ONNX has the gates in the order i o f c, Core ML in the order i f o z.
    order = np.concatenate([np.arange(units) + units * g for g in (0, 2, 1, 3)])
    kind = type(like(x, 0))
    bias = np.ascontiguousarray(_bias(c, node, 4 * units, kind).sum(1)[:, order].astype(kind))

    def gates(index: int, direction: int) -> Any:
        return rows(c, node, index, direction, order, kind)

    batch = c.sizes(x)[1]
    states = []
    for index in (5, 6):
        state = cast(_initial(c, node, index, x, units), name_of(x))
        flat = mb.transpose(x=state, perm=[1, 0, 2])
        states.append(c.reshape(flat, [batch, count * units]))
    settings = {
        "x": x, "initial_h": states[0], "initial_c": states[1], "weight_ih": gates(1, 0), "weight_hh": gates(2, 0),
        "bias": bias[0], "direction": node.attributes.get_string("direction", "forward"), "output_sequence": True,
    }  # fmt: skip
    if count == 2:
        settings |= {
            "weight_ih_back": gates(1, 1), "weight_hh_back": gates(2, 1), "bias_back": bias[1]
        }  # fmt: skip
    y, h, cell = (cast(v, own) for v in mb.lstm(**settings))
    y = mb.transpose(x=c.reshape(y, [*c.sizes(y)[:1], batch, count, units]), perm=[0, 2, 1, 3])
    last = [mb.transpose(x=c.reshape(s, [batch, count, units]), perm=[1, 0, 2]) for s in (h, cell)]
    return [y, *last][: len(node.outputs)]


@emits("GRU", "RNN", refuse=_refuse)
def _cells(c: Context, node: ir.Node) -> Any:
    """Step after step: Core ML's ``gru`` does not say where the bias of the new state is added, ONNX has both ways.

    Steps are written out where their number is known, and else run in a loop that writes into a sequence of zeros.
    """
    x, units = c.input(node, 0), node.attributes.get_int("hidden_size", 1)
    _lengths(c, node, x)
    w, r, bias = _weights(c, node)
    names = _activations(node)
    each = len(names) // _directions(node)
    states = _initial(c, node, 5, x, units)
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    known = isinstance(x.shape[0], int | np.integer) and int(x.shape[0]) <= _STEPS
    sequences, last = [], []
    for d, backwards in enumerate(ways[node.attributes.get_string("direction", "forward")]):
        functions = [getattr(mb, _ACTIVATIONS[a]) for a in names[d * each : (d + 1) * each]]
        h = mb.squeeze(
            x=mb.slice_by_index(x=states, begin=[d, 0, 0], end=[d + 1, 0, 0], end_mask=[False, True, True]),
            axes=[0],
        )
        cell = _gru if node.op_type == "GRU" else _rnn
        outside, step = cell(node, r[d], bias[d], functions, type(like(x, 0)))
        # The part of the gates that does not depend on the state, ``[steps, batch, G H]``.
        kind = type(like(x, 0))
        gates = mb.linear(
            x=x,
            weight=np.ascontiguousarray(w[d].astype(kind)),
            bias=np.ascontiguousarray(outside.astype(kind)),
        )
        run = _written_out if known else _in_a_loop
        sequence, end = run(c, gates, h, step, backwards)
        sequences.append(sequence)
        last.append(mb.expand_dims(x=end, axes=[0]))
    y = mb.stack(values=sequences, axis=1)
    h = last[0] if len(last) == 1 else mb.concat(values=last, axis=0)
    return [y, h][: len(node.outputs)]


# The next state, from the gates of a step ``[batch, G H]`` and the state ``[batch, H]``.
_Step = Callable[[Any, Any], Any]


def _written_out(c: Context, gates: Any, h: Any, step: _Step, backwards: bool) -> tuple[Any, Any]:
    length = int(gates.shape[0])
    parts = mb.split(x=gates, split_sizes=[1] * length, axis=0) if length > 1 else [gates]
    states = [None] * length
    for t in range(length)[:: -1 if backwards else 1]:
        h = states[t] = step(mb.squeeze(x=parts[t], axes=[0]), h)
    return mb.stack(values=states, axis=0), h


def _in_a_loop(c: Context, gates: Any, h: Any, step: _Step, backwards: bool) -> tuple[Any, Any]:
    length, batch, units = c.sizes(gates)[0], c.sizes(gates)[1], int(h.shape[-1])
    count = np.int32(length) if isinstance(length, int) else mb.squeeze(x=length, axes=[0])
    sequence = mb.fill(shape=c.shape([length, batch, units]), value=like(gates, 0))
    first = mb.sub(x=count, y=np.int32(1)) if backwards else mb.const(val=np.int32(0))

    def goes_on(t: Any, *_: Any) -> Any:
        return mb.greater_equal(x=t, y=np.int32(0)) if backwards else mb.less(x=t, y=count)

    def once(t: Any, state: Any, found: Any) -> Any:
        after = step(mb.gather(x=gates, indices=t, axis=0, **unchecked(c)), state)
        place, row = mb.expand_dims(x=t, axes=[0]), mb.expand_dims(x=after, axes=[0])
        found = mb.scatter(data=found, indices=place, updates=row, axis=0, mode="update", **unchecked(c))
        return mb.add(x=t, y=np.int32(-1 if backwards else 1)), after, found

    _, end, found = mb.while_loop(_cond=goes_on, _body=once, loop_vars=(first, mb.identity(x=h), sequence))
    return found, end


def _rnn(
    node: ir.Node, r: np.ndarray, bias: np.ndarray, functions: list[Any], kind: Any
) -> tuple[np.ndarray, _Step]:
    """The bias outside of a step, and the step."""
    recurrent = np.ascontiguousarray(r.astype(kind))

    def step(gates: Any, h: Any) -> Any:
        return functions[0](x=mb.add(x=gates, y=mb.linear(x=h, weight=recurrent)))

    return bias.sum(0), step


def _gru(
    node: ir.Node, r: np.ndarray, bias: np.ndarray, functions: list[Any], kind: Any
) -> tuple[np.ndarray, _Step]:
    """The same with gates z, r and h, as ONNX GRU defines them."""
    units = r.shape[-1]
    after = bool(node.attributes.get_int("linear_before_reset", 0))
    # The recurrent bias of the new state is scaled by the reset gate, or is added like the others.
    outside = bias[0].copy()
    outside[: 2 * units] += bias[1, : 2 * units]
    if not after:
        outside[2 * units :] += bias[1, 2 * units :]
    recurrent, new = (np.ascontiguousarray(p.astype(kind)) for p in (r[: 2 * units], r[2 * units :]))
    inside = np.ascontiguousarray(bias[1, 2 * units :].astype(kind))

    def step(gates: Any, h: Any) -> Any:
        first, second = mb.split(x=gates, split_sizes=[2 * units, units], axis=1)
        both = functions[0](x=mb.add(x=first, y=mb.linear(x=h, weight=recurrent)))
        z, reset = mb.split(x=both, split_sizes=[units, units], axis=1)
        if after:
            own = mb.mul(x=reset, y=mb.linear(x=h, weight=new, bias=inside))
        else:
            own = mb.linear(x=mb.mul(x=reset, y=h), weight=new)
        candidate = functions[1](x=mb.add(x=second, y=own))
        # (1 - z) * candidate + z * h
        return mb.add(x=candidate, y=mb.mul(x=z, y=mb.sub(x=h, y=candidate)))

    return outside, step
