"""Dynamic quantization: integer weights now, activation scales computed while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.formats import FORMATS
from optkit.graph import constant, drop_unused_initializers, graphs, initializer, rank, users
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.plan import selects
from optkit.qdq import quantized_tensor, scale_zero, weight_range
from optkit.rewrite import Change, substitute


class QuantizeDynamic(GraphPass):
    """Products with constant weights become DynamicQuantizeLinear, MatMulInteger and a rescaling.

    ``y = (q(x) - z_x) @ q(w) * (s_x * s_w) + b`` with ``q(x)`` in uint8 per tensor, chosen for each run, and ``q(w)`` in
    int8 per output channel. It needs no data and enters bodies of If and Loop. Convolutions are left alone: their
    dynamic integer kernels are slower than float on every CPU measured.

    Attributes:
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize.
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
        for graph in graphs(model):
            quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
            for node in tuple(graph):
                if node.op_type in ("MatMul", "Gemm") and node.domain == "" and self._suits(node):
                    _replace(node, quantized)
                    changes.append(
                        Change(
                            rule=self.name, node=str(node.name), detail=f"{node.op_type} to s8 x dynamic u8"
                        )
                    )
        drop_unused_initializers(model)
        return changes

    def _suits(self, node: ir.Node) -> bool:
        x, weight = node.inputs[0], node.inputs[1]
        if (
            weight is None
            or x is None
            or not weight.is_initializer()
            or constant(weight) is None
            or rank(weight) != 2
        ):
            return False
        if weight.dtype != ir.DataType.FLOAT or x.dtype not in (ir.DataType.FLOAT, None):
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
        plain = (
            node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
        )
        return plain and not node.attributes.get_int("transA", 0)


def _replace(node: ir.Node, quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]]) -> None:
    x, weight, graph = node.inputs[0], node.inputs[1], node.graph
    assert (
        x is not None
        and weight is not None
        and weight.const_value is not None
        and isinstance(graph, ir.Graph)
    )
    fmt, out, name = FORMATS["s8"], node.outputs[0], str(node.name)
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    axis = 0 if transposed else 1
    top = weight_range(weight.const_value.numpy(), axis)
    scale, zero = scale_zero(-top, top, fmt)
    tensor: ir.TensorProtocol = quantized_tensor(
        weight.const_value, scale, zero, fmt, axis, f"{weight.name}/q"
    )
    if transposed:
        tensor = _transposed(tensor)
    q_w, z_w, s_w = (
        initializer(graph, f"{name}/weight/{n}", t)
        for n, t in (("q", tensor), ("zero", zero), ("scale", scale))
    )
    if x not in quantized:
        dql = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}/DynamicQuantizeLinear")
        for value, end, dtype in zip(
            dql.outputs,
            ("q", "scale", "zero"),
            (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
            strict=True,
        ):
            value.name, value.type = f"{x.name}/dynamic/{end}", ir.TensorType(dtype)
            value.shape = x.shape if end == "q" else ir.Shape(())
        node.prepend(dql)
        quantized[x] = (dql.outputs[0], dql.outputs[1], dql.outputs[2])
    q_x, s_x, z_x = quantized[x]
    new: list[ir.Node] = []

    def make(
        op: str, inputs: list[ir.Value], dtype: ir.DataType, shape: ir.Shape | None, **attributes: int
    ) -> ir.Value:
        made = ir.node(
            op,
            inputs,
            attributes=attributes,
            name=f"{name}/{op}" if op != "Mul" else f"{name}/Mul_{len(new)}",
        )
        made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = (
            made.name,
            ir.TensorType(dtype),
            shape,
        )
        made.metadata_props.update(node.metadata_props)
        new.append(made)
        return made.outputs[0]

    product = make("MatMulInteger", [q_x, q_w, z_x, z_w], ir.DataType.INT32, out.shape)
    real = make("Cast", [product], ir.DataType.FLOAT, out.shape, to=int(ir.DataType.FLOAT))
    factor = make("Mul", [s_x, s_w], ir.DataType.FLOAT, ir.Shape(scale.shape))
    result = make("Mul", [real, factor], ir.DataType.FLOAT, out.shape)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        result = make("Add", [result, bias], ir.DataType.FLOAT, out.shape)
    node.prepend(new)
    substitute(out, result)
    assert not users(out)
    graph.remove(node, safe=True)


def _transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = ir.Shape(tuple(tensor.shape)[::-1])
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T)),
        dtype=tensor.dtype,
        shape=shape,
        name=tensor.name,
    )
