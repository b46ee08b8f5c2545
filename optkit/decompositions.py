"""Operators in terms of others, where ONNX has no function for them: what takes the place of a node that a backend can't run."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from optkit.dims import Dim, shape_of
from optkit.graph import attribute, constant, ints, rank
from optkit.rewrite import Builder

Rule = Callable[[Builder, ir.Node], "ir.Value | None"]
"""Makes what takes the place of the only output of a node; None where it does not apply."""

# An operand of Einsum and its axes.
_Operand = tuple[ir.Value, str]


def _acosh(op: Builder, node: ir.Node) -> ir.Value | None:
    """``asinh(sqrt(x^2 - 1))``, by factors: near 1 nothing cancels out, and large squares do not overflow."""
    x = node.inputs[0]
    one = _like(x, 1)
    return op.Asinh(op.Mul(op.Sqrt(op.Sub(x, one)), op.Sqrt(op.Add(x, one))))


def _asinh(op: Builder, node: ir.Node) -> ir.Value | None:
    """``log(1 + a + a^2 / (1 + sqrt(a^2 + 1)))`` of ``a = |x|``, or ``log(2 a)`` where that is the same; with the sign of ``x``."""
    x = node.inputs[0]
    one, a = op.constant(_like(x, 1)), op.Abs(x)
    square = op.Mul(a, a)
    more = op.Div(square, op.Add(op.Sqrt(op.Add(square, one)), one))
    near, far = _log1p(op, op.Add(a, more)), op.Add(op.Log(a), _like(x, math.log(2)))
    # From here on 1 / (4 a^2), by which the logarithm is too small, is less than a rounding; no square is too large before.
    limit = 4 / math.sqrt(float(np.finfo(_like(x, 1).dtype).eps))
    return op.Mul(op.Sign(x), op.Where(op.Less(a, _like(x, limit)), near, far))


def _atanh(op: Builder, node: ir.Node) -> ir.Value | None:
    """``log((1 + a) / (1 - a)) / 2`` of ``a = |x|``, with the sign of ``x``; small ones by ``log(1 + 2 a / (1 - a))``."""
    x = node.inputs[0]
    one, half, a = op.constant(_like(x, 1)), op.constant(_like(x, 0.5)), op.Abs(x)
    left = op.Sub(one, a)
    near, far = _log1p(op, op.Div(op.Add(a, a), left)), op.Log(op.Div(op.Add(one, a), left))
    return op.Mul(op.Mul(op.Sign(x), half), op.Where(op.Less(a, half), near, far))


def _log1p(op: Builder, x: ir.Value) -> ir.Value:
    """``log(1 + x)`` of what is not negative, as exact where it is small: what rounding ``1 + x`` loses, a quotient makes up for.

    Goldberg, "What every computer scientist should know about floating-point arithmetic", 1991, theorem 4.
    """
    one = op.constant(_like(x, 1))
    whole = op.Add(x, one)
    exact = op.Mul(op.Log(whole), op.Div(x, op.Sub(whole, one)))
    return op.Where(op.Equal(whole, one), x, exact)


def _affine_grid(op: Builder, node: ir.Node) -> ir.Value | None:
    """The product of all places of the grid, which are constant, with the transposed matrices.

    ONNX's own function squeezes away the batch where it is of one picture, and fails.
    """
    theta, sizes = node.inputs[0], constant(node.inputs[1])
    if sizes is None:
        return None
    batch, _, *axes = (int(n) for n in sizes)
    aligned = bool(attribute(node, "align_corners", 0))
    if aligned and 1 in axes:
        return None  # A step from the first element to itself.
    lines = [np.linspace(-1, 1, n) if aligned else (2 * np.arange(n) + 1) / n - 1 for n in axes]
    places = np.meshgrid(*lines, indexing="ij")
    # The last axis, whose places are x, comes first.
    whole = np.stack([*places[::-1], np.ones(axes)], axis=-1).reshape(-1, len(axes) + 1)
    grid = op.MatMul(whole.astype(_like(theta, 0).dtype), op.Transpose(theta, perm=[0, 2, 1]))
    return op.Reshape(grid, np.array([batch, *axes, len(axes)], np.int64))


def _softplus(op: Builder, node: ir.Node) -> ir.Value | None:
    """``max(x, 0) + log(1 + exp(-|x|))``: what is raised to a power of e is never above 0, so that nothing overflows.

    Exact to a rounding of numbers around 1, also far below 0, where ONNX's own definition is no better.
    """
    x = node.inputs[0]
    rest = op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), _like(x, 1)))
    return op.Add(op.Relu(x), rest)


def _log_sum_exp(op: Builder, node: ir.Node) -> ir.Value | None:
    """``m + log(sum(exp(x - m)))`` with the largest, ``m``; ONNX's own definition wants float64 instead.

    Where that is infinite, the largest number stands for it, so that the difference is none of two infinities.
    """
    x, axes, count = node.inputs[0], _reduced(node), rank(node.inputs[0])
    if axes is None or count is None or x is None or x.dtype is None or not x.dtype.is_floating_point():
        return None
    places = np.array(axes or range(count), np.int64)
    ends = np.finfo(x.dtype.numpy())
    most = op.Clip(op.ReduceMax(x, places, keepdims=1), _like(x, ends.min), _like(x, ends.max))
    total = op.Add(op.Log(op.ReduceSum(op.Exp(op.Sub(x, most)), places, keepdims=1)), most)
    return total if attribute(node, "keepdims", 1) else op.Squeeze(total, places)


def _reduced(node: ir.Node) -> list[int] | None:
    """The axes that a reduction names, none for all; None where they are not known, or where it then reduces nothing."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = np.array([]) if given is None else constant(given)
    if axes is None or (not axes.size and attribute(node, "noop_with_empty_axes", 0)):
        return None
    return [int(a) for a in axes.reshape(-1)]


def _product_of_vectors(op: Builder, node: ir.Node) -> ir.Value | None:
    """As a matrix of one row on the left, of one column on the right."""
    a, b = node.inputs
    ranks = rank(a), rank(b)
    if None in ranks or 1 not in ranks:
        return None
    left, right = (r == 1 for r in ranks)
    last, before = np.array([-1], np.int64), np.array([-2], np.int64)
    x = op.Unsqueeze(a, np.array([0], np.int64)) if left else a
    y = op.Unsqueeze(b, last) if right else b
    added = np.concatenate([before] * left + [last] * right)
    return op.Squeeze(op.MatMul(x, y), added)


def _lp_pool(op: Builder, node: ir.Node) -> ir.Value | None:
    """``(n * mean(|x|^p))^(1/p)``; the mean counts what pads add, which are zeros."""
    x, kernel = node.inputs[0], list(node.attributes["kernel_shape"].as_ints())
    pads = _pads(node, kernel)
    if pads is None or attribute(node, "ceil_mode", 0):
        return None  # Windows that overhang have fewer elements.
    kept = {k: v for k, v in node.attributes.items() if k not in ("p", "ceil_mode", "auto_pad", "pads")}
    power = _power(op, x, node)
    mean = op.node("AveragePool", [power], {**kept, "pads": pads, "count_include_pad": 1})[0]
    return _root(op, op.Mul(mean, _like(x, math.prod(kernel))), node)


def _pads(node: ir.Node, kernel: list[int]) -> list[int] | None:
    """Of a window, as numbers; None where they follow from sizes that are not known."""
    mode, none = str(attribute(node, "auto_pad", "NOTSET")), [0] * len(kernel)
    if not mode.startswith("SAME"):
        return none * 2 if mode == "VALID" else list(node.attributes.get_ints("pads", none * 2))
    sizes = (shape_of(node.inputs[0]) or ())[2:]
    ones = [1] * len(kernel)
    strides, dilations = (list(node.attributes.get_ints(name, ones)) for name in ("strides", "dilations"))
    wanted = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=False):
        if not isinstance(size, int):
            return None
        wanted.append(max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size))
    less, more = [w // 2 for w in wanted], [w - w // 2 for w in wanted]
    if len(wanted) < len(kernel):
        return None
    return less + more if mode == "SAME_UPPER" else more + less


def _global_lp_pool(op: Builder, node: ir.Node) -> ir.Value | None:
    """``(sum(|x|^p))^(1/p)`` over all axes behind the second."""
    x, axes = node.inputs[0], rank(node.inputs[0])
    if axes is None:
        return None
    places = np.arange(2, axes, dtype=np.int64)
    return _root(op, op.ReduceSum(_power(op, x, node), places, keepdims=1), node)


def _power(op: Builder, x: ir.Value | None, node: ir.Node) -> ir.Value:
    p = node.attributes.get_int("p", 2)
    return op.Mul(x, x) if p == 2 else op.Abs(x) if p == 1 else op.Pow(op.Abs(x), _like(x, p))


def _root(op: Builder, x: ir.Value, node: ir.Node) -> ir.Value:
    p = node.attributes.get_int("p", 2)
    return op.Sqrt(x) if p == 2 else x if p == 1 else op.Pow(x, _like(x, 1 / p))


def _last_of_several(op: Builder, node: ir.Node) -> ir.Value | None:
    """Counted from the end, the last of several extrema is the first."""
    x, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    shape = shape_of(x)
    size = None if shape is None else shape[axis]
    if not attribute(node, "select_last_index", 0) or not isinstance(size, int):
        return None
    ends = [np.array([v], np.int64) for v in (-1, -(2**31) + 1, axis, -1)]
    found = op.node(
        node.op_type,
        [op.Slice(x, *ends)],
        {k: v for k, v in node.attributes.items() if k != "select_last_index"},
    )
    return op.Sub(np.array(size - 1, np.int64), found[0])


def _quantized_product(op: Builder, node: ir.Node) -> ir.Value | None:
    """Between Q/DQ pairs, which say the same; rounded sums of floats may fall on the other side of a tie."""
    a, a_scale, a_zero, b, b_scale, b_zero, scale, zero = node.inputs
    if any(rank(v) is None or (rank(v) and shape_of(v) != (1,)) for v in (a_scale, b_scale, scale)):
        return None
    product = op.MatMul(_floats(op, a, a_scale, a_zero), _floats(op, b, b_scale, b_zero))
    return op.QuantizeLinear(product, _single(op, scale), _single(op, zero))


def _quantized_convolution(op: Builder, node: ir.Node) -> ir.Value | None:
    """Between Q/DQ pairs, which say the same; rounded sums of floats may fall on the other side of a tie."""
    x, x_scale, x_zero, w, w_scale, w_zero, scale, zero, *bias = node.inputs
    if any(rank(v) is None or (rank(v) and shape_of(v) != (1,)) for v in (x_scale, scale)):
        return None
    operands = [_floats(op, x, x_scale, x_zero), _floats(op, w, w_scale, w_zero)]
    if bias and bias[0] is not None:
        steps = op.Mul(_single(op, x_scale), _single(op, w_scale))
        operands.append(op.DequantizeLinear(bias[0], steps, axis=0))
    found = op.node("Conv", operands, dict(node.attributes))[0]
    return op.QuantizeLinear(found, _single(op, scale), _single(op, zero))


def _floats(op: Builder, x: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value:
    return op.DequantizeLinear(x, _single(op, scale), _single(op, zero), axis=0)


def _single(op: Builder, x: ir.Value | None) -> ir.Value | None:
    """A vector of one element as a scalar."""
    return op.Reshape(x, np.array([], np.int64)) if shape_of(x) == (1,) else x


def _einsum_in_pairs(op: Builder, node: ir.Node) -> ir.Value | None:
    """Two operands at a time, with all axes named and none summed that another operand does not have."""
    return _einsum(op, node, lambda x, a, y, b, c: op.Einsum(x, y, equation=f"{a},{b}->{c}"))


def _einsum_as_products(op: Builder, node: ir.Node) -> ir.Value | None:
    """By products of matrices."""
    return _einsum(op, node, lambda x, a, y, b, c: _product(op, (x, a), (y, b), c))


def _einsum(
    op: Builder, node: ir.Node, contract: Callable[[ir.Value, str, ir.Value, str, str], ir.Value | None]
) -> ir.Value | None:
    found = _operands(op, node)
    if found is None:
        return None
    operands, output = found
    for i, (x, term) in enumerate(operands):
        elsewhere = output + "".join(t for j, (_, t) in enumerate(operands) if j != i)
        if single := [axis for axis, k in enumerate(term) if k not in elsewhere]:
            x = op.ReduceSum(x, np.array(single, np.int64), keepdims=0)
        operands[i] = x, "".join(k for k in term if k in elsewhere)
    while len(operands) > 1:
        (x, a), (y, b), *rest = operands
        later = "".join(term for _, term in rest)
        both = "".join(k for k in dict.fromkeys(a + b) if k in output + later)
        if not a or not b:
            result: ir.Value | None = op.Mul(x, y)
        else:
            both = both if rest else output
            result = contract(x, a, y, b, both)
        if result is None:
            return None
        operands = [(result, both), *rest]
    ((x, term),) = operands
    if term != output:
        return _moved(op, x, [term.index(k) for k in output])
    return op.Identity(x) if x in node.inputs else x


def _operands(op: Builder, node: ir.Node) -> tuple[list[_Operand], str] | None:
    """Operands and axes of the result, each axis with a letter; None where one has an axis twice, or ranks are not known."""
    inputs, arrow, output = str(attribute(node, "equation")).replace(" ", "").partition("->")
    terms, values = inputs.split(","), [v for v in node.inputs if v is not None]
    shapes = [shape_of(v) for v in values]
    if any(s is None for s in shapes):
        return None
    if not arrow:
        output = "..." * ("." in inputs) + "".join(
            k for k in sorted(set(inputs) - set(".,")) if inputs.count(k) == 1
        )
    free = [k for k in string.ascii_letters if k not in inputs]
    counts = [
        len(s or ()) - len(t.replace(".", "")) if "." in t else 0 for s, t in zip(shapes, terms, strict=True)
    ]
    shared = "".join(free[: max(counts)])
    terms = [t.replace("...", shared[len(shared) - n :]) for t, n in zip(terms, counts, strict=True)]
    output = output.replace("...", shared)
    if any(len(set(t)) != len(t) for t in terms) or any(
        len(t) != len(s or ()) for t, s in zip(terms, shapes, strict=True)
    ):
        return None
    operands = list(zip(values, terms, strict=True))
    for k in shared:
        sizes = [s[t.index(k)] for s, t in zip(shapes, terms, strict=True) if s is not None and k in t]
        if len(set(sizes) - {1}) > 1 or None in sizes:
            return None
        if len(set(sizes)) > 1:  # What has one element is repeated.
            operands = [
                (op.Squeeze(v, np.array([t.index(k)], np.int64)), t.replace(k, ""))
                if k in t and (shape_of(v) or ())[t.index(k)] == 1
                else (v, t)
                for v, t in operands
            ]
    return operands, output


def _product(op: Builder, left: _Operand, right: _Operand, output: str) -> ir.Value | None:
    """The sum over what ``left`` and ``right`` have and ``output`` has not, as a MatMul; None where sizes are missing."""
    (x, a), (y, b) = left, right
    batch, summed = ([k for k in a if k in b and (k in output) == there] for there in (True, False))
    rows, columns = [k for k in a if k not in b], [k for k in b if k not in a]
    sizes: dict[str, Dim | None] = dict(
        zip(a + b, (*(shape_of(x) or ()), *(shape_of(y) or ())), strict=False)
    )
    x = _moved(op, x, [a.index(k) for k in (*batch, *rows, *summed)])
    y = _moved(op, y, [b.index(k) for k in (*batch, *summed, *columns)])
    targets = (
        _target(len(batch), [rows, summed], sizes),
        _target(len(batch), [summed, columns], sizes),
        _target(len(batch), [[k] for k in (*rows, *columns)], sizes),
    )
    if any(t is None for t in targets):
        return None
    out = op.Reshape(op.MatMul(op.Reshape(x, targets[0]), op.Reshape(y, targets[1])), targets[2])
    order = [*batch, *rows, *columns]
    return _moved(op, out, [order.index(k) for k in output])


def _moved(op: Builder, x: ir.Value, order: list[int]) -> ir.Value:
    return x if order == sorted(order) else op.Transpose(x, perm=order)


def _target(kept: int, groups: Sequence[Sequence[str]], sizes: Mapping[str, Dim | None]) -> np.ndarray | None:
    """Of a Reshape that keeps the first axes and makes one of each group; None where more than one size is not known."""
    products = []
    for group in groups:
        known = [sizes[k] for k in group]
        products.append(
            math.prod(k for k in known if isinstance(k, int))
            if all(isinstance(k, int) for k in known)
            else -1
        )
    return None if products.count(-1) > 1 else np.array([0] * kept + products, np.int64)


def _scaled_gemm(op: Builder, node: ir.Node) -> ir.Value | None:
    """Factors on weights and bias, where they fold into constants, instead of on the product."""
    a, b, *rest = node.inputs
    given = {k: v.value for k, v in node.attributes.items()}
    alpha, beta = (float(given.pop(k, 1.0)) for k in ("alpha", "beta"))
    if (alpha, beta) == (1, 1):
        return None
    b = b if alpha == 1 else op.Mul(b, _like(a, alpha))
    c = rest[0] if rest else None
    more = [] if c is None else [c if beta == 1 else op.Mul(c, _like(a, beta))]
    return op.Gemm(a, b, *more, **given)


def _unbiased_lrn(op: Builder, node: ir.Node) -> ir.Value | None:
    """With a bias of 1: ``(b + a s)^p`` is ``b^p (1 + a / b s)^p``."""
    defaults = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
    alpha, beta, bias = (node.attributes.get_float(k, v) for k, v in defaults.items())
    x, size = node.inputs[0], node.attributes["size"].as_int()
    if bias <= 0 or bias == 1:
        return None
    told = {"alpha": alpha / bias, "beta": beta, "bias": 1.0, "size": size}
    return op.Mul(op.node("LRN", [x], told)[0], _like(x, bias**-beta))


def _lrn_as_pool(op: Builder, node: ir.Node) -> ir.Value | None:
    """The mean of squares over ``size`` channels by a pool, with the channels as rows of a picture; other axes in a column each."""
    defaults = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
    alpha, beta, bias = (node.attributes.get_float(k, v) for k, v in defaults.items())
    x, size = node.inputs[0], node.attributes["size"].as_int()
    sizes = shape_of(x)
    if sizes is None or len(sizes) < 3 or not isinstance(sizes[1], int):
        return None
    # What 0 stands for in Reshape is the size at the same axis: the batch.
    rows = op.Reshape(op.Mul(x, x), np.array([0, 1, sizes[1], -1], np.int64))
    window = {"kernel_shape": [size, 1], "pads": [(size - 1) // 2, 0, size // 2, 0], "count_include_pad": 1}
    mean = op.node("AveragePool", [rows], window)[0]
    known = [n if isinstance(n, int) else 0 for n in sizes]
    shape = np.array(known, np.int64) if sum(not isinstance(n, int) for n in sizes[1:]) == 0 else op.Shape(x)
    whole = op.Reshape(mean, shape)
    return op.Div(x, op.Pow(op.Add(op.Mul(whole, _like(x, alpha)), _like(x, bias)), _like(x, beta)))


def _lp_normalization(op: Builder, node: ir.Node) -> ir.Value | None:
    """``x / norm(x)`` along an axis, and 0 where that is 0, as in ONNX since opset 22 and in ONNX Runtime before."""
    x, axis = node.inputs[0], np.array([node.attributes.get_int("axis", -1)], np.int64)
    norm = _root(op, op.ReduceSum(_power(op, x, node), axis, keepdims=1), node)
    none = op.Equal(norm, _like(x, 0))
    return op.Where(none, _like(x, 0), op.Div(x, op.Where(none, _like(x, 1), norm)))


def _sum(op: Builder, node: ir.Node) -> ir.Value | None:
    """One addend after the other."""
    total = node.inputs[0]
    for addend in node.inputs[1:]:
        total = op.Add(total, addend)
    return total if len(node.inputs) > 1 else op.Identity(total)


def _mean(op: Builder, node: ir.Node) -> ir.Value | None:
    return op.Mul(_sum(op, node), _like(node.inputs[0], 1 / len(node.inputs)))


def _erf(op: Builder, node: ir.Node) -> ir.Value | None:
    """``x P(x^2) / Q(x^2)`` up to 4, where float32 has 1; as exact as float32, 4e-7 at most, also relatively.

    P and Q have degree 5 and are the best in the relative error between 0 and 4: fitted in float64, with the weights of Lawson's algorithm.
    """
    x = node.inputs[0]
    if x is None or x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    wide = op.Cast(x, to=ir.DataType.FLOAT.value) if x.dtype == ir.DataType.FLOAT16 else x
    near = op.Clip(wide, np.array(-4, np.float32), np.array(4, np.float32))
    square = op.Mul(near, near)
    above, below = (_polynomial(op, square, numbers) for numbers in (_ERF_ABOVE, _ERF_BELOW))
    found = op.Clip(op.Div(op.Mul(near, above), below), np.array(-1, np.float32), np.array(1, np.float32))
    return op.Cast(found, to=x.dtype.value) if x.dtype == ir.DataType.FLOAT16 else found


# From the constant term on.
_ERF_ABOVE = (1.1283791394150244, 0.19354643599421648, 0.05310174901109269, 0.0038833379991726168, 0.00028455523700484086, 1.986646419106049e-06)  # fmt: skip
_ERF_BELOW = (1.0, 0.5048586206352249, 0.11535040163643656, 0.015207268277899724, 0.0011855486863918889, 3.741817853651595e-05)  # fmt: skip


def _polynomial(op: Builder, x: ir.Value, numbers: Sequence[float]) -> ir.Value:
    """By Horner's rule."""
    first, *rest, last = (np.array(n, np.float32) for n in numbers)
    total = op.Mul(x, last)
    for number in reversed(rest):
        total = op.Mul(op.Add(total, number), x)
    return op.Add(total, first)


def _grid_sample(op: Builder, node: ir.Node) -> ir.Value | None:
    """Pixels, all channels of each in a row, looked up around every place and weighed by how near they are; pictures of known sizes."""
    picture, grid = node.inputs
    mode, edge = str(attribute(node, "mode", "linear")), str(attribute(node, "padding_mode", "zeros"))
    sizes, places = shape_of(picture), shape_of(grid)
    if mode not in ("linear", "nearest") or sizes is None or places is None or len(sizes) != 4:
        return None
    if not all(isinstance(n, int) for n in (*sizes, *places)):
        return None
    batch, channels, height, width = (int(n) for n in sizes)  # type: ignore[arg-type]
    rows, columns = (int(n) for n in places[1:3])  # type: ignore[arg-type]
    align = bool(attribute(node, "align_corners", 0))
    x, y = (
        _place(op, op.Gather(grid, np.array(i), axis=-1), n, edge, align=align)
        for i, n in enumerate((width, height))
    )
    pixels = op.Reshape(
        op.Transpose(picture, perm=[0, 2, 3, 1]), np.array([batch * height * width, channels])
    )
    first = (np.arange(batch) * height * width).reshape(-1, 1, 1)
    near: list[list[tuple[ir.Value, ir.Value | None]]]
    if mode == "nearest":
        near = [[(op.Round(v), None)] for v in (y, x)]
    else:
        low = [op.Floor(v) for v in (y, x)]
        rest = [op.Sub(v, before) for v, before in zip((y, x), low, strict=True)]
        near = [
            [
                (before, op.Sub(op.constant(_like(picture, 1)), more)),
                (op.Add(before, _like(picture, 1)), more),
            ]
            for before, more in zip(low, rest, strict=True)
        ]
    total: ir.Value | None = None
    for (top, above), (left, beside) in itertools.product(*near):
        weight = above if beside is None else beside if above is None else op.Mul(above, beside)
        inside = [
            op.Clip(v, _like(picture, 0), _like(picture, n - 1)) for v, n in ((top, height), (left, width))
        ]
        if edge == "zeros":
            there = op.And(op.Equal(top, inside[0]), op.Equal(left, inside[1]))
            seen = op.Cast(there, to=int(picture.dtype))  # type: ignore[union-attr, arg-type]
            weight = seen if weight is None else op.Mul(weight, seen)
        where = [op.Cast(v, to=int(ir.DataType.INT64)) for v in inside]
        index = op.Add(op.Add(op.Mul(where[0], np.array(width)), where[1]), first)
        value = op.Gather(pixels, index, axis=0)
        value = value if weight is None else op.Mul(value, op.Unsqueeze(weight, np.array([-1])))
        total = value if total is None else op.Add(total, value)
    assert total is not None
    return op.Transpose(op.Reshape(total, np.array([batch, rows, columns, channels])), perm=[0, 3, 1, 2])


def _short_time_fourier_transform(op: Builder, node: ir.Node) -> ir.Value | None:
    """A convolution of real signals with the waves of the discrete Fourier transform, times the window."""
    x, step, window, length = (*node.inputs, None, None)[:4]
    steps, taps = constant(step), constant(window)
    shape = shape_of(x)
    if window is None and (frame := constant(length)) is not None:
        taps = np.ones(int(frame.reshape(-1)[0]))
    if (
        steps is None
        or taps is None
        or shape is None
        or len(shape) not in (2, 3)
        or shape[2:] not in ((), (1,))
    ):
        return None
    size = len(taps)
    bins = size // 2 + 1 if node.attributes.get_int("onesided", 1) else size
    angles = 2 * np.pi * np.outer(np.arange(bins), np.arange(size)) / size
    waves = np.concatenate([np.cos(angles), -np.sin(angles)]) * taps.astype(np.float64)
    signal = op.Transpose(x, perm=[0, 2, 1]) if len(shape) == 3 else op.Unsqueeze(x, np.array([1]))
    found = op.Conv(signal, waves[:, None].astype(_like(x, 0).dtype), strides=[int(steps.reshape(-1)[0])])
    return op.Transpose(op.Reshape(found, np.array([0, 2, bins, -1])), perm=[0, 3, 2, 1])


def _convolution_of_volumes(op: Builder, node: ir.Node) -> ir.Value | None:
    """The sum over the taps along depth of convolutions of all slices of the volumes, each a picture of its own."""
    x, weights = node.inputs[0], constant(node.inputs[1])
    shape = shape_of(x)
    if shape is None or len(shape) != 5 or weights is None:
        return None
    channels, *sizes = shape[1:]
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if not all(isinstance(n, int) for n in (channels, *sizes)) or automatic not in ("NOTSET", "VALID"):
        return None
    strides, dilations = ints(node, "strides", [1] * 3), ints(node, "dilations", [1] * 3)
    pads = [0] * 6 if automatic == "VALID" else ints(node, "pads", [0] * 6)
    outs, *kernel = (int(n) for n in (weights.shape[0], *weights.shape[2:]))
    depth, *area = (
        (int(n) + before + behind - d * (k - 1) - 1) // s + 1
        for n, before, behind, d, k, s in zip(
            sizes, pads[:3], pads[3:], dilations, kernel, strides, strict=True
        )
    )
    if pads[0] or pads[3]:
        x = op.Pad(x, np.array([0, 0, pads[0], 0, 0, 0, 0, pads[3], 0, 0]))
    total: ir.Value | None = None
    for tap in range(kernel[0]):
        start = tap * dilations[0]
        bounds = (np.array([n]) for n in (start, start + (depth - 1) * strides[0] + 1, 2, strides[0]))
        slices = op.Transpose(op.Slice(x, *bounds), perm=[0, 2, 1, 3, 4])
        found = op.Conv(
            op.Reshape(slices, np.array([-1, channels, *sizes[1:]])), np.ascontiguousarray(weights[:, :, tap]),
            *(node.inputs[2:] if total is None else ()), kernel_shape=kernel[1:], strides=strides[1:], dilations=dilations[1:],
            pads=[*pads[1:3], *pads[4:]], group=node.attributes.get_int("group", 1),
        )  # fmt: skip
        total = found if total is None else op.Add(total, found)
    assert total is not None
    volumes = op.Reshape(total, np.array([-1, depth, outs, *area]))
    return op.Transpose(volumes, perm=[0, 2, 1, 3, 4])


def _pool_of_volumes(op: Builder, node: ir.Node) -> ir.Value | None:
    """Over rows and columns first, then over depth: the largest of the largest, and the mean of means, as elements of windows multiply too."""
    kernel = list(node.attributes["kernel_shape"].as_ints())
    shape, pads = shape_of(node.inputs[0]), _pads(node, kernel)
    if len(kernel) != 3 or pads is None or shape is None or not all(isinstance(n, int) for n in shape[1:]):
        return None
    channels, depth, *area = (int(n) for n in shape[1:])  # type: ignore[arg-type]
    strides, dilations = ints(node, "strides", [1] * 3), ints(node, "dilations", [1] * 3)
    kept = {k: v for k, v in node.attributes.items() if k in ("ceil_mode", "count_include_pad")}

    def pool(x: ir.Value, axes: list[int], sizes: list[int]) -> tuple[ir.Value, list[int]]:
        """Over two axes of these sizes; one along which nothing is pooled is given as -1."""
        if all(a < 0 or (kernel[a], strides[a], pads[a], pads[a + 3]) == (1, 1, 0, 0) for a in axes):
            return x, sizes
        chosen = {"kernel_shape": (kernel, 1), "strides": (strides, 1), "dilations": (dilations, 1)}
        told = {k: [v[a] if a >= 0 else one for a in axes] for k, (v, one) in chosen.items()}
        told["pads"] = [pads[a + end] if a >= 0 else 0 for end in (0, 3) for a in axes]
        found = op.node(node.op_type, [x], {**kept, **told})[0]
        made = shape_of(found)
        assert made is not None
        return found, [int(n) for n in made[2:]]  # type: ignore[arg-type]

    planes, area = pool(op.Reshape(node.inputs[0], np.array([-1, channels * depth, *area])), [1, 2], area)
    columns = op.Reshape(planes, np.array([-1, channels, depth, math.prod(area)]))
    volumes, (depth, _) = pool(columns, [0, -1], [depth, math.prod(area)])
    return op.Reshape(volumes, np.array([-1, channels, depth, *area]))


def _place(op: Builder, along: ir.Value, size: int, edge: str, *, align: bool) -> ir.Value:
    """From between -1 and 1 to the middle of the first and of the last of ``size`` pixels, or with ``align`` off to their outer ends."""
    span = size - 1 if align else size
    low = 0.0 if align else -0.5
    place = op.Add(op.Mul(op.Add(along, _like(along, 1)), _like(along, span / 2)), _like(along, low))
    if edge == "reflection" and span:
        over = op.Abs(op.Sub(place, _like(along, low)))
        turns = op.Floor(op.Div(over, _like(along, 2 * span)))
        over = op.Sub(over, op.Mul(turns, _like(along, 2 * span)))
        place = op.Add(op.Min(over, op.Sub(op.constant(_like(along, 2 * span)), over)), _like(along, low))
    # One pixel beyond there is nothing either way; what is farther would not be an index.
    beyond = 1 if edge == "zeros" else 0
    return op.Clip(place, _like(along, -beyond), _like(along, size - 1 + beyond))


def _like(x: ir.Value | None, number: float) -> np.ndarray:
    """A scalar of the type of ``x``."""
    assert x is not None and x.dtype is not None
    return np.asarray(number, x.dtype.numpy())


RULES: dict[str, tuple[Rule, ...]] = {
    "Acosh": (_acosh,),
    "AffineGrid": (_affine_grid,),
    "ArgMax": (_last_of_several,),
    "ArgMin": (_last_of_several,),
    "Asinh": (_asinh,),
    "AveragePool": (_pool_of_volumes,),
    "Atanh": (_atanh,),
    "Conv": (_convolution_of_volumes,),
    "Einsum": (_einsum_in_pairs, _einsum_as_products),
    "Erf": (_erf,),
    "Gemm": (_scaled_gemm,),
    "GlobalLpPool": (_global_lp_pool,),
    "GridSample": (_grid_sample,),
    "LRN": (_unbiased_lrn, _lrn_as_pool),
    "LpNormalization": (_lp_normalization,),
    "LpPool": (_lp_pool,),
    "MatMul": (_product_of_vectors,),
    "MaxPool": (_pool_of_volumes,),
    "Mean": (_mean,),
    "QLinearConv": (_quantized_convolution,),
    "QLinearMatMul": (_quantized_product,),
    "ReduceLogSumExp": (_log_sum_exp,),
    "STFT": (_short_time_fourier_transform,),
    "Softplus": (_softplus,),
    "Sum": (_sum,),
}
