"""Run calibration batches once and observe the values that will get a Q/DQ pair, and no others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from optkit.errors import DataError
from optkit.graph import rank, scalar
from optkit.passes.quantization.observers import Method, Range, observer
from optkit.reference import ReferenceSession, with_outputs
from optkit.rewrite import register

if TYPE_CHECKING:
    from optkit.passes.base import Context

# Bytes of observed values that may be alive at a time; what does not fit is observed in a further run.
WINDOW = 256 << 20

_ZERO = np.zeros(1, np.float32)


def observe(
    model: ir.Model, names: Sequence[str], method: Method, percentile: float, context: Context
) -> dict[str, Range]:
    """Feed every batch of ``context.data`` and observe the values called ``names``.

    What ``context.memo`` holds from an earlier run on the same graph is not observed again: one histogram serves every
    method, and the range of a histogram is exact.

    Memory: one batch through the model, at most ``WINDOW`` bytes of observed values, and one observer a value,
    however many batches there are.

    Raises:
        DataError: There is no data.
    """
    data = context.data
    if data is None:
        raise DataError(
            "static quantization needs calibration data", hint="give --calib, or use --precision int8-dyn"
        )
    ranges: dict[str, Range] = context.memo.setdefault("observed ranges", {})
    histograms: dict[str, Range] = context.memo.setdefault("observed histograms", {})
    known = {**ranges, **histograms} if method == "min-max" else histograms
    missing = [name for name in names if name not in known]
    observers = {name: observer(method, percentile) for name in missing}
    for window in _windows(model, missing, next(iter(data))) if missing else ():
        copy = with_outputs(model, window)
        pools = _pool(copy) if method == "min-max" else {}
        session = ReferenceSession(copy)
        with context.progress.task("calibrate", len(data)) as task:
            for batch in data:
                for name, array in session.run(batch).items():
                    observers[pools.get(name, name)].add(array)
                task.advance()
        session.close()
        for name in set(pools.values()):
            observers[name].add(_ZERO)
    (ranges if method == "min-max" else histograms).update(observers)
    return {name: (known.get(name) or observers[name]).by(method, percentile) for name in names}


def observe_channels(
    model: ir.Model, axes: Mapping[str, int], reduction: Literal["ReduceMax", "ReduceMean"], context: Context
) -> dict[str, np.ndarray]:
    """The largest magnitude, or the mean, of every channel of the values called ``axes`` over all batches.

    Args:
        axes: Where the channels of each value lie, counted from the front.
        reduction: ``ReduceMax`` of magnitudes or ``ReduceMean``; batches count alike.

    Returns:
        ``[channels]`` in float64 for each name.

    Raises:
        DataError: There is no data.
    """
    data = context.data
    if data is None:
        raise DataError("activations can only be observed on calibration data", hint="give --calib")
    copy = with_outputs(model, list(axes))
    reduced = {}
    for value in list(copy.graph.outputs):
        assert value.name is not None
        axis, count = axes[value.name], rank(value)
        assert count is not None
        others = ir.tensor(
            np.array([i for i in range(count) if i != axis], np.int64), name=f"{value.name}/others"
        )
        register(copy.graph, str(others.name), others)
        last = value
        if reduction == "ReduceMax":
            last = _append(copy.graph, "Abs", [value])
        reduced[
            str(
                _append(
                    copy.graph, reduction, [last, copy.graph.initializers[str(others.name)]], keepdims=0
                ).name
            )
        ] = value.name
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(v for n in copy.graph for v in n.outputs if v.name in reduced)
    session = ReferenceSession(copy, precise=not context.target.saturates)
    totals: dict[str, np.ndarray] = {}
    join = np.maximum if reduction == "ReduceMax" else np.add
    with context.progress.task("observe channels", len(data)) as task:
        for batch in data:
            for name, array in session.run(batch).items():
                one = array.astype(np.float64)
                totals[reduced[name]] = join(totals[reduced[name]], one) if reduced[name] in totals else one
            task.advance()
    session.close()
    return totals if reduction == "ReduceMax" else {name: total / len(data) for name, total in totals.items()}


def _append(graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
    """A node at the end of the graph."""
    node = ir.node(op_type, inputs, attributes=attributes, name=f"{inputs[0].name}/{op_type}")
    value = node.outputs[0]
    value.name, value.type = node.name, inputs[0].type
    graph.append(node)
    return value


def _pool(model: ir.Model) -> dict[str, str]:
    """Give back channel maxima and means instead of feature maps that cannot be negative.

    The range, from 0 to the largest maximum, is the same, and a mean tells of NaN, which a maximum may hide. ONNX Runtime
    takes both in its blocked layout, where it would have to undo the blocks to give back the map.

    Returns:
        New output -> the value that it stands for.
    """
    pools: dict[str, str] = {}
    outputs: list[ir.Value] = []
    for value in model.graph.outputs:
        node = value.producer()
        if node is None or rank(value) != 4 or not _positive(node):
            outputs.append(value)
            continue
        for op in ("GlobalMaxPool", "GlobalAveragePool"):
            pool = ir.node(op, [value], name=f"{value.name}/{op}")
            pool.outputs[0].name, pool.outputs[0].type = pool.name, value.type
            node.append(pool)
            outputs.append(pool.outputs[0])
            pools[str(pool.name)] = str(value.name)
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    return pools


def _positive(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Clip":
        low = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and low >= 0
    return node.op_type in ("Relu", "Sigmoid", "HardSigmoid")


def _windows(model: ir.Model, names: Sequence[str], batch: dict[str, np.ndarray]) -> list[list[str]]:
    """``names`` in groups whose values on ``batch`` fit into ``WINDOW`` together."""
    sizes = _sizes(model, names, batch)
    windows: list[list[str]] = [[]]
    used = 0
    for name in names:
        if windows[-1] and used + sizes[name] > WINDOW:
            windows.append([])
            used = 0
        windows[-1].append(name)
        used += sizes[name]
    return windows


def _sizes(model: ir.Model, names: Sequence[str], batch: dict[str, np.ndarray]) -> dict[str, int]:
    """Bytes of each value on ``batch``: from the inferred shapes, or by running it where those leave something open."""
    bound: dict[str, int] = {}
    for value in model.graph.inputs:
        for axis, size in zip(value.shape or (), np.shape(batch.get(str(value.name), ())), strict=False):
            if isinstance(axis, ir.SymbolicDim) and axis.value is not None:
                bound[axis.value] = size
    shapes = {str(v.name): v.shape for node in model.graph for v in node.outputs}
    shapes |= {str(v.name): v.shape for v in model.graph.inputs}
    sizes: dict[str, int] = {}
    for name in names:
        shape = shapes.get(name)
        known = (
            None
            if shape is None
            else [bound.get(str(d.value)) if isinstance(d, ir.SymbolicDim) else d for d in shape]
        )
        if known is None or any(d is None for d in known):
            session = ReferenceSession(model, outputs=names)
            sizes = {k: array.nbytes for k, array in session.run(batch).items()}
            session.close()
            return sizes
        sizes[name] = 4 * math.prod(d for d in known if d is not None)
    return sizes
