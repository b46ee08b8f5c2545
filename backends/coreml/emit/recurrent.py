"""Recurrent cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, cast, emits, like, name_of, refused
from optkit.backends.coreml.emit.quant import rows, stored_constant
from optkit.backends.coreml.quiet import mb
from optkit.graph import attribute, constant

# Steps that are written out one after the other; more make programs that take minutes to compile.
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
def _written_out(c: Context, node: ir.Node) -> Any:
    """Step after step: Core ML's ``gru`` does not say where the bias of the new state is added, ONNX has both ways."""
    x, units = c.input(node, 0), node.attributes.get_int("hidden_size", 1)
    length = x.shape[0]
    if not isinstance(length, int | np.integer) or int(length) > _STEPS:
        raise refused(node, f"Core ML needs the number of steps when it is compiled, at most {_STEPS}")
    _lengths(c, node, x)
    w, r, bias = _weights(c, node)
    names = _activations(node)
    each = len(names) // _directions(node)
    states = _initial(c, node, 5, x, units)
    ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    sequences, last = [], []
    for d, backwards in enumerate(ways[node.attributes.get_string("direction", "forward")]):
        functions = [getattr(mb, _ACTIVATIONS[a]) for a in names[d * each : (d + 1) * each]]
        h = mb.squeeze(
            x=mb.slice_by_index(x=states, begin=[d, 0, 0], end=[d + 1, 0, 0], end_mask=[False, True, True]),
            axes=[0],
        )
        cell = _gru if node.op_type == "GRU" else _rnn
        steps = cell(node, x, h, w[d], r[d], bias[d], functions, backwards, int(length))
        last.append(mb.expand_dims(x=steps[0 if backwards else -1], axes=[0]))
        sequences.append(mb.stack(values=steps, axis=0))
    y = mb.stack(values=sequences, axis=1)
    h = last[0] if len(last) == 1 else mb.concat(values=last, axis=0)
    return [y, h][: len(node.outputs)]


def _projected(x: Any, w: np.ndarray, bias: np.ndarray, length: int) -> list[Any]:
    """The part of the gates that does not depend on the state, for each step ``[batch, G H]``."""
    kind = type(like(x, 0))
    gates = mb.linear(
        x=x, weight=np.ascontiguousarray(w.astype(kind)), bias=np.ascontiguousarray(bias.astype(kind))
    )
    parts = mb.split(x=gates, split_sizes=[1] * length, axis=0) if length > 1 else [gates]
    return [mb.squeeze(x=p, axes=[0]) for p in parts]


def _order(length: int, backwards: bool) -> list[int]:
    return list(range(length))[:: -1 if backwards else 1]


def _rnn(
    node: ir.Node, x: Any, h: Any, w: np.ndarray, r: np.ndarray, bias: np.ndarray, functions: list[Any], backwards: bool,
    length: int,
) -> list[Any]:  # fmt: skip
    inputs = _projected(x, w, bias.sum(0), length)
    kind, steps = type(like(x, 0)), [None] * length
    recurrent = np.ascontiguousarray(r.astype(kind))
    for t in _order(length, backwards):
        h = functions[0](x=mb.add(x=inputs[t], y=mb.linear(x=h, weight=recurrent)))
        steps[t] = h
    return steps


def _gru(
    node: ir.Node, x: Any, h: Any, w: np.ndarray, r: np.ndarray, bias: np.ndarray, functions: list[Any], backwards: bool,
    length: int,
) -> list[Any]:  # fmt: skip
    """Gates z, r and h, as ONNX GRU defines them."""
    units = r.shape[-1]
    after = bool(node.attributes.get_int("linear_before_reset", 0))
    # The recurrent bias of the new state is scaled by the reset gate, or is added like the others.
    outside = bias[0].copy()
    outside[: 2 * units] += bias[1, : 2 * units]
    if not after:
        outside[2 * units :] += bias[1, 2 * units :]
    inputs = _projected(x, w, outside, length)
    kind, steps = type(like(x, 0)), [None] * length
    gates, new = (np.ascontiguousarray(p.astype(kind)) for p in (r[: 2 * units], r[2 * units :]))
    inside = np.ascontiguousarray(bias[1, 2 * units :].astype(kind))
    sizes = [2 * units, units]
    for t in _order(length, backwards):
        first, second = mb.split(x=inputs[t], split_sizes=sizes, axis=1)
        both = functions[0](x=mb.add(x=first, y=mb.linear(x=h, weight=gates)))
        z, reset = mb.split(x=both, split_sizes=[units, units], axis=1)
        if after:
            own = mb.mul(x=reset, y=mb.linear(x=h, weight=new, bias=inside))
        else:
            own = mb.linear(x=mb.mul(x=reset, y=h), weight=new)
        candidate = functions[1](x=mb.add(x=second, y=own))
        # (1 - z) * candidate + z * h
        h = mb.add(x=candidate, y=mb.mul(x=z, y=mb.sub(x=h, y=candidate)))
        steps[t] = h
    return steps
