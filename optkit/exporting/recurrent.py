"""LSTM, GRU and RNN as one operator each, so that tracing leaves their length free.

Traced as they are, torch's recurrent operators fix the length of the sequence. In their place go operators of our own:
the same computation in eager, a symbolic shape while tracing, and one ONNX node a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# How ONNX orders the gates that torch keeps as: lstm i f g o; gru r z n.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def _define() -> dict[str, Any]:
    fields = "Tensor[] weights, bool bias, int layers, bool bidirectional, bool batch_first"
    library = torch.library.Library("optkit", "FRAGMENT")
    library.define(f"lstm(Tensor x, Tensor h, Tensor c, {fields}) -> (Tensor, Tensor, Tensor)")
    for name in ("gru", "rnn_tanh", "rnn_relu"):
        library.define(f"{name}(Tensor x, Tensor h, {fields}) -> (Tensor, Tensor)")
    kernels = torch._C._VariableFunctions

    def lstm(x: Any, h: Any, c: Any, weights: Any, bias: bool, layers: int, both: bool, first: bool) -> Any:
        y, h, c = kernels.lstm(x, (h, c), weights, bias, layers, 0.0, False, both, first)
        return y.contiguous(), h, c

    def lstm_shape(
        x: Any, h: Any, c: Any, weights: Any, bias: bool, layers: int, both: bool, first: bool
    ) -> Any:
        return x.new_empty((*x.shape[:2], h.shape[2] * (1 + both))), torch.empty_like(h), torch.empty_like(c)

    def plain(name: str) -> Callable[..., Any]:
        def run(x: Any, h: Any, weights: Any, bias: bool, layers: int, both: bool, first: bool) -> Any:
            y, h = getattr(kernels, name)(x, h, weights, bias, layers, 0.0, False, both, first)
            return y.contiguous(), h

        return run

    def plain_shape(x: Any, h: Any, weights: Any, bias: bool, layers: int, both: bool, first: bool) -> Any:
        return x.new_empty((*x.shape[:2], h.shape[2] * (1 + both))), torch.empty_like(h)

    library.impl("lstm", lstm, "CompositeExplicitAutograd")
    torch.library.register_fake("optkit::lstm", lstm_shape, lib=library)
    for name in ("gru", "rnn_tanh", "rnn_relu"):
        library.impl(name, plain(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"optkit::{name}", plain_shape, lib=library)
    return {"library": library}


_DEFINED = _define()


@contextlib.contextmanager
def symbolic() -> Iterator[None]:
    """While open, recurrent modules trace as one operator."""
    # The module of torch that its recurrent layers call through; it forwards names that it does not have itself.
    table: Any = torch._VF
    own: Any = torch.ops.optkit
    kernels = torch._C._VariableFunctions
    rnn: Any = torch.nn.modules.rnn

    def lstm(x: Any, state: Any, weights: Any, *rest: Any) -> Any:
        # A packed sequence has its weights one place later; projections have another weight a layer.
        if isinstance(weights, torch.Tensor) or state[0].shape != state[1].shape or len(rest) != 6:
            return kernels.lstm(x, state, weights, *rest)
        bias, layers, _, _, both, first = rest
        return own.lstm(x, state[0], state[1], list(weights), bias, layers, both, first)

    def other(name: str) -> Callable[..., Any]:
        def run(x: Any, state: Any, weights: Any, *rest: Any) -> Any:
            if isinstance(weights, torch.Tensor) or len(rest) != 6:
                return getattr(kernels, name)(x, state, weights, *rest)
            bias, layers, _, _, both, first = rest
            return getattr(own, name)(x, state, list(weights), bias, layers, both, first)

        return run

    replaced = {"lstm": lstm, **{name: other(name) for name in ("gru", "rnn_tanh", "rnn_relu")}}
    old = dict(rnn._rnn_impls)
    try:
        for name, function in replaced.items():
            setattr(table, name, function)
        rnn._rnn_impls.update(RNN_TANH=replaced["rnn_tanh"], RNN_RELU=replaced["rnn_relu"])
        yield
    finally:
        for name in replaced:
            delattr(table, name)
        rnn._rnn_impls.update(old)


def translations() -> dict[Any, Callable[..., Any]]:
    """How the operators are written in ONNX."""

    def lstm(
        x: Any, h: Any, c: Any, weights: Any, bias: bool, layers: int, bidirectional: bool, batch_first: bool
    ) -> Any:
        return _layers("LSTM", x, (h, c), weights, bias, layers, bidirectional, batch_first, {})

    def gru(
        x: Any, h: Any, weights: Any, bias: bool, layers: int, bidirectional: bool, batch_first: bool
    ) -> Any:
        attributes = {"linear_before_reset": 1}
        return _layers("GRU", x, (h,), weights, bias, layers, bidirectional, batch_first, attributes)

    def rnn(kind: str) -> Callable[..., Any]:
        def write(
            x: Any, h: Any, weights: Any, bias: bool, layers: int, bidirectional: bool, batch_first: bool
        ) -> Any:
            attributes = {"activations": [kind] * (1 + bidirectional)}
            return _layers("RNN", x, (h,), weights, bias, layers, bidirectional, batch_first, attributes)

        return write

    own: Any = torch.ops.optkit
    return {
        own.lstm.default: lstm,
        own.gru.default: gru,
        own.rnn_tanh.default: rnn("Tanh"),
        own.rnn_relu.default: rnn("Relu"),
    }


def _layers(
    op_type: str, x: Any, states: Sequence[Any], weights: Sequence[Any], bias: bool, layers: int, both: bool, first: bool,
    attributes: dict[str, Any],
) -> tuple[Any, ...]:  # fmt: skip
    from onnxscript import opset18 as op

    directions, each = 1 + both, 4 if bias else 2
    hidden = int(weights[1].shape[1])

    def gates(tensor: Any) -> Any:
        order = _GATES[op_type]
        if len(order) == 1:
            return tensor
        parts = op.Split(tensor, num_outputs=len(order), axis=0)
        return op.Concat(*(parts[i] for i in order), axis=0)

    def stacked(tensors: Sequence[Any]) -> Any:
        axis = op.Constant(value_ints=[0])
        rows = [op.Unsqueeze(t, axis) for t in tensors]
        return rows[0] if len(rows) == 1 else op.Concat(*rows, axis=0)

    y = op.Transpose(x, perm=[1, 0, 2]) if first else x
    ends: list[list[Any]] = [[] for _ in states]
    for layer in range(layers):
        start = layer * directions * each
        own = [weights[start + d * each : start + (d + 1) * each] for d in range(directions)]
        w, r = stacked([gates(p[0]) for p in own]), stacked([gates(p[1]) for p in own])
        b = stacked([op.Concat(gates(p[2]), gates(p[3]), axis=0) for p in own]) if bias else None
        begin, end = (
            op.Constant(value_ints=[layer * directions]),
            op.Constant(value_ints=[(layer + 1) * directions]),
        )
        axis = op.Constant(value_ints=[0])
        initial = [s if layers == 1 else op.Slice(s, begin, end, axis) for s in states]
        run = getattr(op, op_type)
        direction = "bidirectional" if both else "forward"
        out, *last = run(y, w, r, b, None, *initial, hidden_size=hidden, direction=direction, **attributes)
        for kept, state in zip(ends, last, strict=False):
            kept.append(state)
        # [length, directions, batch, hidden] -> [length, batch, directions * hidden]
        if directions == 1:
            y = op.Squeeze(out, op.Constant(value_ints=[1]))
        else:
            y = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    y = op.Transpose(y, perm=[1, 0, 2]) if first else y
    return (y, *(kept[0] if len(kept) == 1 else op.Concat(*kept, axis=0) for kept in ends))
