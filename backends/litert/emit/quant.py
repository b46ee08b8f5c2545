"""Q/DQ pairs: integers on grids, from layer to layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, End, Layout, emits
from optkit.backends.litert.emit.grids import grid_of, refusal, stored
from optkit.backends.litert.flat import Tensor


def store(c: Context, end: End, tensor: Tensor, layout: Layout) -> None:
    """What a kernel made: integers that the quantizer would give, or what it computes in."""
    if tensor.grid is not None and end.quantizer is not None:
        c.done.add(end.quantizer)
        c.put_integers(end.quantizer.outputs[0], tensor, layout)
    else:
        c.put(end.value, tensor, layout)


@emits("QuantizeLinear", refuse=refusal)
def _quantize(c: Context, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    layout = c.layout(x, rows=True)
    found, grid = c.integers(x, layout), grid_of(node)
    source = found if found is not None else c.get(x, layout)
    if found is not None and found.grid is not None and found.grid.same(grid):
        made = found
    else:
        made = c.op(
            "QUANTIZE",
            [source],
            source.shape,
            np.int8,
            ("QuantizeOptions", {}),
            grid=grid,
            name=str(node.outputs[0].name),
        )
    c.put_integers(node.outputs[0], made, layout)


@emits("DequantizeLinear", refuse=refusal)
def _dequantize(c: Context, node: ir.Node) -> None:
    q, x = node.inputs[0], node.outputs[0]
    assert q is not None
    if stored(x) is not None:
        return  # a constant, which becomes what its readers want
    layout = c.layout(q, rows=True)
    found = c.integers(q, layout)
    assert found is not None, "DequantizeLinear reads a QuantizeLinear"
    c.put_integers(x, found, layout)
