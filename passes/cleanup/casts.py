"""Casts that change nothing, or that another cast makes up for, go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from optkit.graph import graphs, scalar
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove_unused, replaceable, substitute

# Bits of an integer that a float holds exactly: its significand, the leading one included.
_SIGNIFICAND = {
    ir.DataType.FLOAT16: 11,
    ir.DataType.BFLOAT16: 8,
    ir.DataType.FLOAT: 24,
    ir.DataType.DOUBLE: 53,
}
_SIGNED = {ir.DataType.INT8: 8, ir.DataType.INT16: 16, ir.DataType.INT32: 32, ir.DataType.INT64: 64}
_UNSIGNED = {ir.DataType.UINT8: 8, ir.DataType.UINT16: 16, ir.DataType.UINT32: 32, ir.DataType.UINT64: 64}
_WIDER = {
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}


def holds(narrow: ir.DataType, wide: ir.DataType) -> bool:
    """Whether ``wide`` has every value of ``narrow``."""
    if narrow == wide:
        return True
    if narrow == ir.DataType.BOOL:
        return wide in _SIGNIFICAND or wide in _SIGNED or wide in _UNSIGNED
    if narrow in _WIDER:
        return wide in _WIDER[narrow]
    signed, unsigned = _SIGNED.get(narrow), _UNSIGNED.get(narrow)
    if signed is not None:
        # -2**(n - 1) is a power of two; all others have n - 1 bits.
        return _SIGNED.get(wide, 0) >= signed or _SIGNIFICAND.get(wide, 0) >= signed - 1
    if unsigned is not None:
        return max(_UNSIGNED.get(wide, 0), _SIGNED.get(wide, 0) - 1, _SIGNIFICAND.get(wide, 0)) >= unsigned
    return False


class CleanCasts(GraphPass):
    """Remove casts to the same type, and casts whose effect the next one takes back.

    * ``CastLike(x, like)`` becomes ``Cast(x, to)``, where the type of ``like`` is known.
    * ``Cast(Cast(x, wide), to)`` becomes ``Cast(x, to)``, or ``x``, where ``wide`` has every value of ``x``'s type.
    * ``Equal(Cast(b), 1)``, ``Greater(Cast(b), 0)`` become ``b``; ``Equal(Cast(b), 0)`` becomes ``Not(b)``: truth values.
    * ``Shape(Cast(x))`` becomes ``Shape(x)``.

    All exact.
    """

    name: ClassVar[str] = "clean-casts"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Clean until no cast can go."""
        names, changes = Names(model), []
        again = True
        while again:
            again = False
            for graph in graphs(model):
                for node in tuple(graph):
                    place = label(node)
                    if node.graph is graph and node.domain == "" and _clean(node, names):
                        changes.append(Change(rule="clean-cast", node=place, detail=node.op_type))
                        again = True
        return changes


def _clean(node: ir.Node, names: Names) -> bool:
    match node.op_type:
        case "Cast":
            return _cast(node, names)
        case "CastLike":
            return _like(node, names)
        case "Equal" | "Greater":
            return _compare(node, names)
        case "Shape" | "Size":
            source = _cast_before(node.inputs[0])
            if source is not None:
                node.replace_input_with(0, source.inputs[0])
                remove_unused([source])
            return source is not None
    return False


def _like(node: ir.Node, names: Names) -> bool:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        return False
    options = {key: a.value for key, a in node.attributes.items()}
    cast = Builder(node, names).node("Cast", [node.inputs[0]], {"to": int(like.dtype), **options})[0]
    substitute(node.outputs[0], cast)
    remove_unused([node])
    return True


def _cast_before(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "Cast" and node.domain == "" else None


def _cast(node: ir.Node, names: Names) -> bool:
    x = node.inputs[0]
    if x is None or x.dtype is None:
        return False
    to = ir.DataType(node.attributes.get_int("to", 0))
    inner = _cast_before(x)
    if x.dtype == to:
        new = x
    elif (
        inner is None
        or inner.inputs[0] is None
        or inner.inputs[0].dtype is None
        or not holds(inner.inputs[0].dtype, x.dtype)
    ):
        return False
    else:
        new = inner.inputs[0]
    if new.dtype != to:
        node.replace_input_with(0, new)
    elif replaceable(node.outputs[0], new):
        substitute(node.outputs[0], new)
    else:
        return False
    remove_unused([n for n in (node, inner) if n is not None])
    return True


def _compare(node: ir.Node, names: Names) -> bool:
    """A truth value written as a number and read back."""
    for value, other in (node.inputs, node.inputs[::-1]) if node.op_type == "Equal" else (node.inputs,):
        inner, number = _cast_before(value), scalar(other)
        truth = inner.inputs[0] if inner is not None else None
        if (
            truth is None
            or inner is None
            or truth.dtype != ir.DataType.BOOL
            or other is None
            or other.shape is None
        ):
            continue
        widened = len(other.shape) > (len(truth.shape) if truth.shape is not None else 0)
        meaning = {("Equal", 1.0): True, ("Equal", 0.0): False, ("Greater", 0.0): True}.get(
            (node.op_type, number or 0.0)
        )
        if number is None or widened or meaning is None:
            continue
        output = node.outputs[0]
        if meaning and not replaceable(output, truth):
            continue
        substitute(output, truth if meaning else Builder(node, names).Not(truth))
        remove_unused([node, inner])
        return True
    return False
