"""Products with packed weights, which ONNX Runtime alone has, become operators of the standard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from optkit.graph import constant, drop_unused_initializers, walk
from optkit.inference import infer
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Builder, Change, Names, label, remove, substitute

_RUNTIME = "onnxruntime"
_BITS = (2, 4, 8)
# By the width that the integers are stored with: those around zero, and those with a zero point.
_STORED = {
    4: (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)),
    8: (np.dtype(np.int8), np.dtype(np.uint8)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """``(integers - zeros) * scales``: ``[inputs, outputs]``, ``[blocks, outputs]`` and the same or None; ``order`` of the inputs."""

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    order: np.ndarray | None


class UnpackWeights(GraphPass):
    """Write ``com.microsoft.MatMulNBits`` out, for targets that ONNX Runtime is no backend of: there nobody else reads it.

    Before: ``MatMulNBits(x, q, scales, zeros)`` in 2, 4 or 8 bits. After: ``MatMul(x, DequantizeLinear(w, scales))`` with a scale
    for each block of inputs, ``w`` in int4 or int8 where all zero points are the middle, else ``DequantizeLinear(w, scales,
    zeros)`` in uint4 or uint8; a bias is added. ``g_idx`` becomes a Gather where it names each block as often as blocks are long.

    Exact but for rounding; ``accuracy_level`` only allows what is not done. What is computed when the model runs stays as it is,
    and so do zero points that are no integers, and weights packed for one card.
    """

    name: ClassVar[str] = "unpack-weights"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Write out every one."""
        if _RUNTIME in context.target.backends:
            return []
        names, changes = Names(model), list[Change]()
        for node in tuple(walk(model)):
            if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
                found = _read(node)
                if found is not None:
                    changes.append(Change(rule=self.name, node=label(node), detail=str(found.integers.dtype)))
                    _write(node, found, names)
        if changes:
            drop_unused_initializers(model)
            # No size behind these nodes was known.
            infer(model)
        return changes


def _read(node: ir.Node) -> _Weights | None:
    given = [*node.inputs, *[None] * 6]
    inputs, outputs, block, bits = (_integer(node, k) for k in ("K", "N", "block_size", "bits"))
    packed, scales, zeros, groups = (constant(v) for v in given[1:5])
    if any(v is not None and constant(v) is None for v in given[1:5]) or _integer(node, "weight_prepacked"):
        return None
    if packed is None or scales is None or not packed.size or bits not in _BITS:
        return None
    blocks = -(-inputs // block)
    integers = _unpacked(packed.reshape(outputs, -1), bits)[:, :inputs].T
    scales = scales.reshape(outputs, blocks).T
    middle, width = 1 << (bits - 1), max(4, bits)
    around, above = _STORED[width]
    if zeros is not None:
        if zeros.dtype == np.uint8:
            zeros = _unpacked(zeros.reshape(outputs, -1), bits)[:, :blocks]
        zeros = zeros.reshape(outputs, blocks).T.astype(np.float32)
        if (zeros != np.rint(zeros)).any() or (zeros < 0).any() or (zeros >= 1 << width).any():
            return None
        zeros = None if (zeros == middle).all() else zeros.astype(np.uint8).astype(above)
    integers = (
        (integers.astype(np.int16) - middle).astype(np.int8).astype(around)
        if zeros is None
        else integers.astype(above)
    )
    order = None
    if groups is not None and (groups != np.arange(inputs) // block).any():
        order = np.argsort(groups, kind="stable")
        if (groups[order] != np.arange(inputs) // block).any():
            return None
        integers = integers[order]
    return _Weights(integers=integers, scales=scales, zeros=zeros, order=order)


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes.get_int(name, 4 if name == "bits" else 0)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """``[rows, bytes * 8 / bits]``, the lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _write(node: ir.Node, found: _Weights, names: Names) -> None:
    op, x = Builder(node, names), node.inputs[0]
    if found.order is not None:
        x = op.Gather(x, found.order.astype(np.int64), axis=-1)
    kept = [
        None if array is None else op.constant(np.ascontiguousarray(array), name)
        for array, name in ((found.integers, "q"), (found.scales, "scale"), (found.zeros, "zero"))
    ]
    weights = op.DequantizeLinear(
        *kept[: 2 if found.zeros is None else 3], axis=0, block_size=_integer(node, "block_size")
    )
    y = op.MatMul(x, weights)
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        y = op.Add(y, node.inputs[5])
    substitute(node.outputs[0], y)
    remove(node)
