"""Large products as small ONNX files: what a runtime is timed on to learn how fast it multiplies at best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SIDE = 1024
_CHANNELS, _PICTURE, _KERNEL = 256, 28, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A graph of one product.

    Attributes:
        model: The ONNX file.
        macs: Multiply-accumulates of a run.
    """

    name: str
    model: bytes
    feeds: Mapping[str, np.ndarray]
    macs: int


def probes(*, integer: bool) -> tuple[Probe, ...]:
    """A matrix product and a convolution, in float32 or with u8 activations and s8 weights."""
    product = _probe("MatMul", (_SIDE, _SIDE), (_SIDE, _SIDE), integer=integer, macs=_SIDE**3)
    macs = _CHANNELS**2 * _PICTURE**2 * _KERNEL**2
    x, w = (1, _CHANNELS, _PICTURE, _PICTURE), (_CHANNELS, _CHANNELS, _KERNEL, _KERNEL)
    return product, _probe("Conv", x, w, integer=integer, macs=macs, pads=[_KERNEL // 2] * 4)


def _probe(
    op: str, x: tuple[int, ...], w: tuple[int, ...], *, integer: bool, macs: int, **attributes: Any
) -> Probe:
    rng = np.random.default_rng(0)
    kind = TensorProto.UINT8 if integer else TensorProto.FLOAT
    if integer:
        weights: dict[str, np.ndarray] = {
            "w": rng.integers(-127, 128, w).astype(np.int8),
            "step": np.array(0.02, np.float32),
            "middle": np.array(128, np.uint8),
            "steps": np.array(1e-3, np.float32),
            "none": np.array(0, np.int8),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "step", "middle"], ["a"]),
            helper.make_node("DequantizeLinear", ["w", "steps", "none"], ["b"]),
            helper.make_node(op, ["a", "b"], ["c"], **attributes),
            helper.make_node("QuantizeLinear", ["c", "step", "middle"], ["y"]),
        ]
        feed = rng.integers(0, 256, x).astype(np.uint8)
    else:
        weights = {"w": rng.normal(size=w).astype(np.float32)}
        nodes = [helper.make_node(op, ["x", "w"], ["y"], **attributes)]
        feed = rng.normal(size=x).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        op,
        [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_tensor_value_info("y", kind, x)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return Probe(name=op, model=model.SerializeToString(), feeds={"x": feed}, macs=macs)
