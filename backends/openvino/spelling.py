"""Spellings that OpenVINO computes as they are, for those that it takes for something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.openvino.placement import ABSORBED
from optkit.graph import constant, made_for_one, rank, scalar, users, walk
from optkit.rewrite import Builder, Names, remove_unused, substitute


def spelled(model: ir.Model) -> ir.Model | None:
    """A copy that OpenVINO (2026.4) computes as ``model`` says; None where ``model`` may stay as it is.

    * A convolution takes into its kernel the pair behind it, the sum behind that and the pair behind the sum, and leaves out the
      rounding of the first pair (``DnnlPostOpsComposer``: "drop rounding one special residual pattern"). A network that was
      trained with it came out 1.6 steps of int8 from what was trained. Spelled with Round and Clip it stays.
    * The largest of values that are all -inf is the lowest float32, so that what asks a mask for rows that see nothing finds none,
      and attention gives NaN there. Spelled by which elements are -inf it does.
    * A box whose overlap is the threshold itself is left out of NonMaxSuppression, with the threshold 0, which is ONNX's default, all
      but the first. The threshold is one of the next two numbers above.
    * A number that several Where nodes choose, as attention does before Softmax and for rows that see nothing, cannot be compiled
      ("All consumers of a Scalar expression are expected to have the same loop IDs"). Each gets a constant of its own.
    * Tile does not write its output where it repeats more than two of at least four axes and the repeats are computed. It
      repeats two at a time.
    """
    if not any(any(True for _ in find(model)) for find, _ in _SPELLINGS):
        return None
    model = model.clone()
    names = Names(model)
    for find, spell in _SPELLINGS:
        for nodes in list(find(model)):
            spell(nodes, names)
    return model


def _roundings(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Pairs between a convolution and a sum that has a pair behind it."""
    for node in walk(model):
        if node.op_type != "Add" or node.domain != "" or not _rounded(node.outputs[0]):
            continue
        for value in node.inputs:
            dq = made_for_one(value, "DequantizeLinear")
            q = None if dq is None else made_for_one(dq.inputs[0], "QuantizeLinear")
            if q is not None and dq is not None and q.inputs[1:] == dq.inputs[1:] and _ends(q) is not None:
                above = q.inputs[0]
                while above is not None and (before := made_for_one(above, *ABSORBED)) is not None:
                    above = before.inputs[0]
                if made_for_one(above, "Conv") is not None:
                    yield q, dq


def _rounded(value: ir.Value) -> bool:
    """Whether a QuantizeLinear reads ``value``, or what activations make of it."""
    return any(
        user.op_type == "QuantizeLinear" or (user.op_type in ABSORBED and _rounded(user.outputs[0]))
        for user in users(value)
        if user.domain == ""
    )


def _ends(q: ir.Node) -> tuple[np.float32, np.float32] | None:
    """How many steps below and above zero a grid ends, where it is one of integers for the whole tensor."""
    scale, zero = (constant(v) for v in q.inputs[1:]) if len(q.inputs) == 3 else (None, None)
    if scale is None or zero is None or scale.size != 1 or zero.dtype not in (np.int8, np.uint8):
        return None
    limits, middle = np.iinfo(zero.dtype), int(zero.reshape(-1)[0])
    return np.float32(limits.min - middle), np.float32(limits.max - middle)


def _round(pair: tuple[ir.Node, ir.Node], names: Names) -> None:
    q, dq = pair
    x, scale, _ = q.inputs
    ends = _ends(q)
    assert ends is not None
    op = Builder(dq, names)
    steps = op.Clip(op.Round(op.Div(x, scale)), *(np.asarray(end) for end in ends))
    substitute(dq.outputs[0], op.Mul(steps, scale))
    for node in (dq, q):
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _questions(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """What asks whether the largest element is -inf, and what finds that."""
    for node in walk(model):
        if node.op_type == "Equal" and node.domain == "":
            for value, other in (node.inputs, node.inputs[::-1]):
                most = None if value is None else value.producer()
                if (
                    most is not None
                    and most.op_type == "ReduceMax"
                    and most.domain == ""
                    and _number(other) == -np.inf
                ):
                    yield node, most
                    break


def _number(value: ir.Value | None) -> float | None:
    """What a constant of one element is, also behind casts."""
    while value is not None and (cast := value.producer()) is not None and cast.op_type == "Cast":
        value = cast.inputs[0]
    return scalar(value)


def _ask_each(found: tuple[ir.Node, ir.Node], names: Names) -> None:
    equal, most = found
    op, x = Builder(equal, names), most.inputs[0]
    assert x is not None
    low = np.array(-np.inf, x.dtype.numpy() if x.dtype is not None else np.float32)
    each = op.Cast(op.Equal(x, low), to=ir.DataType.FLOAT)
    every = op.node("ReduceMin", [each, *most.inputs[1:]], most.attributes)[0]
    substitute(equal.outputs[0], op.Cast(every, to=ir.DataType.BOOL))
    remove_unused([equal, most])


def _tiles(model: ir.Model) -> Iterator[ir.Node]:
    """Those of at least four axes by computed repeats."""
    for node in walk(model):
        computed = node.op_type == "Tile" and node.domain == "" and constant(node.inputs[1]) is None
        if computed and (_axes(node) or 0) > _TOGETHER + 1:
            yield node


def _axes(node: ir.Node) -> int | None:
    """How many a Tile has, by what it repeats or by the repeats."""
    count = rank(node.inputs[0])
    given = node.inputs[1].shape if count is None and node.inputs[1] is not None else None
    return given[0] if given is not None and isinstance(given[0], int) else count


def _tile_in_turn(node: ir.Node, names: Names) -> None:
    op, (x, repeats) = Builder(node, names), node.inputs
    count = _axes(node)
    assert count is not None
    for start in range(0, count, _TOGETHER):
        now = np.arange(count) // _TOGETHER == start // _TOGETHER
        x = op.Tile(x, op.Where(now, repeats, np.ones(1, np.int64)))
    assert x is not None
    substitute(node.outputs[0], x)
    remove_unused([node])


def _suppressions(model: ir.Model) -> Iterator[ir.Node]:
    return (n for n in walk(model) if n.op_type == "NonMaxSuppression" and n.domain == "")


def _raise_threshold(node: ir.Node, names: Names) -> None:
    op, given = Builder(node, names), node.inputs[3] if len(node.inputs) > 3 else None
    # No denormal, which processors may take for 0.
    least = op.constant(np.array([np.finfo(np.float32).tiny]), "least")
    more = np.nextafter(np.ones(1, np.float32), np.float32(2))
    if len(node.inputs) < 4:
        node.resize_inputs(4)
    node.replace_input_with(3, least if given is None else op.Max(op.Mul(given, more), least))


def _choices(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Where a Where node chooses a number that another reads as well."""
    for node in walk(model):
        if node.op_type != "Where" or node.domain != "":
            continue
        for index in (1, 2):
            value = node.inputs[index]
            if scalar(value) is not None and any(u.op_type == "Where" for u in users(value) if u is not node):  # type: ignore[arg-type]
                yield node, index


def _keep_apart(found: tuple[ir.Node, int], names: Names) -> None:
    node, index = found
    array = constant(node.inputs[index])
    assert array is not None
    node.replace_input_with(index, Builder(node, names).constant(array))


# As many axes as Tile repeats at a time.
_TOGETHER = 2
_SPELLINGS: tuple[tuple[Callable[[ir.Model], Iterator[Any]], Callable[[Any, Names], None]], ...] = (
    (_roundings, _round),
    (_questions, _ask_each),
    (_choices, _keep_apart),
    (_tiles, _tile_in_turn),
    (_suppressions, _raise_threshold),
)
