"""Dynamic quantization written out in floats, for runtimes whose integers have scales that are known when they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, drop_unused_initializers, graphs, read_once, users
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, remove_unused, substitute

_MICROSOFT = "com.microsoft"
_EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)
# Integers of 8 bits are divided by this: a power of two, so that nothing is rounded, and their products are at most 1.
_TOP = 256.0
_LEAST = float(np.finfo(np.float32).tiny)


class DynamicToFloat(GraphPass):
    """Replace integer products whose scales are computed in each run by products of floats that hold the same integers.

    Before: ``q, s, z = DynamicQuantizeLinear(x)``, ``y = Cast(ConvInteger(q, w, z, z_w)) * (s * s_w)``, which is what ONNX Runtime's
    dynamic quantization writes, and so for MatMulInteger, with integers added in front of the Cast or without; of ``com.microsoft``
    also MatMulIntegerToFloat, DynamicQuantizeMatMul and DynamicQuantizeLSTM.
    After: ``g = clip(round(x / s), -z, 255 - z) / 256``, ``y = Conv(g, DequantizeLinear(w, 1 / 256, z_w)) * (256 s * 256 s_w)`` with ``s``
    and ``z`` as ONNX defines DynamicQuantizeLinear. Weights stay integers where they are stored.

    Powers of two round nothing: sums are those of the integers, exactly where they have 24 bits. In float16 they do not overflow,
    as sums of the integers themselves would from the second product on.

    Where ONNX leaves a scale open, of a tensor of zeros, it is 1 as in ONNX Runtime. One thing differs: of an LSTM, ONNX Runtime also
    rounds the state to 8 bits in each step; here it is a float, and the products with it are more exact. Products of anything else,
    and integers that something else reads, stay as they are.
    """

    name: ClassVar[str] = "dynamic-to-float"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every such product."""
        changes, grids = list[Change](), _Grids(Names(model))
        for graph in graphs(model):
            for node in tuple(graph):
                replace = _REPLACE.get((node.domain, node.op_type))
                if replace is not None and replace(node, grids):
                    detail = f"{node.op_type} in floats"
                    changes.append(Change(rule=self.name, node=str(node.name), detail=detail))
        if changes:
            remove_unused(grids.sources)
            drop_unused_initializers(model)
            if all(node.domain != _MICROSOFT for graph in graphs(model) for node in graph):
                model.opset_imports.pop(_MICROSOFT, None)
        return changes


class _Grids:
    """Activations on the grids of this run, each made once."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.sources: list[ir.Node] = []
        self._made: dict[ir.Node, ir.Value] = {}

    def made(self, op: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """``x`` as whole numbers over 256, and its scale: "DynamicQuantizeLinear" of ONNX, to uint8."""
        zero, top = 0.0, 255.0
        low = op.Min(op.ReduceMin(x, keepdims=0), _number(zero))
        high = op.Max(op.ReduceMax(x, keepdims=0), _number(zero))
        spread = op.Sub(high, low)
        scale = op.Where(op.Equal(spread, _number(zero)), _number(1), op.Div(spread, _number(top)))
        # What a quotient rounds to 0, in float16 much sooner, nothing could be divided by.
        scale = op.Max(scale, _number(_LEAST))
        least = op.Round(op.Max(op.Div(low, scale), _number(-top)))
        steps = op.Round(op.Div(x, scale))
        held = op.Min(op.Max(steps, least), op.Add(least, _number(top)))
        return op.Mul(held, _number(1 / _TOP)), scale

    def of(self, quantizer: ir.Node) -> ir.Value:
        """What ``quantizer``, a DynamicQuantizeLinear, makes; all that reads its scale reads the new one."""
        if quantizer not in self._made:
            x, scale = quantizer.inputs[0], quantizer.outputs[1]
            assert x is not None
            self._made[quantizer], made = self.made(Builder(quantizer, self.names), x)
            substitute(scale, made)
            self.sources.append(quantizer)
        return self._made[quantizer]


def _number(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)


def _quantizer(q: ir.Value | None, zero: ir.Value | None) -> ir.Node | None:
    """The DynamicQuantizeLinear that makes integers and their zero point."""
    node = None if q is None else q.producer()
    if node is None or node.op_type != "DynamicQuantizeLinear" or q is not node.outputs[0]:
        return None
    return node if zero is node.outputs[2] else None


def _fits(q: ir.Value | None, zero: ir.Value | None, axis: int) -> bool:
    """Whether they are an activation with its zero point, or constants of 8 bits with one zero point or one for each index of ``axis``."""
    if _quantizer(q, zero) is not None:
        return True
    held, offset = constant(q), constant(zero)
    if q is None or q.dtype not in _EIGHT or held is None or (zero is not None and offset is None):
        return False
    if offset is None or offset.size == 1:
        return True
    return offset.ndim == 1 and held.ndim > 1 and held.shape[axis] == offset.size


def _operand(op: Builder, grids: _Grids, q: ir.Value | None, zero: ir.Value | None, axis: int) -> ir.Value:
    """One side of a product that ``_fits``: its integers less the zero point, over 256."""
    quantizer = _quantizer(q, zero)
    if quantizer is not None:
        return grids.of(quantizer)
    offset = constant(zero)
    if offset is None or offset.size == 1:
        inputs = [q, _number(1 / _TOP), *([] if offset is None or not offset.any() else [offset.reshape(())])]
        return op.DequantizeLinear(*inputs)
    return op.DequantizeLinear(q, np.full(offset.shape, 1 / _TOP, np.float32), offset, axis=axis)


def _integer_product(node: ir.Node, grids: _Grids) -> bool:
    """ConvInteger and MatMulInteger, with all up to the product with the scale."""
    a, b, a_zero, b_zero = _padded(node, 4)
    convolution = node.op_type == "ConvInteger"
    # Zero points of the rows of a product, or of the channels of a kernel; only one whole tensor has one where it is convolved.
    axes = (-1, 0) if convolution else (-2, -1)
    rows = constant(a_zero)
    if (convolution and rows is not None and rows.size > 1) or not (
        _fits(a, a_zero, axes[0]) and _fits(b, b_zero, axes[1])
    ):
        return False
    if _quantizer(a, a_zero) is None and _quantizer(b, b_zero) is None:
        return False
    found = _scaled(node)
    if found is None:
        return False
    end, factor, added = found
    op = Builder(end, grids.names)
    x, w = _operand(op, grids, a, a_zero, axes[0]), _operand(op, grids, b, b_zero, axes[1])
    attributes = dict(node.attributes) if convolution else {}
    product = op.node("Conv" if convolution else "MatMul", [x, w], attributes)[0]
    if added is not None:
        whole = op.Cast(added, to=ir.DataType.FLOAT.value)
        product = op.Add(product, op.Mul(whole, _number(1 / _TOP**2)))
    substitute(end.outputs[0], op.Mul(product, _grown(op, factor)))
    remove_unused(_up_to(node, end))
    return True


def _scaled(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value | None] | None:
    """The Mul in which the integers of ``node`` end, its factor, and what is added to the integers; None where they end otherwise."""
    added, value = None, node.outputs[0]
    reader = _reader(value)
    if reader is not None and reader.op_type == "Add":
        added, value = _other(reader, value), reader.outputs[0]
        reader = _reader(value)
    if reader is None or reader.op_type != "Cast" or reader.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    value = reader.outputs[0]
    end = _reader(value)
    if end is None or end.op_type != "Mul":
        return None
    factor = _other(end, value)
    return None if factor is None else (end, factor, added)


def _reader(value: ir.Value) -> ir.Node | None:
    """The one standard operator that reads ``value``, once, in the same graph."""
    node = users(value)[0] if read_once(value) else None
    made = value.producer()
    assert made is not None
    return node if node is not None and node.domain == "" and node.graph is made.graph else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _grown(op: Builder, factor: ir.Value) -> ir.Value:
    """``65536 factor``; of a product both sides grow, since float16 has no room for products of two scales."""
    made = factor.producer()
    if made is None or made.op_type != "Mul" or made.domain != "":
        return op.Mul(factor, _number(_TOP**2))
    return op.Mul(*(_times_256(op, v) for v in made.inputs))


def _times_256(op: Builder, value: ir.Value | None) -> ir.Value | np.ndarray:
    held = constant(value)
    return op.Mul(value, _number(_TOP)) if held is None else np.asarray(held * np.float32(_TOP))


def _up_to(node: ir.Node, end: ir.Node) -> list[ir.Node]:
    """The nodes from ``node`` to ``end``, and what makes the factor."""
    found = [node]
    while found[-1] is not end:
        found += users(found[-1].outputs[0])
    return [*found, *(p for v in end.inputs if v is not None and (p := v.producer()) is not None)]


def _product_to_float(node: ir.Node, grids: _Grids) -> bool:
    """MatMulIntegerToFloat and DynamicQuantizeMatMul, which scale by themselves and have a bias in floats."""
    op, whole = Builder(node, grids.names), node.op_type == "DynamicQuantizeMatMul"
    if whole:
        x, b, b_scale, b_zero, bias = _padded(node, 5)
        if x is None or x.dtype != ir.DataType.FLOAT or not _fits(b, b_zero, -1):
            return False
        left, scale = grids.made(op, x)
    else:
        a, b, _, b_scale, a_zero, b_zero, bias = _padded(node, 7)
        if _quantizer(a, a_zero) is None or not _fits(b, b_zero, -1):
            return False
        left = _operand(op, grids, a, a_zero, -2)
        assert node.inputs[2] is not None
        scale = node.inputs[2]
    right = _operand(op, grids, b, b_zero, -1)
    factor = op.Mul(_times_256(op, scale), _times_256(op, b_scale))
    result = op.Mul(op.MatMul(left, right), factor)
    if bias is not None:
        result = op.Add(result, bias)
    substitute(node.outputs[0], result)
    remove_unused([node])
    return True


def _lstm(node: ir.Node, grids: _Grids) -> bool:
    """DynamicQuantizeLSTM, of which weights are ``[directions, inputs, 4 hidden]`` where LSTM has the last two the other way round."""
    x, w, r, bias, lengths, h, c, peepholes, w_scale, w_zero, r_scale, r_zero = _padded(node, 12)
    parts = [(w, w_scale, w_zero), (r, r_scale, r_zero)]
    if x is None or any(v is not None and constant(v) is None for part in parts for v in part):
        return False
    op = Builder(node, grids.names)
    weights = [_turned(op, *part) for part in parts]
    value, scale = grids.made(op, x)
    held = op.Mul(value, op.Mul(scale, _number(_TOP)))
    inputs = [held, *weights, bias, lengths, h, c, peepholes]
    while inputs[-1] is None:
        inputs.pop()
    results = op.node("LSTM", inputs, dict(node.attributes), outputs=len(node.outputs))
    for old, new in zip(node.outputs, results, strict=True):
        substitute(old, new)
    remove_unused([node])
    return True


def _turned(op: Builder, q: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value:
    """Weights of a recurrent layer as floats; ``scale`` has one for each direction, or for each of its gates' rows."""
    integers, scales, zeros = constant(q), constant(scale), constant(zero)
    assert integers is not None and scales is not None
    turned = np.ascontiguousarray(integers.swapaxes(1, 2))
    zeros = np.zeros(scales.shape, integers.dtype) if zeros is None else zeros
    if scales.ndim == 1:
        return op.DequantizeLinear(turned, scales, zeros, axis=0)
    # One for each row: a block as long as the row.
    return op.DequantizeLinear(
        turned, scales[..., None], zeros.reshape(scales.shape)[..., None], axis=2, block_size=turned.shape[2]
    )


def _padded(node: ir.Node, count: int) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (count - len(node.inputs))]


_REPLACE: dict[tuple[str, str], Callable[[ir.Node, _Grids], bool]] = {
    ("", "ConvInteger"): _integer_product,
    ("", "MatMulInteger"): _integer_product,
    (_MICROSOFT, "MatMulIntegerToFloat"): _product_to_float,
    (_MICROSOFT, "DynamicQuantizeMatMul"): _product_to_float,
    (_MICROSOFT, "DynamicQuantizeLSTM"): _lstm,
}
