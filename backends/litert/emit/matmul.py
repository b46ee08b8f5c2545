"""Products of matrices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.backends.litert.emit.base import Context, End, emits, size
from optkit.backends.litert.emit.conv import bias
from optkit.backends.litert.emit.grids import grid_of, stored
from optkit.backends.litert.emit.quant import store
from optkit.backends.litert.flat import NOTHING, Grid, Tensor
from optkit.graph import constant, rank


def _refuse_gemm(node: ir.Node) -> str | None:
    if node.attributes.get_float("alpha", 1.0) != 1 or node.attributes.get_float("beta", 1.0) != 1:
        return "LiteRT has no factors in front of products and biases"
    return None


@emits("Gemm", refuse=_refuse_gemm)
def _gemm(c: Context, node: ir.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    assert a is not None and b is not None
    transposed = bool(node.attributes.get_int("transB", 0))
    if _known(b):
        _connected(c, node, a, b, rows=transposed, turned=bool(node.attributes.get_int("transA", 0)))
        return
    x, w = c.get(a), c.get(b)
    x = c.transposed(x, (1, 0)) if node.attributes.get_int("transA", 0) else x
    w = w if transposed else c.transposed(w, (1, 0))
    made = c.op(
        "FULLY_CONNECTED", [x, w, _plain_bias(c, node, w.shape[0])], (x.shape[0], w.shape[0]),
        settings=("FullyConnectedOptions", {}),
    )  # fmt: skip
    c.put(node.outputs[0], _added(c, node, made))


@emits(
    "MatMul",
    refuse=lambda n: None if (rank(n.inputs[0]) or 2) > 1 and (rank(n.inputs[1]) or 2) > 1 else "of a vector",
)
def _matmul(c: Context, node: ir.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    assert a is not None and b is not None
    if _known(b) and len(size(b)) == 2:
        _connected(c, node, a, b, rows=False, turned=False)
        return
    x, y = c.get(a), c.get(b)
    most = max(len(x.shape), len(y.shape))
    x = c.reshaped(x, (1,) * (most - len(x.shape)) + x.shape)
    y = c.reshaped(y, (1,) * (most - len(y.shape)) + y.shape)
    made = c.op(
        "BATCH_MATMUL",
        [x, y],
        size(node.outputs[0]),
        settings=("BatchMatMulOptions", {}),
        name=str(node.outputs[0].name),
    )
    c.put(node.outputs[0], made)


def _known(value: ir.Value) -> bool:
    return constant(value) is not None or stored(value) is not None


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _row(value: ir.Value | None, outs: int) -> bool:
    """Whether a bias is what kernels add themselves: nothing, or a number for each output."""
    if value is None or size(value) == (outs,):
        return True
    return constant(value) is not None and set(size(value)[:-1]) <= {1}


def _added(c: Context, node: ir.Node, made: Tensor) -> Tensor:
    """The product with the bias that its kernel does not add."""
    value = _bias(node)
    if value is None or _row(value, made.shape[-1]):
        return made
    return c.op("ADD", [made, c.get(value)], made.shape, settings=("AddOptions", {}))


def _plain_bias(c: Context, node: ir.Node, outs: int) -> Tensor:
    value = _bias(node)
    if value is None or not _row(value, outs):
        return NOTHING
    array = constant(value)
    if array is None:
        return c.get(value)
    return c.graph.constant(np.ascontiguousarray(np.broadcast_to(array.reshape(-1), outs)), str(value.name))


def _connected(c: Context, node: ir.Node, a: ir.Value, b: ir.Value, *, rows: bool, turned: bool) -> None:
    """A fully connected layer; its weights are ``[outputs, inputs]``, which ``rows`` says they are already.

    Float activations with int8 weights stay so: the kernel rounds each row of activations while it runs (dynamic range).
    """
    shape, kept = size(b), stored(b)
    outs = shape[0] if rows else shape[1]
    alone = _row(_bias(node), outs)
    end = c.end(node) if alone else End(value=node.outputs[0], activation=0, quantizer=None)
    q = c.integers(a)
    eight = kept is not None and kept[0].dtype == np.int8
    whole = q is not None and eight and end.quantizer is not None and not turned
    grid = None
    if whole:
        assert q is not None and q.grid is not None and kept is not None and end.quantizer is not None
        x, w = q, _integer_weights(c, b, kept, rows=rows)
        vector, grid = bias(c, node, outs, q.grid, kept[1]), grid_of(end.quantizer)
    else:
        x = c.transposed(c.get(a), (1, 0)) if turned else c.get(a)
        scaled = (
            kept is not None
            and kept[1].scale.size in (1, outs)
            and (kept[1].scale.size == 1 or kept[1].axis == int(not rows))
        )
        if eight and scaled and kept is not None and not kept[1].zero.any():
            w = _integer_weights(c, b, kept, rows=rows)
        else:
            array = constant(b)
            if array is None:
                w = c.get(b) if rows else c.transposed(c.get(b), (1, 0))
            else:
                w = c.weights(array if rows else array.T, str(b.name))
        vector = _plain_bias(c, node, outs)
    settings = {
        "fusedActivationFunction": end.activation, "keepNumDims": len(x.shape) > 2,
        "asymmetricQuantizeInputs": w.dtype == np.int8 and not whole,
    }  # fmt: skip
    made = c.op(
        "FULLY_CONNECTED", [x, w, vector], (*x.shape[:-1], outs), np.int8 if whole else np.float32,
        ("FullyConnectedOptions", settings), grid=grid, name=str(end.value.name),
    )  # fmt: skip
    store(c, end, _added(c, node, made), "plain")


def _integer_weights(c: Context, value: ir.Value, kept: tuple[np.ndarray, Grid], *, rows: bool) -> Tensor:
    array, grid = kept
    if not rows:
        array = np.ascontiguousarray(array.T)
    return c.graph.constant(array, str(value.name), Grid(scale=grid.scale, zero=grid.zero, axis=0))
