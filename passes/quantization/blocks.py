"""Linear layers on floats of 8 bits with a scale for each block, of activations while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.formats import FORMATS
from optkit.graph import drop_unused_initializers, rank, walk
from optkit.passes.base import Context, GraphPass
from optkit.passes.quantization.stored import Site, sites
from optkit.rewrite import Builder, Change, Names, register

_FORMAT, _BLOCK = FORMATS["e4m3"], 128
_LEAST = 1e-30


class QuantizeBlocks(GraphPass):
    """Products with constant matrices read both operands in e4m3, with a scale for each block along the summed axis.

    DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 3.3.1: a scale for 128 numbers of a row of
    activations, which are its largest over 448 when the model runs, and for 128 x 128 weights. It needs no data.

    Before: ``MatMul(x, w)``. After: ``MatMul(DequantizeLinear(QuantizeLinear(x, s), s), DequantizeLinear(q, v))`` in blocks of
    128, ``s = Max(Div(ReduceMax(Abs(Reshape(x))), 448), least)``. What 128 does not divide stays in float.

    Attributes:
        targets: Globs, or ``re:`` expressions, of node names, operators or module paths to quantize; ``=name`` is the one
            node of that name.
        ignore: The same, for what stays in float.
        smallest: Weights with fewer elements stay in float.
    """

    name: ClassVar[str] = "quantize-blocks"
    exact: ClassVar[bool] = False

    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    smallest: int = 2048

    def needs_format(self, context: Context) -> str:
        """Of both operands."""
        return _FORMAT.precision

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Quantize every suitable product."""
        self.refuse(context)
        names, changes = Names(model), list[Change]()
        chosen = set[ir.Node]()
        for site in sites(model, self.targets, self.ignore, self.smallest):
            readers = [use.node for use in site.value.uses()]
            if all(_suits(node, site) for node in readers):
                _store(site, names)
                chosen.update(readers)
        made: dict[tuple[ir.Value, object], ir.Value] = {}
        for node in tuple(walk(model)):
            if node in chosen:
                x = node.inputs[0]
                assert x is not None
                place = x, node.graph
                if place not in made:
                    made[place] = _activations(x, node, names)
                node.replace_input_with(0, made[place])
                detail = "MatMul to e4m3 x e4m3 in blocks of 128"
                changes.append(Change(rule=self.name, node=str(node.name), detail=detail))
        if changes:
            drop_unused_initializers(model)
        return changes


def _suits(node: ir.Node, site: Site) -> bool:
    x = node.inputs[0]
    depth = site.array.shape[site.inputs]
    return node.op_type == "MatMul" and x is not None and bool(rank(x)) and depth % _BLOCK == 0


def _store(site: Site, names: Names) -> None:
    name, weight = str(site.value.name), site.array
    depth, columns = weight.shape
    tall = np.abs(weight).reshape(depth // _BLOCK, _BLOCK, columns).max(1)
    wide = np.pad(tall, ((0, 0), (0, -columns % _BLOCK))).reshape(len(tall), -1, _BLOCK).max(2)
    top = np.repeat(wide, _BLOCK, 1)[:, :columns]
    scale = np.maximum(top / _FORMAT.high, _LEAST).astype(np.float32)
    steps = weight / np.repeat(scale, _BLOCK, 0)
    held = ir.Tensor(
        np.clip(steps, _FORMAT.low, _FORMAT.high).astype(_FORMAT.dtype.numpy()), dtype=_FORMAT.dtype
    )
    q = register(site.graph, names.new(f"{name}/q"), held)
    v = register(site.graph, names.new(f"{name}/scale"), scale)
    node = ir.node(
        "DequantizeLinear",
        [q, v],
        attributes={"axis": 0, "block_size": _BLOCK},
        name=names.new(f"{name}/DequantizeLinear"),
    )
    site.replace(node, names.new(f"{name}/dq"))


def _activations(x: ir.Value, reader: ir.Node, names: Names) -> ir.Value:
    """``x`` on the grids of its blocks and back, in front of the first that reads it."""
    op, count = Builder(reader, names), rank(x)
    assert count is not None
    parts = op.Reshape(x, np.array([*[0] * (count - 1), -1, _BLOCK]))
    largest = op.ReduceMax(op.Abs(parts), np.array([-1]), keepdims=0)
    s = op.Max(op.Div(largest, np.array(_FORMAT.high, np.float32)), np.array(_LEAST, np.float32))
    blocks = {"axis": -1, "block_size": _BLOCK}
    q = op.QuantizeLinear(x, s, **blocks, output_dtype=int(_FORMAT.dtype))
    q.type, q.shape = ir.TensorType(_FORMAT.dtype), x.shape
    found: ir.Value = op.DequantizeLinear(q, s, **blocks)
    found.type, found.shape = x.type, x.shape
    return found
