"""Pooling windows that are larger than what they pool, as torch allows with ``ceil_mode``, are made as large as that."""

from __future__ import annotations

import onnx_ir as ir

from optkit.graph import attribute


def clamp_windows(model: ir.Model) -> None:
    """Shrink windows to their input, where it is known and nothing is padded; OpenVINO refuses larger ones.

    There is one window along such an axis, and it counts what is there: the numbers stay the same.
    """
    for node in model.graph:
        if node.op_type not in ("AveragePool", "MaxPool") or node.inputs[0] is None:
            continue
        shape, window = node.inputs[0].shape, _numbers(node, "kernel_shape")
        if shape is None or not window:
            continue
        sizes = tuple(shape)[2:]
        strides = _numbers(node, "strides") or [1] * len(window)
        plain = not any(_numbers(node, "pads")) and set(_numbers(node, "dilations")) <= {1}
        fitting = [
            min(k, n) if isinstance(n, int) and 0 < k - n < s else k
            for k, n, s in zip(window, sizes, strides, strict=True)
        ]
        if plain and attribute(node, "ceil_mode") and fitting != window:
            node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", fitting)


def _numbers(node: ir.Node, name: str) -> list[int]:
    found = node.attributes.get(name)
    return [] if found is None else list(found.as_ints())
