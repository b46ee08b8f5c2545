"""Run calibration batches once and observe the values that will get a Q/DQ pair, and no others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optkit.errors import DataError
from optkit.passes.quantization.observers import Method, Range, observer
from optkit.reference import ReferenceSession, with_outputs

if TYPE_CHECKING:
    from optkit.passes.base import Context

# Bytes of observed values that may be alive at a time; what does not fit is observed in a further run.
WINDOW = 256 << 20


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
        session = ReferenceSession(model, outputs=window)
        with context.progress.task("calibrate", len(data)) as task:
            for batch in data:
                for name, array in session.run(batch).items():
                    observers[name].add(array)
                task.advance()
        session.close()
    (ranges if method == "min-max" else histograms).update(observers)
    return {name: (known.get(name) or observers[name]).by(method, percentile) for name in names}


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
    """Bytes of the values on ``batch``; the graph gives their shapes back, so that none of them is kept."""
    shapes = with_outputs(model, names)
    for index, value in enumerate(tuple(shapes.graph.outputs)):
        node = ir.node("Shape", [value])
        node.outputs[0].name = f"optkit/shape/{index}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        shapes.graph.append(node)
        shapes.graph.outputs[index] = node.outputs[0]
    session = ReferenceSession(shapes)
    found = session.run(batch).values()
    session.close()
    return {name: 4 * math.prod(shape.tolist()) for name, shape in zip(names, found, strict=True)}
