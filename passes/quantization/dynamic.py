"""Dynamic quantization: integer weights now, activation scales computed while the model runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.formats import FORMATS
from optkit.graph import attribute, constant, describe, drop_unused_initializers, graphs, rank, users
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.plan import selects
from optkit.qdq import Stored, quantize, quantized_tensor, scale_zero, store, weight_range
from optkit.rewrite import Change, Names, substitute
from optkit.saturation import SAFE, note_narrowed, pairs_at_risk

logger = logging.getLogger(__name__)

_FORMAT = FORMATS["s8"]


class QuantizeDynamic(GraphPass):
    """Products with constant weights become DynamicQuantizeLinear, MatMulInteger and a rescaling.

    ``y = (q(x) - z_x) @ q(w) * (s_x * s_w) + b`` with ``q(x)`` in uint8 per tensor, chosen for each run, and ``q(w)`` in
    int8 per output channel. It needs no data and enters bodies of If and Loop. Convolutions are left alone: their
    dynamic integer kernels are slower than float on every CPU measured.

    On a target whose u8 x s8 products saturate in 16 bits, output channels with a pair of weights that could do so get
    weights in 7 bits (-63 to 63): without data nobody knows whether they would, and each run stretches its activations
    over all of u8.

    Attributes:
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float: computing a scale would cost more than the product saves.
    """

    name: ClassVar[str] = "quantize-dynamic"

    exact: ClassVar[bool] = False

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 4096

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every suitable MatMul and Gemm."""
        changes: list[Change] = []
        weights = _Weights(Names(model), context.target.saturates)
        for graph in graphs(model):
            quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
            for node in tuple(graph):
                if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or not self._suits(node):
                    continue
                if not weights.finite(node):
                    logger.warning("%s stays in float: its weights are infinite or NaN", describe(node))
                    continue
                _replace(node, quantized, weights)
                detail = f"{node.op_type} to s8 x dynamic u8"
                changes.append(Change(rule=self.name, node=str(node.name), detail=detail))
        if changes:
            drop_unused_initializers(model)
        return changes

    def _suits(self, node: ir.Node) -> bool:
        x, weight = node.inputs[0], node.inputs[1]
        if weight is None or x is None or not weight.is_initializer() or constant(weight) is None:
            return False
        if weight.dtype != ir.DataType.FLOAT or rank(weight) != 2 or x.dtype not in (ir.DataType.FLOAT, None):
            return False
        assert weight.const_value is not None
        if (
            weight.const_value.size < self.smallest
            or not selects(self.targets, node)
            or selects(self.ignore, node)
        ):
            return False
        if node.op_type == "MatMul":
            return True
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        return plain and not attribute(node, "transA", 0)


def _transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


class _Weights:
    """Weights on their way to integers, ``[in, out]``; what several nodes read alike is stored once."""

    def __init__(self, names: Names, saturates: bool) -> None:
        self.names, self._saturates = names, saturates
        self._ranges: dict[tuple[ir.Value, int], np.ndarray] = {}
        self._stored: dict[tuple[ir.Value, int], Stored] = {}
        self._narrow: dict[ir.Value, np.ndarray] = {}

    def _range(self, node: ir.Node) -> tuple[ir.Value, int, np.ndarray]:
        weight, axis = node.inputs[1], 0 if _transposed(node) else 1
        assert weight is not None
        assert weight.const_value is not None
        if (weight, axis) not in self._ranges:
            self._ranges[weight, axis] = weight_range(weight.const_value.numpy(), axis)
        return weight, axis, self._ranges[weight, axis]

    def finite(self, node: ir.Node) -> bool:
        """Whether all weights are numbers."""
        return bool(np.isfinite(self._range(node)[2]).all())

    def stored(self, node: ir.Node) -> Stored:
        """The integers that ``node`` multiplies with, in the graph that holds its weights."""
        weight, axis, top = self._range(node)
        if (weight, axis) not in self._stored:
            assert weight.const_value is not None
            assert isinstance(weight.graph, ir.Graph)
            scale, zero = scale_zero(-top, top, _FORMAT)
            narrow = None
            if self._saturates:
                q = quantize(weight.const_value.numpy(), scale, zero, _FORMAT, axis)
                narrow = np.asarray(pairs_at_risk(q if axis == 0 else q.T).any(1))
                top = np.where(narrow, top * (_FORMAT.high / (SAFE - 1)), top)
                scale, zero = scale_zero(-top, top, _FORMAT)
            tensor = quantized_tensor(weight.const_value, scale, zero, _FORMAT, axis, str(weight.name))
            if axis == 0:
                tensor = _turned(tensor)
            self._stored[weight, axis] = store(
                weight.graph, str(weight.name), tensor, scale, zero, 1, self.names
            )
            if narrow is not None and narrow.any():
                self._narrow[self._stored[weight, axis].integers] = narrow
        return self._stored[weight, axis]

    def narrow(self, stored: Stored) -> np.ndarray | None:
        """The output channels of which the weights hold 7 bits, ``[out]`` truth values, or None."""
        return self._narrow.get(stored.integers)


def _turned(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    def compute() -> ir.Tensor[np.ndarray]:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)

    return ir.LazyTensor(
        compute, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()[::-1]), name=tensor.name
    )


def _replace(
    node: ir.Node, quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]], weights: _Weights
) -> None:
    x, graph = node.inputs[0], node.graph
    assert x is not None
    assert isinstance(graph, ir.Graph)
    out, name, names = node.outputs[0], str(node.name), weights.names
    w = weights.stored(node)
    if x not in quantized:
        made = ir.node(
            "DynamicQuantizeLinear", [x], num_outputs=3, name=names.new(f"{x.name}/DynamicQuantizeLinear")
        )
        kinds = (("q", ir.DataType.UINT8), ("scale", ir.DataType.FLOAT), ("zero", ir.DataType.UINT8))
        for value, (end, dtype) in zip(made.outputs, kinds, strict=True):
            value.name, value.type = names.new(f"{x.name}/dynamic/{end}"), ir.TensorType(dtype)
            value.shape = x.shape if end == "q" else ir.Shape(())
        node.prepend(made)
        quantized[x] = (made.outputs[0], made.outputs[1], made.outputs[2])
    q_x, s_x, z_x = quantized[x]

    def make(
        op: str, inputs: list[ir.Value], dtype: ir.DataType, shape: ir.Shape | None, **attributes: int
    ) -> ir.Value:
        made = ir.node(op, inputs, attributes=attributes, name=names.new(f"{name}/{op}"))
        value = made.outputs[0]
        value.name, value.type, value.shape = made.name, ir.TensorType(dtype), shape
        made.metadata_props.update(node.metadata_props)
        node.prepend(made)
        return value

    product = make("MatMulInteger", [q_x, w.integers, z_x, w.zero], ir.DataType.INT32, out.shape)
    if (narrow := weights.narrow(w)) is not None:
        made_of = product.producer()
        assert made_of is not None
        note_narrowed(made_of, narrow)
    real = make("Cast", [product], ir.DataType.FLOAT, out.shape, to=int(ir.DataType.FLOAT))
    factor = make("Mul", [s_x, w.scale], ir.DataType.FLOAT, w.scale.shape)
    result = make("Mul", [real, factor], ir.DataType.FLOAT, out.shape)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        result = make("Add", [result, bias], ir.DataType.FLOAT, out.shape)
    substitute(out, result)
    assert not users(out)
    graph.remove(node, safe=True)
