"""Constants that float16 does not hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optkit.graph import constant, graphs, initializer

_LARGEST = float(np.finfo(np.float16).max)
# What Apple's own models mask with ("neural_engine_rules": -40000, not -inf): sums with scores stay finite.
_MASK = 40000.0
_MASKING = ("Add", "Sub", "Mul", "Where", "Expand", "Concat")


def saturate(model: ir.Model) -> None:
    """Give masks a value that float16 has, in place.

    A constant beyond float16, read by an operator that masks with it, becomes 40000 with its sign: behind a softmax
    what it masks is 0 either way. Elsewhere such a constant stays and is computed with in float32.
    """
    for graph in graphs(model):
        for node in graph:
            if node.op_type not in _MASKING:
                continue
            for index, value in enumerate(node.inputs):
                array = constant(value)
                if array is None or array.dtype != np.float32:
                    continue
                beyond = np.abs(array) > _LARGEST
                if beyond.any():
                    masked = np.where(beyond, np.sign(array) * np.float32(_MASK), array)
                    node.replace_input_with(index, initializer(graph, f"{node.name}/mask_{index}", masked))
