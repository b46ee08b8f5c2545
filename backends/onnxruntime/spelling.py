"""What ONNX Runtime computes faster, or at all, in other words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.resampling import matrix
from optkit.decompositions import RULES
from optkit.dims import shape_of
from optkit.graph import constant, graphs, ints, walk
from optkit.reference import moves_signed, turned_operand
from optkit.rewrite import Builder, Match, Names, Rule, apply, register, remove, substitute

# Beyond, tanh(softplus(x)) is 1 even in float64, and exp(x) squared is far from overflow.
_SATURATED = 20.0
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _mish_check(x: ir.Value, **_: Any) -> Match:
    known = x.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return Match() if known else Match().fail("exp(x) squared overflows narrower floats", x)


def _mish(op: Any, x: ir.Value, **_: Any) -> Any:
    """``tanh(log(1 + e)) = n / (n + 2)`` with ``n = e * (e + 2)`` and ``e = exp(x)``: nothing cancels."""
    assert x.dtype is not None
    kind = x.dtype.numpy()
    two = op.constant(np.asarray(2, kind), "two")
    e = op.Exp(op.Min(x, np.asarray(_SATURATED, kind)))
    n = op.Mul(e, op.Add(e, two))
    return op.Mul(x, op.Div(n, op.Add(n, two)))


def _prelu_check(x: ir.Value, slope: ir.Value, **_: Any) -> Match:
    slopes = constant(slope)
    if slopes is None or x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return Match().fail("slopes that are computed, or not of single precision", slope)
    return Match() if np.isfinite(slopes).all() else Match().fail("slopes that are not finite", slope)


def _prelu(op: Any, x: ir.Value, slope: ir.Value, **_: Any) -> Any:
    """``max(x, slope x)`` of slopes above 0 and up to 1, else ``max(x, 0) + slope min(x, 0)``: the same numbers, not a rounding apart."""
    slopes = constant(slope)
    assert slopes is not None
    if ((slopes > 0) & (slopes <= 1)).all():
        return op.Max(x, op.Mul(x, slope))
    return op.Add(op.Relu(x), op.Mul(op.Min(x, np.asarray(0, slopes.dtype)), slope))


_RULES = {
    "Mish": Rule(lambda op, x: op.Mish(x), _mish, _mish_check, name="spell-mish"),
    "PRelu": Rule(lambda op, x, slope: op.PRelu(x, slope), _prelu, _prelu_check, name="spell-prelu"),
}


def spelled(model: ir.Model) -> ir.Model:
    """``model``, or a copy of it where some operator is better written out. Weights are shared.

    ONNX Runtime has no kernel for Mish and computes ``x * tanh(softplus(x))`` with a Softplus that calls the C library
    for each element; its PRelu, which broadcasts slopes, takes 3 to 5 times as long as the operators that it is made of. Its AveragePool
    takes up to 38 times as long over three axes from opset 19 on as before, twice over one, and as long over two: those are such ones. Its cubic
    Resize takes over 100 ns for each element: of planes of known sizes it is a product with a matrix on either side.

    Where it stops at pairs of int8 (``optkit.reference.moves_signed``), the same numbers are on a grid of uint8, 128 further up. Where
    the order of a Cast and a Transpose ends the process (``optkit.reference.turned_operand``), it is the other, and products in half
    precision are between the casts that it would add.
    """
    signed = any(map(moves_signed, walk(model)))
    turned = any(turned_operand(node) is not None for node in walk(model))
    pools, cubic = any(map(_is_slow_pool, walk(model))), any(map(_is_cubic, walk(model)))
    if not (
        signed or turned or pools or cubic or any(n.domain == "" and n.op_type in _RULES for n in walk(model))
    ):
        return model
    copy = model.clone()
    apply(list(_RULES.values()), copy)
    if signed:
        _without_signs(copy)
    if turned:
        _cast_first(copy)
    if pools:
        _over_two_axes(copy)
    if cubic:
        _as_products(copy)
    return copy


def _is_cubic(node: ir.Node) -> bool:
    return (
        node.op_type == "Resize" and node.domain == "" and node.attributes.get_string("mode", "") == "cubic"
    )


def _as_products(model: ir.Model) -> None:
    names = Names(model)
    for node in [n for n in walk(model) if _is_cubic(n)]:
        if (sizes := _planes(node)) is not None:
            op, x = Builder(node, names), node.inputs[0]
            where = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
            rows, columns = (matrix(node, n, m, s, "cubic", where).astype(np.float32) for n, m, s in sizes)
            substitute(node.outputs[0], op.MatMul(op.MatMul(rows, x), np.ascontiguousarray(columns.T)))
            given = [v for v in node.inputs[1:] if v is not None]
            remove(node)
            for value in given:
                if value.is_initializer() and not value.uses() and not value.is_graph_output():
                    op.graph.initializers.pop(str(value.name), None)


# Multiplications for each element that comes out, above which products are no faster than the kernel's 16.
_PRODUCTS = 1024


def _planes(node: ir.Node) -> list[tuple[int, int, float | None]] | None:
    """Size before, after and scale of the last two of four axes, where these alone are resized and products are worth it."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    scales, sizes = (constant(node.inputs[i]) if len(node.inputs) > i else None for i in (2, 3))
    odd = node.attributes.get_int("antialias", 0) or "axes" in node.attributes
    told = node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch"
    crop = node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    if odd or told or crop or before is None or after is None or len(before) != 4 or before[:2] != after[:2]:
        return None
    kind = node.inputs[0].dtype if node.inputs[0] is not None else None
    known = scales is not None and scales.size == 4 and (scales[:2] == 1).all()
    if kind != ir.DataType.FLOAT or not (known or (scales is None and sizes is not None)):
        return None
    (h, w), (to_h, to_w) = before[2:], after[2:]
    if not (isinstance(h, int) and isinstance(w, int) and isinstance(to_h, int) and isinstance(to_w, int)):
        return None
    if h * w / to_w + w > _PRODUCTS:
        return None
    by = (None, None) if scales is None or not known else tuple(float(s) for s in scales[2:])
    return [(h, to_h, by[0]), (w, to_w, by[1])]


def _is_slow_pool(node: ir.Node) -> bool:
    return (
        node.op_type == "AveragePool" and node.domain == "" and len(ints(node, "kernel_shape", [])) in (1, 3)
    )


def _over_two_axes(model: ir.Model) -> None:
    names = Names(model)
    for node in [n for n in walk(model) if _is_slow_pool(n)]:
        ways = (
            (_along_depth, *RULES["AveragePool"]) if len(ints(node, "kernel_shape", [])) == 3 else (_as_row,)
        )
        result = next((r for way in ways if (r := way(Builder(node, names), node)) is not None), None)
        if result is not None:
            substitute(node.outputs[0], result)
            remove(node)


def _along_depth(op: Builder, node: ir.Node) -> ir.Value | None:
    """A mean along the first of three axes alone, as of channels in PyTorch's LocalResponseNorm: a convolution, which is faster still."""
    (taps, *others), shape = ints(node, "kernel_shape"), shape_of(node.inputs[0])
    strides, dilations = ints(node, "strides", [1] * 3), ints(node, "dilations", [1] * 3)
    pads = ints(node, "pads", [0] * 6)
    plain = others == strides[1:] == dilations[1:] == [1, 1] and not any(pads[1:3] + pads[4:])
    whole = not any(pads) or bool(node.attributes.get_int("count_include_pad", 0))
    odd = node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or bool(
        node.attributes.get_int("ceil_mode", 0)
    )
    kind = node.inputs[0].dtype if node.inputs[0] is not None else None
    if not (plain and whole) or odd or shape is None or kind != ir.DataType.FLOAT:
        return None
    channels, depth, *area = shape[1:]
    if not all(isinstance(n, int) for n in (channels, depth, *area)):
        return None
    length = (int(depth) + pads[0] + pads[3] - dilations[0] * (taps - 1) - 1) // strides[0] + 1  # type: ignore[arg-type]
    columns = op.Reshape(node.inputs[0], np.array([-1, channels, depth, math.prod(map(int, area))]))  # type: ignore[arg-type]
    means = op.Conv(
        columns, np.full((int(channels), 1, taps, 1), 1 / taps, np.float32), group=channels, kernel_shape=[taps, 1],  # type: ignore[arg-type]
        strides=[strides[0], 1], dilations=[dilations[0], 1], pads=[pads[0], 0, pads[3], 0],
    )  # fmt: skip
    return op.Reshape(means, np.array([-1, channels, length, *area]))


def _as_row(op: Builder, node: ir.Node) -> ir.Value:
    """A pool over one axis as one over the rows and columns of a single row."""
    told: dict[str, Any] = dict(node.attributes)
    for name, one in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 0)):
        if name in told:
            given = ints(node, name, [])
            told[name] = [one, given[0]] if len(given) == 1 else [one, given[0], one, given[1]]
    row = np.array([2], np.int64)
    return op.Squeeze(op.node("AveragePool", [op.Unsqueeze(node.inputs[0], row)], told)[0], row)


def _cast_first(model: ir.Model) -> None:
    names = Names(model)
    for node in tuple(walk(model)):
        if turned_operand(node) is None:
            continue
        if node.outputs[0].dtype in _HALVES:
            node = _in_floats(node, names)
        while (found := turned_operand(node)) is not None:
            index, turn = found
            op = Builder(node, names)
            cast = op.Cast(turn.inputs[0], to=node.outputs[0].dtype)
            node.replace_input_with(index, op.node("Transpose", [cast], turn.attributes)[0])


def _in_floats(node: ir.Node, names: Names) -> ir.Node:
    """The product that takes the place of ``node``, between casts."""
    op, kind = Builder(node, names), node.outputs[0].dtype
    product = op.MatMul(*(op.Cast(v, to=ir.DataType.FLOAT) for v in node.inputs))
    substitute(node.outputs[0], op.Cast(product, to=kind))
    remove(node)
    made = product.producer()
    assert made is not None
    return made


def _without_signs(model: ir.Model) -> None:
    names = Names(model)
    for graph in graphs(model):
        for quantize in graph:
            value = quantize.outputs[0]
            pairs = [use.node for use in value.uses()]
            zeros = [_zero(node) for node in (quantize, *pairs)]
            if (
                quantize.op_type != "QuantizeLinear"
                or not any(map(moves_signed, pairs))
                or any(node.op_type != "DequantizeLinear" for node in pairs)
                or value.is_graph_output()
                or any(zero is None for zero in zeros)
            ):
                continue
            for node, zero in zip((quantize, *pairs), zeros, strict=True):
                assert zero is not None
                moved = np.asarray(zero.astype(np.int16) + 128, np.uint8)
                node.resize_inputs(3)
                node.replace_input_with(2, register(model.graph, names.new(f"{value.name}/zero"), moved))
            quantize.attributes.pop("output_dtype", None)
            # Copies of a graph share the types of their values.
            value.type = ir.TensorType(ir.DataType.UINT8)


def _zero(node: ir.Node) -> np.ndarray | None:
    """The zero point; None where it is not known."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return constant(node.inputs[2])
    scale = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if scale is None else np.zeros(scale.shape, np.int8)
