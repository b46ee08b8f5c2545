"""Zero points of weights in 4 bits, taken out of the products that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import attribute, constant, drop_unused_initializers, graphs, rank, walk
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove, substitute

# What stands for 0 where integers are stored around it.
_MIDDLE = {ir.DataType.INT4: 0, ir.DataType.UINT4: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What a DequantizeLinear makes of 4 bits.

    Attributes:
        node: The DequantizeLinear.
        offsets: ``(m - z) s`` in float64, ``[blocks, outputs]``, or the other way round.
        axis: The one along which blocks lie.
        block: Their length.
    """

    node: ir.Node
    offsets: np.ndarray
    axis: int
    block: int


class SplitZeroPoints(GraphPass):
    """Multiply with weights in 4 bits as if they had no zero points, and add what those are worth.

    Before: ``y = MatMul(x, DequantizeLinear(q, s, z))`` with a scale for each block along the summed axis, ``q`` in int4 or uint4.
    After: ``y = MatMul(x, DequantizeLinear(q - m, s)) + MatMul(mean, n (m - z) s)`` with int4, where ``n`` is the length of a block,
    ``mean`` that of each block of ``x``, and ``m`` 8 for uint4, 0 for int4. For ``(q - z) s = (q - m) s + (m - z) s``, and what is the
    same in a whole block is multiplied with the sum of its inputs; their mean never leaves the range of float16, where sums may.

    It costs a multiplication for each ``n`` of the product, and a matrix as large as that of the scales. Products of one input share
    its means; where all zero points are ``m``, nothing is added. Gemm is rewritten too, and what has Cast or Transpose behind the
    weights. Weights that something else reads as well, or that blocks do not divide, keep their zero points.
    """

    name: ClassVar[str] = "split-zero-points"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Take the zero points of all such weights out."""
        names, found = Names(model), dict[ir.Node, tuple[_Weights, np.ndarray]]()
        for node in tuple(walk(model)):
            weights = _weights(node)
            products = {} if weights is None else _products(weights)
            if weights is not None and products:
                found |= {product: (weights, factor) for product, factor in products.items()}
                _centre(weights, names)
        changes = list[Change]()
        for graph in graphs(model):
            means: dict[tuple[ir.Value, int], ir.Value] = {}
            for node in [n for n in graph if n in found]:
                weights, factor = found[node]
                changes.append(Change(rule=self.name, node=label(node), detail=f"blocks of {weights.block}"))
                if factor.any():
                    _add(node, factor, weights.block, means, names)
        if changes:
            drop_unused_initializers(model)
        return changes


def _weights(node: ir.Node) -> _Weights | None:
    """Those in 4 bits that ``node`` dequantizes, where they may have zero points and blocks divide them."""
    if node.op_type != "DequantizeLinear" or node.domain != "":
        return None
    q, scale, zero = [*node.inputs, None][:3]
    if q is None or not q.is_initializer() or q.is_graph_input() or rank(q) != 2 or q.dtype not in _MIDDLE:
        return None
    scales, zeros = constant(scale), constant(zero)
    axis, block = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0)
    if scales is None or not block or q.shape is None or scales.shape[axis] * block != q.shape[axis]:
        return None
    if zeros is None and (zero is not None or q.dtype == ir.DataType.INT4):
        return None
    moved = _MIDDLE[q.dtype] - (0 if zeros is None else zeros.astype(np.float64))
    return _Weights(node=node, offsets=moved * scales.astype(np.float64), axis=axis, block=block)


def _products(weights: _Weights) -> dict[ir.Node, np.ndarray]:
    """The products that read ``weights``, each with what means of its blocks are multiplied with; none where something else reads them."""
    found = dict[ir.Node, np.ndarray]()
    for product, turned in _readers(weights.node.outputs[0], False):
        if product is None or (x := product.inputs[0]) is None or not rank(x) or weights.axis != turned:
            return {}
        assert x.dtype is not None
        alpha = product.attributes.get_float("alpha", 1.0) if product.op_type == "Gemm" else 1.0
        factor = alpha * weights.block * (weights.offsets.T if turned else weights.offsets)
        if not np.abs(factor).max() <= x.dtype.max:
            return {}
        found[product] = np.ascontiguousarray(factor.astype(x.dtype.numpy()))
    return found


def _readers(value: ir.Value, turned: bool) -> Iterator[tuple[ir.Node | None, bool]]:
    """Products with ``value``, and whether they sum over the second axis of the weights; None for another reader."""
    if value.is_graph_output():
        yield None, turned
    for use in value.uses():
        node, index = use
        op = node.op_type if node.domain == "" else ""
        if op == "Cast":
            yield from _readers(node.outputs[0], turned)
        elif op == "Transpose":
            yield from _readers(node.outputs[0], turned ^ (node.attributes.get_ints("perm") != (0, 1)))
        elif index == 1 and op in ("MatMul", "Gemm") and not attribute(node, "transA", 0):
            yield node, turned ^ bool(attribute(node, "transB", 0))
        else:
            yield None, turned


def _centre(weights: _Weights, names: Names) -> None:
    """Store the integers around 0."""
    node = weights.node
    q = node.inputs[0]
    assert q is not None and q.const_value is not None and q.dtype is not None
    source, middle = q.const_value, _MIDDLE[q.dtype]
    dtype = ir.DataType.INT4
    held = ir.LazyTensor(
        lambda: ir.Tensor((source.numpy().astype(np.int8) - middle).astype(dtype.numpy()), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(source.shape.numpy()),
    )
    node.replace_input_with(0, Builder(node, names).constant(held, "q"))
    node.resize_inputs(2)


def _add(
    node: ir.Node, factor: np.ndarray, block: int, means: dict[tuple[ir.Value, int], ir.Value], names: Names
) -> None:
    op, x = Builder(node, names), node.inputs[0]
    assert x is not None
    if (x, block) not in means:
        parts = op.Reshape(x, np.array([*[0] * ((rank(x) or 1) - 1), len(factor), block]))
        means[x, block] = op.ReduceMean(parts, np.array([-1]), keepdims=0)
    rest = op.node("MatMul", [means[x, block], factor], name="zero")[0]
    product = op.node(node.op_type, node.inputs, dict(node.attributes))[0]
    substitute(node.outputs[0], op.Add(product, rest))
    remove(node)
