"""Scales of weights in 4 bits in float16, where the weights are computed with in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, drop_unused_initializers, users, walk
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove, substitute

_FOUR = (ir.DataType.INT4, ir.DataType.UINT4)
_LEAST, _MOST = float(np.finfo(np.float16).smallest_normal), float(np.finfo(np.float16).max)
# From the lowest number of 4 bits to the highest.
_STEPS = 15


class CastScales(GraphPass):
    """Unpack weights in 4 bits right to the float16 that they are cast to.

    Before: ``Cast(DequantizeLinear(q, s))`` with float32 scales of blocks. After: ``DequantizeLinear(q, s')``, ``s'`` in float16.
    TensorRT-RTX 1.7.1, by its plans, unpacks weights inside a product where nothing lies between; with a Cast there it
    writes the whole matrix to memory in each run, and reads it again.

    Rounds the scale and then the weight, where before the weight alone was rounded. Scales below float16's normal numbers stay in
    float32, unless their blocks are 0 throughout. So do those of weights in bfloat16: ONNX Runtime unpacks to none on a processor.
    """

    name: ClassVar[str] = "cast-scales"
    exact: ClassVar[bool] = False
    floats: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Cast all such scales."""
        names, changes = Names(model), list[Change]()
        for node in tuple(walk(model)):
            casts, out = _casts(node), node.outputs[0]
            scales = _scales(node) if casts else None
            if scales is None:
                continue
            node.replace_input_with(1, Builder(node, names).constant(scales, "scale"))
            out.type = ir.TensorType(ir.DataType.FLOAT16)
            for cast in casts:
                substitute(cast.outputs[0], out)
                remove(cast)
            changes.append(Change(rule=self.name, node=label(node), detail="float16"))
        if changes:
            drop_unused_initializers(model)
        return changes


def _casts(node: ir.Node) -> tuple[ir.Node, ...]:
    """The Casts to float16 that are all that reads weights with blocks; none where they are not."""
    if (
        node.op_type != "DequantizeLinear"
        or node.domain != ""
        or not node.attributes.get_int("block_size", 0)
    ):
        return ()
    out, readers = node.outputs[0], users(node.outputs[0])
    if out.is_graph_output() or not all(_narrows(n) for n in readers):
        return ()
    return readers


def _narrows(node: ir.Node) -> bool:
    out = node.outputs[0]
    return node.op_type == "Cast" and out.dtype == ir.DataType.FLOAT16 and not out.is_graph_output()


def _scales(node: ir.Node) -> np.ndarray | None:
    """Those of ``node`` in float16; None where it has no room for them."""
    q, scale, zero = [*node.inputs, None][:3]
    scales, zeros = constant(scale), constant(zero)
    if q is None or q.dtype not in _FOUR or scales is None or scales.dtype != np.float32:
        return None
    if (zero is not None and zeros is None) or not _STEPS * np.abs(scales).max(initial=0.0) <= _MOST:
        return None
    small, numbers = np.abs(scales) < _LEAST, constant(q)
    if not small.any():
        return scales.astype(np.float16)
    if numbers is None:
        return None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    whole = tuple(slice(n) for n in numbers.shape)
    middle = 0 if zeros is None else np.repeat(zeros.astype(np.int8), block, axis)[whole]
    if ((numbers.astype(np.int8) != middle) & np.repeat(small, block, axis)[whole]).any():
        return None
    return np.where(small, np.float32(_LEAST), scales).astype(np.float16)
